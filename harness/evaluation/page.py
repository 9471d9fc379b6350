"""report.html: one self-contained page, no network, no library. All text of rows and outputs is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from harness.evaluation.scores import HIGHER_IS_BETTER, LABELS, corpus_scores, sentence_chrf

NUM_WORST = 50
NUM_LISTED = 2000
_NUM_LENGTH_GROUPS = 4
_MIN_GROUP_SENTENCES = 10
# A word, a sign, or one character of a script written without spaces; with the white space before it.
_TOKEN = re.compile(
    r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\S)"
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #56616f; --paper: #fff; --panel: #f4f6f9; --line: #d9dfe7;
  --accent: #1f5fbf; --mark: #ffe2a8; --miss: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #a3afbd; --paper: #14181e; --panel: #1d232c;
  --line: #343d49; --accent: #8ab4f8; --mark: #5f4708; --miss: #ff9d94; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; }
p { margin: .25rem 0 .75rem; } .soft, caption, dt, th { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; padding: 0;
  margin: 1.5rem 0 1rem; list-style: none; }
.cards li { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.cards small { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .9rem; padding-bottom: .4rem; }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; font-weight: 400; }
thead th { font-size: .85rem; }
th:first-child, .wide td { text-align: left; vertical-align: baseline; }
.bars td:last-child { width: 55%; padding-right: 0; }
.bar { display: block; height: .8rem; border-radius: .2rem; background: var(--accent); }
code { font: .85rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.sentences { list-style: none; margin: 0; padding: 0; }
.sentences > li { border-top: 1px solid var(--line); padding: .75rem 0; content-visibility: auto;
  contain-intrinsic-size: auto 7rem; }
.sentences p { margin: 0 0 .3rem; font-size: .85rem; color: var(--soft); font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: 5.5rem 1fr; gap: .15rem .75rem; margin: 0; } dt { font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; }
u { text-decoration: underline dotted var(--miss) 2px; text-underline-offset: .2em; }
.search { display: flex; flex-wrap: wrap; gap: .75rem; align-items: baseline; padding: .6rem 0; position: sticky;
  top: 0; z-index: 1; background: var(--paper); }
.search[hidden] { display: none; }
input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--soft); border-radius: .4rem;
  padding: .4rem .6rem; width: 22rem; max-width: 100%; } :focus-visible { outline: 3px solid var(--accent); }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; } }
"""

_SCRIPT = """
const box = document.getElementById("search"), shown = document.getElementById("shown");
const items = [...document.querySelectorAll("#all > li")].map(item => [item, item.textContent.toLowerCase()]);
document.querySelector(".search").hidden = false;
box.addEventListener("input", () => {
  const wanted = box.value.toLowerCase().trim();
  let found = 0;
  for (const [item, text] of items) { item.hidden = !text.includes(wanted); found += !item.hidden; }
  shown.textContent = wanted ? `${found} of ${items.length}` : "";
});
"""


def render_page(
    title: str, summary: dict[str, Any], *, sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]
) -> str:
    """The whole page. `summary` is scores.json; the texts are one line each, row i at index i."""
    chrf = sentence_chrf(hypotheses, references)
    rows = list(zip(sources, references, hypotheses, chrf, strict=True))
    worst = sorted(range(len(rows)), key=lambda row: (chrf[row], row))[:NUM_WORST]
    parts = [
        _head(title, summary),
        _lengths(sources, references, hypotheses, [name for name in ("bleu", "chrf") if name in summary]),
        _distribution(chrf),
        _oddities(sources, references, hypotheses),
        f"<h2 id='worst-heading'>The {len(worst)} worst sentences</h2>",
        "<p class='soft'>Lowest chrF2 first. <mark>Marked</mark>: in the output but not there in the reference; "
        "<u>underlined</u>: missing from the output.</p>",
        _sentences("worst", rows, worst),
        *_all_sentences(rows),
    ]
    return html_page(title, parts)


def html_page(title: str, parts: Iterable[str]) -> str:
    """A self-contained page of HTML parts, with the style and the search script of an evaluation."""
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(title: str, summary: dict[str, Any]) -> str:
    num, seconds, beam = summary["sentences"], summary["decode_seconds"], summary["beam"]
    speed = f" ({num / seconds:,.1f} a second)" if seconds > 0 else ""
    search = f"beam search with {beam['beam_size']} beams" if beam["beam_size"] > 1 else "greedy search"
    signatures = {
        LABELS[name]: [f"<code>{escape(signature)}</code><div class='soft'>{escape(details)}</div>"]
        for name, signature in summary["signatures"].items()
        for details in [summary["details"].get(name, "")]
    }
    return (
        f"<h1>{escape(title)}</h1><p class='soft'>{num:,} sentences. {search.capitalize()}, length penalty "
        f"{beam['length_penalty']:g}, at most {beam['max_length']} tokens an output. "
        f"Decoded in {seconds:,.1f} s{speed}.</p>"
        + cards(summary)
        + table(signatures, caption="sacreBLEU's signatures, to be quoted with the scores", kind="wide")
    )


def cards(summary: Mapping[str, Any]) -> str:
    """Every score of a scores.json, large."""
    items = "".join(
        f"<li><small>{escape(LABELS[name])}</small><b>{_number(summary[name], name in summary['signatures'])}</b>"
        f"<small>{'higher' if HIGHER_IS_BETTER[name] else 'lower'} is better</small></li>"
        for name in LABELS
        if name in summary
    )
    return f"<ul class='cards'>{items}</ul>"


def _number(value: float | None, is_score: bool) -> str:
    return "not finite" if value is None else f"{value:.{1 if is_score else 3}f}"


def _lengths(sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str], metrics: list[str]) -> str:
    lines = {}
    for rows in length_groups([len(source) for source in sources]):
        part_hypotheses, part_references = [hypotheses[row] for row in rows], [references[row] for row in rows]
        scores = corpus_scores(part_hypotheses, part_references, metrics)
        ratio = sum(map(len, part_hypotheses)) / max(1, sum(map(len, part_references)))
        values = [f"{scores.values[name]:.1f}" for name in metrics]
        name = f"{len(sources[rows[0]])} to {len(sources[rows[-1]])}"
        lines[name] = [f"{len(rows):,}", *values, f"{ratio:.2f}"]
    heads = ["Source characters", "Sentences", *(LABELS[name] for name in metrics), "Length ratio"]
    caption = "Length ratio: characters of the outputs for each character of the references"
    return "<h2>By length of the source</h2>" + table(lines, heads, caption)


def length_groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row ids in up to four groups of about equal size, short to long; rows of one length stay together."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    num_groups = max(1, min(_NUM_LENGTH_GROUPS, len(order) // _MIN_GROUP_SENTENCES))
    limits = sorted({lengths[order[len(order) * (group + 1) // num_groups - 1]] for group in range(num_groups)})
    for low, high in zip([-1, *limits], limits, strict=False):
        yield [row for row in order if low < lengths[row] <= high]


def _distribution(chrf: Sequence[float]) -> str:
    counts = [0] * 10
    for score in chrf:
        counts[min(9, int(score // 10))] += 1
    lines = {
        f"{10 * index} to {10 * index + 10}": [
            f"{count:,}",
            f"<span class='bar' style='width:{100 * count / max(counts):.1f}%'></span>",
        ]
        for index, count in enumerate(counts)
    }
    heads = ["chrF2", "Sentences", ""]
    return "<h2>Sentence scores</h2>" + table(lines, heads, "Sentences by their own chrF2", kind="bars")


def _oddities(sources: Sequence[str], references: Sequence[str], hypotheses: Sequence[str]) -> str:
    pairs = list(zip(sources, references, hypotheses, strict=True))
    counts = {
        "Equal to the reference": sum(hypothesis == reference for _, reference, hypothesis in pairs),
        "Empty": sum(not hypothesis.strip() for _, _, hypothesis in pairs),
        "Copy of the source, unlike the reference": sum(out == source != reference for source, reference, out in pairs),
        "Repeat of the output of an earlier, different source": _num_repeats(sources, hypotheses),
    }
    lines = {name: [f"{count:,}", f"{100 * count / len(pairs):.1f} %"] for name, count in counts.items()}
    return "<h2>Outputs to know about</h2>" + table(lines, ["Output", "Sentences", "Share"])


def _num_repeats(sources: Sequence[str], hypotheses: Sequence[str]) -> int:
    """Many mean that the model says the same whatever it reads."""
    return len(set(zip(sources, hypotheses, strict=True))) - len(set(hypotheses))


def table(lines: Mapping[str, Sequence[str]], heads: Sequence[str] = (), caption: str = "", kind: str = "") -> str:
    """An HTML table; the keys head the lines, the cells are HTML already."""
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in lines.items()
    )
    titles = "".join(f"<th scope='col'>{head}</th>" if head else "<td></td>" for head in heads)
    return (
        f"<table class='{kind}'>{f'<caption>{caption}</caption>' if caption else ''}"
        f"{f'<thead><tr>{titles}</tr></thead>' if heads else ''}<tbody>{body}</tbody></table>"
    )


def _all_sentences(rows: Sequence[tuple[str, str, str, float]]) -> Iterator[str]:
    listed = range(min(NUM_LISTED, len(rows)))
    some = f" (the first {len(listed):,} of {len(rows):,})" if len(listed) < len(rows) else ""
    yield f"<h2 id='all-heading'>All sentences{some}</h2>"
    if some:
        yield "<p class='soft'>hypotheses.txt has every output, line by line beside sources.txt and references.txt.</p>"
    yield search_box("words of source, reference or output")
    yield _sentences("all", rows, listed)


def search_box(hint: str) -> str:
    """For the list whose id is `all`."""
    return (
        "<div class='search' role='search' hidden><label for='search'>Search</label>"
        f"<input id='search' type='search' autocomplete='off' placeholder='{hint}'>"
        "<span id='shown' class='soft' role='status'></span></div>"
    )


def _sentences(name: str, rows: Sequence[tuple[str, str, str, float]], chosen: Sequence[int]) -> str:
    items = []
    for row in chosen:
        source, reference, hypothesis, chrf = rows[row]
        marked_reference, marked_hypothesis = mark_differences(reference, hypothesis)
        items.append(
            f"<li><p>Line {row + 1:,} · chrF2 {chrf:.1f}</p><dl><dt>Source</dt><dd dir='auto'>{escape(source)}</dd>"
            f"<dt>Reference</dt><dd dir='auto'>{marked_reference}</dd>"
            f"<dt>Output</dt><dd dir='auto'>{marked_hypothesis or '<em>(empty)</em>'}</dd></dl></li>"
        )
    return f"<ol class='sentences' id='{name}' aria-labelledby='{name}-heading'>{''.join(items)}</ol>"


def mark_differences(reference: str, hypothesis: str) -> tuple[str, str]:
    """Both texts as HTML: words only the reference has are underlined, words only the hypothesis has are marked."""
    left, right = _TOKEN.findall(reference), _TOKEN.findall(hypothesis)
    matcher = SequenceMatcher(
        None, [token.strip() for token in left], [token.strip() for token in right], autojunk=False
    )
    left_parts, right_parts = [], []
    for kind, left_start, left_stop, right_start, right_stop in matcher.get_opcodes():
        left_parts.append(_wrap("".join(left[left_start:left_stop]), "u" if kind != "equal" else ""))
        right_parts.append(_wrap("".join(right[right_start:right_stop]), "mark" if kind != "equal" else ""))
    return "".join(left_parts).strip(), "".join(right_parts).strip()


def _wrap(text: str, tag: str) -> str:
    """The escaped text, without its leading white space inside the tag."""
    body = text.lstrip()
    if not (tag and body):
        return escape(text)
    return f"{text[: len(text) - len(body)]}<{tag}>{escape(body)}</{tag}>"
