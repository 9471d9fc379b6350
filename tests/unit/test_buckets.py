"""Scores by length and by languages, and the n best, as scores.json and nbest.jsonl tell them."""

import json

import pytest

from harness.decoding.beam import BeamSettings
from harness.reports.report import write_evaluation
from harness.reports.sentences import Sentences
from harness.scoring.buckets import MIN_GROUP_SENTENCES, NUM_LENGTH_GROUPS, by_language, by_length
from harness.scoring.scores import corpus_scores
from harness.tasks.task import Output

METRICS = ("bleu", "chrf", "chrf++", "ter")
REFERENCES = [" ".join(["Öffnet", "das", "Dialogfeld", "und", "schließt", "es."][: 2 + row % 5]) for row in range(40)]
HYPOTHESES = [text if row % 3 else text[: row + 1] for row, text in enumerate(REFERENCES)]
SOURCES = ["x" * (10 + row // 2) for row in range(40)]
CHINESE = "打开用于编辑样式的对话框。"


def test_a_group_has_the_scores_of_its_rows_alone():
    groups = by_length(SOURCES, REFERENCES, HYPOTHESES, corpus_scores(HYPOTHESES, REFERENCES, METRICS).statistics)
    assert len(groups) == NUM_LENGTH_GROUPS
    assert sum(group["sentences"] for group in groups) == len(SOURCES)
    for group in groups:
        rows = [row for row, source in enumerate(SOURCES) if group["from"] <= len(source) <= group["to"]]
        assert len(rows) == group["sentences"] >= MIN_GROUP_SENTENCES
        hypotheses, references = [HYPOTHESES[row] for row in rows], [REFERENCES[row] for row in rows]
        assert {name: group[name] for name in METRICS} == corpus_scores(hypotheses, references, METRICS).values
        assert group["length_ratio"] == pytest.approx(len("".join(hypotheses)) / len("".join(references)))


def test_each_pair_of_languages_has_its_own_tokeniser():
    pairs = [("en_XX", "zh_CN"), *[("en_XX", "de_DE")] * 3, (None, "de_DE")]
    references = [CHINESE, *REFERENCES[:4]]
    hypotheses = [CHINESE[:9] + CHINESE[10:], *HYPOTHESES[:4]]
    found = by_language(pairs, references, hypotheses, ["bleu", "chrf"])
    assert list(found) == ["en_XX-de_DE", "en_XX-zh_CN", "?-de_DE"]
    assert [one["sentences"] for one in found.values()] == [3, 1, 1]
    assert (
        found["en_XX-zh_CN"]["bleu"]
        == corpus_scores(hypotheses[:1], references[:1], ["bleu"], target_language="zh").values["bleu"]
    )
    assert ["tok:zh" in one["signatures"]["bleu"] for one in found.values()] == [False, True, False]
    assert by_language(pairs[1:4], references[1:4], hypotheses[1:4], ["bleu"]) == {}


def test_scores_json_has_groups_and_intervals_and_nbest_has_a_line_for_each_row(tmp_path):
    outputs = [[Output(text, -0.5), Output(text + " zwei", -1.5)] for text in HYPOTHESES]
    scores = corpus_scores(HYPOTHESES, REFERENCES, METRICS, bootstrap_samples=50, target_language="de_DE")
    sentences = Sentences.of(SOURCES, REFERENCES, outputs, [("en_XX", "de_DE")] * 20 + [("fr_XX", "de_DE")] * 20)
    settings = BeamSettings(5, 1.0, 100, num_hypotheses=2)
    write_evaluation(tmp_path / "set", sentences, scores, settings, decode_seconds=1.0, losses={})
    summary = json.loads((tmp_path / "set" / "scores.json").read_text())
    assert [group["sentences"] for group in summary["by_length"]] == [10, 10, 10, 10]
    assert summary["by_language"]["fr_XX-de_DE"]["sentences"] == 20
    assert summary["target_language"] == "de_DE"
    for name in METRICS:
        low, high = summary["confidence"][name]
        assert low < summary[name] < high
    lines = [json.loads(line) for line in (tmp_path / "set" / "nbest.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(40))
    assert [[Output(one["text"], one["score"]) for one in line["outputs"]] for line in lines] == outputs
