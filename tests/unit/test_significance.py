"""Paired bootstrap against sacreBLEU's own test, and `harness compare` on what evaluations have written."""

import json
import random
from pathlib import Path

import pytest
from sacrebleu.significance import PairedTest

from harness.cli.main import main
from harness.decoding.beam import BeamSettings
from harness.errors import DataError
from harness.reports.report import write_evaluation
from harness.reports.sentences import Sentences
from harness.scoring.scores import METRICS, corpus_scores, sentence_statistics
from harness.scoring.significance import WrittenEvaluation, compare_written, num_changed, paired_bootstrap
from harness.tasks.task import Output
from tests.pairs import PAIRS

SOURCES, REFERENCES = [source for source, _ in PAIRS], [target for _, target in PAIRS]


def worse(texts: list[str], share: float, seed: int) -> list[str]:
    """The texts without a share of their words."""
    draw = random.Random(seed)
    return [" ".join(word for word in text.split() if draw.random() >= share) for text in texts]


GOOD, BAD, AS_BAD = worse(REFERENCES, 0.1, 1), worse(REFERENCES, 0.4, 2), worse(REFERENCES, 0.4, 3)


def write(directory: Path, hypotheses: list[str], references: list[str] = REFERENCES, **options) -> Path:
    sentences = Sentences.of(SOURCES, references, [[Output(text, -1.0)] for text in hypotheses])
    scores = corpus_scores(hypotheses, references, **options)
    write_evaluation(directory, sentences, scores, BeamSettings(5, 1.0, 100), decode_seconds=1.0, losses={})
    return directory


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pair", [(BAD, GOOD), (GOOD, BAD), (BAD, AS_BAD)])
def test_p_is_that_of_sacrebleu(metric, pair):
    test = PairedTest(
        [("baseline", pair[0]), ("system", pair[1])],
        {metric: METRICS[metric](None)},
        [REFERENCES],
        "bs",
        n_samples=1000,
    )
    (expected_baseline, expected), = [results for name, results in test()[1].items() if name != "System"]  # fmt: skip
    statistics = [sentence_statistics(metric, texts, REFERENCES, target_language=None) for texts in pair]
    found = paired_bootstrap(*statistics)
    assert found.p == expected.p_value
    assert (found.baseline, found.score) == (expected_baseline.score, expected.score)
    assert found.interval[0] < found.delta < found.interval[1]


def test_p_tells_a_difference_from_chance():
    bad, good, as_bad = (
        sentence_statistics("chrf", texts, REFERENCES, target_language=None) for texts in (BAD, GOOD, AS_BAD)
    )
    assert paired_bootstrap(bad, good).p < 0.01
    assert paired_bootstrap(bad, as_bad).p > 0.05
    assert paired_bootstrap(good, good).p == 1.0, "sacreBLEU says 0.001"


def test_written_outputs_are_compared_by_what_both_were_scored_with(tmp_path):
    bad = WrittenEvaluation.read(write(tmp_path / "bad", BAD, metrics=("bleu", "chrf")))
    good = WrittenEvaluation.read(write(tmp_path / "good", GOOD, metrics=("chrf", "ter")))
    assert compare_written(bad, good).keys() == {"chrf"}
    assert num_changed(bad, good) == sum(one != other for one, other in zip(BAD, GOOD, strict=True))


@pytest.mark.parametrize(
    ("hypotheses", "references", "options", "says"),
    [
        (BAD, list(reversed(REFERENCES)), {}, "the references differ"),
        (BAD, REFERENCES, {"target_language": "zh"}, "bleu was scored as .*tok:zh"),
        (BAD, REFERENCES, {"metrics": ("chrf++",)}, "no score that"),
    ],
)
def test_what_cannot_be_compared(hypotheses, references, options, says, tmp_path):
    one = WrittenEvaluation.read(write(tmp_path / "one", GOOD))
    with pytest.raises(DataError, match=says):
        compare_written(one, WrittenEvaluation.read(write(tmp_path / "other", hypotheses, references, **options)))


def test_a_directory_that_lacks_something_is_refused(tmp_path):
    directory = write(tmp_path / "one", GOOD)
    (directory / "hypotheses.txt").write_text("one line\n")
    with pytest.raises(DataError, match=f"1 hypotheses for {len(REFERENCES)} references"):
        WrittenEvaluation.read(directory)
    (directory / "references.txt").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        WrittenEvaluation.read(directory)


def test_outputs_without_scores_are_scored_as_those_that_they_are_compared_with(tmp_path):
    """Of another tool, say: nothing tells that they are Chinese, and 13a would take a sentence for a word."""
    references = ["我喜欢喝热茶。", "今天的天气很好。", "打开新的文件夹。"] * 14
    outputs = ["我喜欢喝茶。", "今天天气很好。", "打开文件夹。"] * 14
    plain, scored = (write(tmp_path / name, outputs, references, target_language="zh") for name in ("plain", "scored"))
    (plain / "scores.json").unlink()
    for directories in ((plain, scored), (scored, plain)):
        differences = compare_written(*map(WrittenEvaluation.read, directories))
        assert {name: one.delta for name, one in differences.items()} == {"bleu": 0.0, "chrf": 0.0}
        assert differences["bleu"].score > 10


def test_compare_tests_evaluation_directories(tmp_path, capsys):
    directories = [write(tmp_path / name, texts) for name, texts in (("bad", BAD), ("good", GOOD), ("same", BAD))]
    (directories[2] / "scores.json").unlink()  # any two files of lines can be compared
    assert main(["compare", *map(str, directories)]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    expected = compare_written(*map(WrittenEvaluation.read, directories[:2]))
    lines = {line[:10].strip(): line[10:].split("  ") for line in first.splitlines()[3:]}
    assert [float(cell) for cell in lines["difference"] if cell] == [round(one.delta, 2) for one in expected.values()]
    assert [float(cell) for cell in lines["p"] if cell] == [round(one.p, 3) for one in expected.values()]
    assert f"second  {directories[1]}" in first
    assert f"0 of {len(BAD)} outputs differ" in second
    assert second.splitlines()[-1].split() == ["p", "1.000", "1.000"]


def test_compare_tests_the_exported_step_or_the_last_one(tmp_path, capsys):
    for name, outputs in (("a", {2: BAD, 4: AS_BAD}), ("b", {2: GOOD, 4: BAD})):
        for step, texts in outputs.items():
            write(tmp_path / name / "evaluations" / f"step-{step:08d}-validation", texts)
        write(tmp_path / name / "evaluations" / "step-00000009-validation-beam5", texts)
        (tmp_path / name / "plan.json").write_text(json.dumps({"config": {}}))
    write(tmp_path / "a" / "evaluations" / "step-00000004-test", GOOD)
    write(tmp_path / "b" / "evaluations" / "step-00000002-test", GOOD[::-1], REFERENCES[::-1])
    summary = {"exported_step": 2, "test": {}, "tokens_per_second": 1.0, "wall_time_s": 1.0, "restarts": 0}
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert f"first   {tmp_path}/a/evaluations/step-00000004-validation\n" in out
    assert f"second  {tmp_path}/b/evaluations/step-00000002-validation\n" in out
    assert "step-00000002-test is not tested against" in out
    assert "beam5" not in out
