"use strict";
const box = document.getElementById("search");
const filter = document.getElementById("filter");
const shown = document.getElementById("shown");
let items;

function update() {
  items ??= [...document.getElementById("all").children].map((item) => ({
    item,
    text: [...item.querySelectorAll("dd")].map((cell) => cell.textContent).join("\n").toLowerCase(),
    kinds: (item.dataset.kinds ?? "").split(" "),
  }));
  const wanted = box.value.toLowerCase().trim();
  const kind = filter?.value ?? "";
  let found = 0;
  for (const { item, text, kinds } of items) {
    item.hidden = !text.includes(wanted) || (kind !== "" && !kinds.includes(kind));
    found += !item.hidden;
  }
  shown.textContent = wanted || kind ? `${found} of ${items.length}` : "";
}

function showTarget() {
  const target = document.querySelector(":target");
  if (!target?.hidden) return;
  box.value = "";
  if (filter) filter.value = "";
  update();
  target.scrollIntoView();
}

document.querySelector(".search").hidden = false;
window.addEventListener("hashchange", showTarget);
box.addEventListener("input", update);
filter?.addEventListener("change", update);
