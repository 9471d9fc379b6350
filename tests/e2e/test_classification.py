"""A classification run through the real command line: train on ranks, evaluate, predict, load elsewhere."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import pipeline

from harness.cli.main import main
from tests.pairs import PAIRS
from tests.runs import harness, write_run
from tests.tiny_classifiers import make_base

pytestmark = pytest.mark.slow
ROWS = [(source, "question" if index % 3 else "answer") for index, (source, _) in enumerate(PAIRS[:24])]


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> str:
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def run_file(directory: Path, model: Path, name: str, **changes: Any) -> Path:
    run = {
        "name": name,
        "output_dir": str(directory),
        "task": "classification",
        "model": {"path": str(model)},
        "classification": {"problem": "single_label"},
        "data": {
            "train": [{"path": write_rows(directory / "train.tsv", ROWS)}],
            "validation": write_rows(directory / "dev.tsv", ROWS[:9]),
            "test": write_rows(directory / "test.tsv", ROWS[3:]),
            "max_length": 24,
        },
        "batch": {"tokens_per_step": 240, "max_tokens_per_device": 120},
        "loss": {"label_smoothing": 0.1, "focal_gamma": 1.0, "class_weights": "balanced"},
        "optimizer": {"lr": 5e-3, "betas": [0.9, 0.99]},
        "schedule": {"name": "linear", "warmup_steps": 2, "steps": 30},
        "deepspeed": {"preset": "zero0"},
        "evaluation": {"initial": False},
        "launch": {"processes": 1},
        "monitor": {"log_every_steps": 10},
    }
    return write_run(run | changes)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "step"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished run of a tiny BERT on two ranks with ZeRO-2; rows learnt by heart."""
    directory = tmp_path_factory.mktemp("classifier")
    model = make_base("bert", directory / "bert")
    path = run_file(directory, model, "kinds", deepspeed={"preset": "zero2"}, launch={"processes": 2})
    done = harness("train", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = directory / "kinds"
    (test_dir,) = (run_dir / "evaluations").glob("step-*-test")
    return SimpleNamespace(directory=directory, model=model, run_dir=run_dir, test_dir=test_dir, output=done.stdout)


def predictions_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


def test_rows_are_learnt_and_scored(trained: SimpleNamespace) -> None:
    losses = [record["loss"] for record in steps_of(trained.run_dir)]
    assert losses[-1] < 0.6 * losses[0]
    scores = json.loads((trained.test_dir / "scores.json").read_text())
    assert scores["accuracy"] > 0.9
    lines = predictions_of(trained.test_dir)
    assert scores["accuracy"] == sum(line["gold"] == line["predicted"] for line in lines) / len(ROWS[3:])
    assert [(line["text"], line["gold"]) for line in lines] == ROWS[3:]
    pictures = EventAccumulator(str(trained.run_dir / "tensorboard")).Reload()
    assert "test/confusion" in pictures.Tags()["images"]


def test_steps_are_the_same_on_other_layouts(trained: SimpleNamespace) -> None:
    layouts = {
        "alone": {},
        "sharded": {"deepspeed": {"preset": "zero3"}, "launch": {"processes": 2}},
        "short": {"launch": {"processes": 2}, "batch": {"tokens_per_step": 240, "max_tokens_per_device": 30}},
    }
    found = {}
    for name, changes in layouts.items():
        path = run_file(trained.directory, trained.model, name, **changes)
        done = harness("train", str(path), "model.dropout=0.0", "model.attention_dropout=0.0", "schedule.steps=6")
        assert done.returncode == 0, done.stdout + done.stderr
        steps = steps_of(trained.directory / name)
        found[name] = [step[value] for step in steps for value in ("loss", "grad_norm")]
    assert len(found["alone"]) == 12
    assert found["sharded"] == pytest.approx(found["alone"], rel=1e-4)
    assert found["short"] == pytest.approx(found["alone"], rel=1e-4)


def test_the_export_is_a_plain_classifier(trained: SimpleNamespace) -> None:
    classify = pipeline("text-classification", str(trained.run_dir / "export"), top_k=None)
    for line in predictions_of(trained.test_dir):
        (scores,) = classify([line["text"]])
        assert {one["label"]: one["score"] for one in scores} == pytest.approx(line["probabilities"], abs=2e-6)


def test_predict_answers_line_by_line(trained: SimpleNamespace, monkeypatch: Any, capsys: Any) -> None:
    texts = "".join(f"{text}\n" for text, _ in ROWS[3:])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(texts.encode()))))
    assert main(["predict", str(trained.run_dir), "--temperature", "1"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = predictions_of(trained.test_dir)
    assert [answer["label"] for answer in answers] == [line["predicted"] for line in expected]
    for answer, line in zip(answers, expected, strict=True):
        assert answer["probabilities"] == pytest.approx(line["probabilities"], abs=2e-6)


def test_predict_reads_a_table_at_the_temperature_of_the_run(trained: SimpleNamespace, capsys: Any) -> None:
    table = trained.directory / "texts.jsonl"
    table.write_text("".join(json.dumps({"body": text}) + "\n" for text, _ in ROWS[3:]), encoding="utf-8")
    assert main(["predict", str(trained.run_dir), str(table), "--text-column", "body", "--max-tokens", "30"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    validation = trained.run_dir / "evaluations" / trained.test_dir.name.replace("test", "validation")
    temperature = json.loads((validation / "scores.json").read_text())["calibration"]["temperature"]
    assert main(["predict", str(trained.run_dir / "export"), str(table), "--text-column", "body",
                 "--temperature", repr(temperature)]) == 0  # fmt: skip
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["label"] for one in answers] == [one["label"] for one in again]
    for one, other in zip(answers, again, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)


def test_evaluate_gives_the_scores_of_training(trained: SimpleNamespace, tmp_path: Path) -> None:
    assert main(["evaluate", str(trained.run_dir), "--output", str(tmp_path / "again")]) == 0
    before, after = (json.loads((path / "scores.json").read_text()) for path in (trained.test_dir, tmp_path / "again"))
    for name in ("accuracy", "macro_f1", "micro_f1", "mcc", "loss", "nll"):
        assert after[name] == pytest.approx(before[name], rel=1e-6), name


@pytest.mark.parametrize(
    ("problem", "labels", "family"),
    [("multi_label", ["red", "red,green", "green"], "t5"), ("regression", ["0.5", "-1", "2"], "llama")],
)
def test_several_labels_and_numbers_are_learnt(
    problem: str, labels: list[str], family: str, tmp_path: Path, capsys: Any
) -> None:
    model = make_base(family, tmp_path / "model")
    rows = [(text, labels[index % 3]) for index, (text, _) in enumerate(ROWS)]
    path = run_file(tmp_path, model, "other", classification={"problem": problem}, loss={})
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / f"{name}.tsv", rows)
    done = harness("train", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [record["loss"] for record in steps_of(tmp_path / "other")]
    assert losses[-1] < 0.5 * losses[0]
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text, _ in rows), encoding="utf-8")
    assert main(["predict", str(tmp_path / "other"), str(texts)]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if problem == "regression":
        assert [answer["value"] for answer in answers] == pytest.approx([float(label) for _, label in rows], abs=1.0)
    else:
        right = [
            ",".join(sorted(answer["labels"])) == ",".join(sorted(label.split(",")))
            for answer, (_, label) in zip(answers, rows, strict=True)
        ]
        assert sum(right) > 0.8 * len(rows)
