"""The files of an evaluation, their commit, and what the page shows."""

import json
import math
from dataclasses import asdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.decoding.beam import BeamSettings
from harness.decoding.constraints import Constraints
from harness.errors import DataError, HarnessError
from harness.reports.changes import read_baseline
from harness.reports.diffs import mark_differences
from harness.reports.html import NUM_LISTED, NUM_WORST
from harness.reports.page import search_in_words
from harness.reports.report import FILES, write_evaluation, write_losses
from harness.reports.sentences import Sentences
from harness.scoring.buckets import length_groups
from harness.scoring.scores import corpus_scores, one_line, sentence_chrf
from harness.tasks.task import Output

SOURCES = ["<script>alert(1)</script>", "a & b", "Two\nlines", "Press \u2318 \x00 Save.", "Good morning."]
REFERENCES = ["<b onload='x'>Skript</b>", "a und b", "Zwei\u2028Zeilen", "Speichern drücken.", "Guten Morgen."]
HYPOTHESES = ["<script>alert(2)</script>", "a & b", "Zwei\r\nZeilen", "", "Guten Morgen."]


def write(directory: Path, sources=SOURCES, references=REFERENCES, hypotheses=HYPOTHESES, loss=3.5, **more) -> str:
    """`hypotheses` may be the n best of each row."""
    outputs = [[Output(text, -0.5)] if isinstance(text, str) else text for text in hypotheses]
    sentences = Sentences.of(sources, references, outputs, more.get("pairs", ()))
    scores = corpus_scores(sentences.hypotheses, references, bootstrap_samples=more.get("bootstrap_samples", 0))
    settings = BeamSettings(5, 0.8, 100, num_hypotheses=max(map(len, outputs)))
    write_evaluation(
        directory, sentences, scores, settings,
        decode_seconds=2.5, losses={"loss": loss, "nll": 1.25}, baseline=more.get("baseline"),
    )  # fmt: skip
    return (directory / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects tags, text outside style and script, and unclosed tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "br", "input", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data + "\n"

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_text_files_hold_one_line_per_row(tmp_path):
    write(tmp_path / "set")
    assert {path.name for path in (tmp_path / "set").iterdir()} == FILES - {"nbest.jsonl"}
    for name, texts in (("sources", SOURCES), ("references", REFERENCES), ("hypotheses", HYPOTHESES)):
        lines = (tmp_path / "set" / f"{name}.txt").read_bytes().decode().split("\n")
        assert lines == [*map(one_line, texts), ""]
    assert (tmp_path / "set" / "hypotheses.txt").read_text().splitlines()[2] == "Zwei Zeilen"


def test_scores_json_has_values_signatures_and_conditions(tmp_path):
    write(tmp_path / "set")
    summary = json.loads((tmp_path / "set" / "scores.json").read_text())
    scores = corpus_scores(HYPOTHESES, REFERENCES)
    assert {name: summary[name] for name in scores.values} == scores.values
    assert summary["signatures"] == scores.signatures
    assert (summary["sentences"], summary["decode_seconds"]) == (5, 2.5)
    assert (summary["loss"], summary["nll"]) == (3.5, 1.25)
    assert summary["beam"] == {
        "beam_size": 5,
        "length_penalty": 0.8,
        "max_length": 100,
        "max_length_ratio": None,
        "num_hypotheses": 1,
        "preset": "hf",
        "early_stopping": False,
        "beam_groups": 1,
        "diversity_penalty": 0.0,
        "constraints": None,
        "sampling": None,
        "minimum_risk": None,
    }
    assert "length_penalty" in summary["hypothesis_score"]


def test_a_loss_that_is_not_finite_is_said_so(tmp_path):
    assert "not finite" in Page(write(tmp_path / "set", loss=float("inf"))).text
    assert json.loads((tmp_path / "set" / "scores.json").read_text())["loss"] is None


def test_nothing_of_the_texts_becomes_markup(tmp_path):
    text = write(tmp_path / "set")
    page = Page(text)
    assert page.open == []
    assert page.count("script") == 1
    assert page.count("b") == len(json.loads((tmp_path / "set" / "scores.json").read_text()).keys() & {
        "bleu", "chrf", "ter", "loss", "nll"})  # fmt: skip
    assert "<script>alert(1)</script>" in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page = Page(write(tmp_path / "set"))
    assert not any("src" in attributes or "srcset" in attributes for _, attributes in page.tags)
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page.tags)
    assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in page.tags)


def test_the_page_shows_scores_conditions_and_odd_outputs(tmp_path):
    page = Page(write(tmp_path / "step-00000010-validation"))
    scores = corpus_scores(HYPOTHESES, REFERENCES)
    for expected in (
        "step-00000010-validation", f"{scores.values['bleu']:.1f}", f"{scores.values['ter']:.1f}", "3.500",
        scores.signatures["chrf"], "5 sentences, decoded in 2.5 s, 2.0 sentences a second",
        "Beam search with 5 beams: preset hf, length penalty 0.8, at most 100 tokens.", "(empty)", "lower is better",
        "Outputs that are equal to their reference: 2.",
    ):  # fmt: skip
        assert expected in page.text
    summary = json.loads((tmp_path / "step-00000010-validation" / "scores.json").read_text())
    assert summary["findings"] == {
        "empty": 1, "copy": 2, "wrong_language": 0, "too_short": 0, "too_long": 0, "at_limit": 0, "no_end": 0,
        "repetition": 0, "same_output": 0,
    }  # fmt: skip
    assert "baseline" not in summary


def test_other_settings_of_the_search_are_told(tmp_path):
    constrained = BeamSettings(4, 0.6, 50, preset="gnmt", constraints=Constraints(no_repeat_ngram=3))
    assert search_in_words({"beam": asdict(constrained), "precision": "int8"}) == (
        "Beam search with 4 beams: preset gnmt, length penalty 0.6, at most 50 tokens, no repeat ngram 3, "
        "weights in int8."
    )
    assert search_in_words({"beam": asdict(BeamSettings(2, 1.0, 50, early_stopping=True))}) == (
        "Beam search with 2 beams: preset hf, length penalty 1, at most 50 tokens, early stopping True."
    )


def test_confidence_intervals_and_pairs_of_languages(tmp_path):
    page = Page(write(tmp_path / "set", bootstrap_samples=50, pairs=[("en", "de")] * 3 + [("en", "fr")] * 2))
    low, high = json.loads((tmp_path / "set" / "scores.json").read_text())["confidence"]["chrf"]
    assert f"95 %: {low:.1f} to {high:.1f}" in page.text
    assert "en-de" in page.text
    assert "By language pair" in page.text
    assert "By language pair" not in Page(write(tmp_path / "one")).text


def test_the_n_best_of_a_row_are_folded_up_below_it(tmp_path):
    outputs = [[Output(text, -0.25), Output(f"{text} <i>x</i>", -0.75)] for text in HYPOTHESES]
    page = Page(write(tmp_path / "set", hypotheses=outputs))
    second = sentence_chrf([outputs[4][1].text], [REFERENCES[4]])[0]
    assert f"score -0.750 \u00b7 chrF2 {second:.1f}" in page.text
    assert page.count("i") == 0
    assert "best outputs" not in Page(write(tmp_path / "one")).text
    lines = [json.loads(line) for line in (tmp_path / "set" / "nbest.jsonl").read_text().splitlines()]
    assert lines[4] == {"row": 4, "outputs": [{"text": one.text, "score": one.score} for one in outputs[4]]}


def test_the_page_compares_with_the_last_step_before(tmp_path):
    for step, text in ((9, "x"), (10, "Gute Nacht."), (30, "y")):
        write(tmp_path / f"step-{step:08d}-validation", hypotheses=[*HYPOTHESES[:4], text])
    write(tmp_path / "step-00000015-test", hypotheses=["z"] * 5)
    (tmp_path / "step-00000018-validation").mkdir()  # broken off
    write(tmp_path / "step-00000019-validation", SOURCES[:2], REFERENCES[:2], ["x", "y"])  # other rows
    new = ["Zwei", *HYPOTHESES[1:]]
    page = Page(write(tmp_path / "step-00000020-validation", hypotheses=new))
    found = json.loads((tmp_path / "step-00000020-validation" / "scores.json").read_text())["baseline"]
    before = corpus_scores([*HYPOTHESES[:4], "Gute Nacht."], REFERENCES).values
    assert {name: found[name] for name in ("name", "changed", "better", "worse")} == {
        "name": "step-00000010-validation", "changed": 2, "better": 1, "worse": 1,
    }  # fmt: skip
    for name, score in corpus_scores(new, REFERENCES).values.items():
        assert found["scores"][name]["score"] == pytest.approx(before[name])
        assert found["scores"][name]["delta"] == pytest.approx(score - before[name])
    losses, gains = page.text.split("Largest losses")[1].split("All sentences")[0].split("Largest gains")
    assert "Line 1 " in losses
    assert "Line 5 " in gains
    assert "Gute Nacht" in gains.replace("\n", "")


def test_a_baseline_of_other_rows_is_refused(tmp_path):
    write(tmp_path / "old", SOURCES[:2], REFERENCES[:2], ["x", "y"])
    with pytest.raises(DataError, match="references differ"):
        read_baseline(tmp_path / "old", REFERENCES)
    assert read_baseline(tmp_path / "old", REFERENCES[:2]).hypotheses == ["x", "y"]


def test_the_worst_sentences_come_first_and_long_sets_are_cut(tmp_path):
    num_rows = NUM_LISTED + 7
    references = [f"Satz Nummer {row} von vielen" for row in range(num_rows)]
    hypotheses = [text if row % 3 else text[: row % 20] for row, text in enumerate(references)]
    text = write(tmp_path / "set", [f"sentence {row}" for row in range(num_rows)], references, hypotheses)
    worst, everything = text.split("id='worst'")[1].split("id='all'")
    chrf = sentence_chrf(hypotheses, references)
    found = [float(part.split("<")[0]) for part in worst.split("chrF2 ")[1:]]
    assert found == [pytest.approx(value, abs=0.051) for value in sorted(chrf)[:NUM_WORST]]
    assert everything.count("<li ") == NUM_LISTED
    assert f"the first {NUM_LISTED:,} of {num_rows:,}" in text


def test_an_older_evaluation_is_replaced_and_leftovers_go(tmp_path):
    leftover = tmp_path / ".set.0123.tmp"
    leftover.mkdir()
    (leftover / "scores.json").write_text("{}")
    write(tmp_path / "set")
    write(tmp_path / "set", SOURCES[:2], REFERENCES[:2], ["x", "y"])
    assert (tmp_path / "set" / "hypotheses.txt").read_text() == "x\ny\n"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_losses_alone_replace_an_older_evaluation_too(tmp_path):
    write(tmp_path / "set")
    write_losses(tmp_path / "set", {"loss": 2.5, "nll": math.inf}, 3, 1.0)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "scores.json"]
    scores = json.loads((tmp_path / "set" / "scores.json").read_text())
    assert (scores["loss"], scores["nll"], scores["sentences"]) == (2.5, None, 3)


def test_an_output_without_a_score_is_json_too(tmp_path):
    write(tmp_path / "set", hypotheses=[[Output(text, -math.inf), Output("b", -1.0)] for text in HYPOTHESES])
    lines = (tmp_path / "set" / "nbest.jsonl").read_text().splitlines()
    assert "Infinity" not in lines[0]
    assert [one["score"] for one in json.loads(lines[0])["outputs"]] == [None, -1.0]


def test_a_failure_leaves_the_older_evaluation_and_no_temporary_directory(tmp_path, monkeypatch):
    write(tmp_path / "set")

    def full_disk(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.reports.report.write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "set", SOURCES[:2], REFERENCES[:2], ["x", "y"])
    assert (tmp_path / "set" / "hypotheses.txt").read_text().count("\n") == len(HYPOTHESES)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(HarnessError, match=r"not an evaluation.s: thesis\.tex"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_differences_are_marked_on_both_sides():
    assert mark_differences("Öffnet den Dialog.", "Öffnet das Fenster <x>.") == (
        "Öffnet <u>den Dialog</u>.", "Öffnet <mark>das Fenster &lt;x&gt;</mark>.",
    )  # fmt: skip
    assert mark_differences("打开对话框", "打开窗") == ("打开<u>对话框</u>", "打开<mark>窗</mark>")
    assert mark_differences("gleich", "gleich") == ("gleich", "gleich")


def test_texts_that_loop_are_compared_by_what_they_begin_with():
    """Word by word that takes seconds a pair, and shows nothing."""
    old, new = mark_differences("Los: " + "und dann " * 200, "Los: " + "und dann die " * 200)
    assert (old.count("<u>"), new.count("<mark>")) == (1, 1)
    assert old.startswith("Los: und dann <u>und dann und")
    assert new.startswith("Los: und dann <mark>die und")
    assert mark_differences("ja " * 400, "ja " * 400) == (("ja " * 400).strip(),) * 2


@given(st.text(max_size=40), st.text(max_size=40))
def test_marking_keeps_the_text(reference, hypothesis):
    for text, html in zip((reference, hypothesis), mark_differences(reference, hypothesis), strict=True):
        page = Page("")
        page.open.append("p")
        page.feed(html)
        page.close()
        assert "".join(page.text.split()) == "".join(text.replace("\r", "").split())


@given(st.lists(st.integers(0, 50), min_size=1, max_size=200))
def test_length_groups_hold_each_row_once_from_short_to_long(lengths):
    groups = list(length_groups(lengths))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert len(groups) <= 4
    for shorter, longer in pairwise(groups):
        assert max(lengths[row] for row in shorter) < min(lengths[row] for row in longer)
