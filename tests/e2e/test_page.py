"""report.html of real rows in real headless Chromium: numbers read back, search, filters, widths, no requests."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from PIL import Image

from harness.decoding.beam import BeamSettings
from harness.reports.class_report import write_predictions
from harness.reports.predictions import Predictions
from harness.reports.report import write_evaluation
from harness.reports.sentences import Sentences
from harness.scoring.classification import class_scores
from harness.scoring.scores import LABELS, corpus_scores
from harness.tasks.task import Output
from tests.browser import NAMES, Browser, find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"),
]

TEST_SET = Path(__file__).parents[2] / "examples" / "data" / "libreoffice-help.en-de.test.tsv.gz"
PHONE, DESKTOP = 390, 1280


@dataclass
class Written:
    page: Path
    scores: dict[str, Any]
    sources: list[str]
    references: list[str]
    hypotheses: list[str]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Two evaluations of the same real rows; the outputs are the references with mistakes of every kind put in."""
    with gzip.open(TEST_SET, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t")[1:] for line in list(file)[1:]]
    sources, references = [row[0] for row in rows], [row[1] for row in rows]
    run = tmp_path_factory.mktemp("evaluations")
    before = [" ".join(text.split()[:-2]) for text in references]
    after = [text.replace("die", "der") for text in references]
    after[3] = sources[3]
    after[5] = ""
    after[8] = "und dann " * 12
    after[11] = references[11][:20]
    for step, hypotheses in ((100, before), (200, after)):
        outputs = [[Output(text, -0.25), Output(f"{text} <b>anders</b>", -0.5)] for text in hypotheses]
        outputs[5][1] = Output("Rindfleischetikettierung" * 20, -0.5)
        scores = corpus_scores(hypotheses, references, target_language="de", bootstrap_samples=100)
        write_evaluation(
            run / f"step-{step:08d}-test",
            Sentences.of(sources, references, outputs, [("en", "de")] * 200 + [("en", "at")] * (len(rows) - 200)),
            scores,
            BeamSettings(5, 1.0, 128, num_hypotheses=2),
            decode_seconds=12.5,
            losses={"loss": 3.25, "nll": 2.125},
        )
    directory = run / "step-00000200-test"
    return Written(
        directory / "report.html", json.loads((directory / "scores.json").read_text()), sources, references, after
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({selector!r})].map(item => item.textContent)")


def texts_of_cards(browser: Browser) -> dict[str, str]:
    return dict(zip(texts(browser, ".cards li > small:first-child"), texts(browser, ".cards b"), strict=True))


def test_scores_on_the_page_are_those_of_the_file_and_of_sacrebleu(browser, written):
    browser.open(written.page, width=DESKTOP)
    bleu = sacrebleu.corpus_bleu(written.hypotheses, [written.references])
    chrf = sacrebleu.corpus_chrf(written.hypotheses, [written.references])
    ter = sacrebleu.corpus_ter(written.hypotheses, [written.references])
    assert texts_of_cards(browser) == {
        "BLEU": f"{bleu.score:.1f}", "chrF2": f"{chrf.score:.1f}", "TER": f"{ter.score:.1f}", "loss": "3.250",
        "nll": "2.125",
    }  # fmt: skip
    text = texts(browser, "header")[0]
    for name in ("bleu", "chrf", "ter"):
        assert written.scores[name] == pytest.approx({"bleu": bleu, "chrf": chrf, "ter": ter}[name].score)
        assert written.scores["signatures"][name] in text
        assert "95 %: {:.1f} to {:.1f}".format(*written.scores["confidence"][name]) in text
    assert "271 sentences, decoded in 12.5 s, 21.7 sentences a second" in text
    assert "step-00000100-test" in text


def test_tables_are_those_of_the_file(browser, written):
    browser.open(written.page, width=DESKTOP)
    for heading, groups in (
        ("length", {f"{one['from']} to {one['to']}": one for one in written.scores["by_length"]}),
        ("language", written.scores["by_language"]),
    ):
        cells = browser.run(
            f"[...document.querySelector('#{heading}-heading + .scroll table').tBodies[0].rows]"
            ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )
        assert [row[:5] for row in cells] == [
            [name, str(one["sentences"]), *(f"{one[metric]:.1f}" for metric in LABELS if metric in one)]
            for name, one in groups.items()
        ]
    assert list(written.scores["by_language"]) == ["en-de", "en-at"]


def test_findings_are_counted_and_listed(browser, written):
    browser.open(written.page, width=DESKTOP)
    found = {name: int(texts(browser, f"#count-{name}")[0]) for name in written.scores["findings"]}
    assert found == written.scores["findings"]
    lines = {
        name: browser.run(f"[...document.querySelectorAll('#finding-{name} .about')].map(item => item.textContent)")
        for name in found
    }
    for name, line in (("copy", 4), ("empty", 6), ("repetition", 9), ("wrong_language", 4), ("too_short", 12)):
        assert any(about.startswith(f"Line {line} ") for about in lines[name]), name
    assert {name: len(items) for name, items in lines.items()} == {name: min(20, num) for name, num in found.items()}


def test_search_and_filters_leave_what_is_asked_for(browser, written):
    browser.open(written.page, width=DESKTOP)

    def visible(words: str, kind: str = "") -> list[int]:
        return browser.run(
            "(() => { const box = document.getElementById('search'), filter = document.getElementById('filter');"
            f"box.value = {json.dumps(words)}; box.dispatchEvent(new Event('input'));"
            f"filter.value = {json.dumps(kind)}; filter.dispatchEvent(new Event('change'));"
            "return [...document.querySelectorAll('#all > li')].filter(item => item.checkVisibility())"
            ".map(item => Number(item.id.replace('line-', ''))); })()"
        )

    def having(word: str) -> list[int]:
        lines = zip(written.sources, written.references, written.hypotheses, strict=True)
        return [row + 1 for row, line in enumerate(lines) if any(word in text.lower() for text in line)]

    assert visible("") == list(range(1, 272))
    assert visible("TaBelle") == having("tabelle")
    assert texts(browser, "#shown") == [f"{len(having('tabelle'))} of 271"]
    assert visible("no such words") == []
    assert visible("", "empty") == [6]
    assert set(visible("", "suspect")) >= {4, 6, 9, 12}
    assert len(visible("", "worse")) == written.scores["baseline"]["worse"]
    assert len(visible("", "changed")) == written.scores["baseline"]["changed"]
    assert visible("und dann", "repetition") == [9]
    browser.run("location.hash = '#line-4'; new Promise(done => setTimeout(done, 100))")
    assert browser.run("document.querySelector('#line-4').checkVisibility()"), "a link leads to what was filtered out"
    assert visible("") == list(range(1, 272))


def test_most_changed_sentences_come_with_what_they_were(browser, written):
    browser.open(written.page, width=DESKTOP)
    first = texts(browser, "#losses > li")[0]
    assert "Baseline" in first
    gains = [
        float(text.split("(")[1].split(")")[0].replace("\u2212", "-")) for text in texts(browser, "#losses .about")
    ]
    assert gains == sorted(gains)
    assert gains[-1] < 0
    for name in ("changed", "better", "worse"):
        assert f"{written.scores['baseline'][name]}" in texts(browser, "#changes-heading + p")[0]


def test_n_best_outputs_unfold_and_stay_text(browser, written):
    browser.open(written.page, width=DESKTOP)
    assert browser.run("document.querySelector('#all .outputs ol').checkVisibility()") is False
    browser.run("document.querySelector('#all .outputs summary').click()")
    assert browser.run("document.querySelector('#all .outputs ol').checkVisibility()") is True
    assert "<b>anders</b>" in texts(browser, "#all .outputs li")[1]


def test_a_long_word_among_the_n_best_is_not_cut_off(browser, written):
    browser.open(written.page, width=PHONE)
    browser.run("document.querySelector('#line-6').scrollIntoView()")
    browser.run("document.querySelector('#line-6 summary').click()")
    assert "Rindfleisch" in texts(browser, "#line-6 .outputs li")[1]
    assert browser.run("(item => item.scrollWidth <= item.clientWidth)(document.querySelector('#line-6'))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_fits_and_is_silent(browser, written, width, scheme):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.open(written.page, width=width)
    browser.run("document.querySelectorAll('details').forEach(item => { item.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    with Image.open(io.BytesIO(browser.screenshot())) as picture:
        colours = picture.convert("L").getcolors()
        assert len(colours) > 20
        paper = max(colours)[1]
        assert paper > 200 if scheme == "light" else paper < 60
    said = [
        one["method"] for one in browser.events if one["method"].startswith(("Runtime.exc", "Runtime.console", "Log"))
    ]
    requests = [
        one["params"]["request"]["url"] for one in browser.events if one["method"] == "Network.requestWillBeSent"
    ]
    assert (said, requests) == ([], [written.page.as_uri()])


def test_the_page_of_classified_rows_fits_a_phone(browser, tmp_path):
    labels = [f"Abteilung für {name}" for name in ("Einkauf", "Verkauf", "Lager", "Versand", "<b>Personal</b>")]
    gold, generator = np.arange(40) % len(labels), np.random.default_rng(1)
    logits = generator.normal(size=(len(gold), len(labels))) + 2 * np.eye(len(labels))[gold]
    texts = [f"Anfrage {row}" for row in range(len(gold))]
    nothing = [None] * len(gold)
    predictions = Predictions(texts, texts, nothing, labels, "single_label", logits, gold)
    scores = class_scores(logits, gold, "single_label", ["accuracy", "macro_f1"])
    write_predictions(tmp_path / "page", predictions, scores, seconds=1.0, losses={"loss": 1.5, "nll": 1.25})
    browser.open(tmp_path / "page" / "report.html", width=PHONE)
    assert texts_of_cards(browser) == {
        "accuracy": f"{scores['accuracy']:.3f}", "macro F1": f"{scores['macro_f1']:.3f}", "loss": "1.500",
        "nll": "1.250",
    }  # fmt: skip
    assert browser.run("document.documentElement.scrollWidth") <= PHONE
    ends = browser.run("[...document.querySelectorAll('caption')].map(item => item.getBoundingClientRect().right)")
    assert len(ends) == 2
    assert max(ends) <= PHONE, "of a table that is wider the caption can be read all the same"


def test_no_script_but_the_page_s_own_runs(browser, written):
    """Were a text ever to become markup, the policy would still keep its script from running."""
    browser.open(written.page, width=DESKTOP)
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harmed = 1\">');"
        "const script = document.createElement('script'); script.textContent = 'window.harmed = 2';"
        "document.body.append(script); new Promise(done => setTimeout(done, 200))"
    )
    assert browser.run("window.harmed ?? null") is None
