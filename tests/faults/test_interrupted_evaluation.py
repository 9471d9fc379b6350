"""A run that is stopped in the middle of an evaluation keeps the rows it has decoded, also for fewer ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.errors import ExitCode
from harness.io.atomic import read_json
from tests.pairs import PAIRS
from tests.runs import SHARD_ALL, harness, tiny_run, write_pairs, write_run
from tests.tiny import talkative

pytestmark = pytest.mark.slow

NUM_STEPS, NUM_ROWS = 4, 24
KEPT = "This output was there before the restart."


def run_file(directory: Path, model: Path, *, name: str) -> str:
    run = tiny_run(
        directory, model, name=name, deepspeed={"preset": "zero3", "overrides": SHARD_ALL},
        data__validation=str(write_pairs(directory / "held-out.tsv", PAIRS[:NUM_ROWS])),
        schedule__steps=NUM_STEPS, schedule__warmup_steps=1, launch__processes=2,
        evaluation={
            "initial": False, "beam_size": 2, "max_target_length": 40, "max_tokens_per_device": 120,
            "metrics": ["chrf"],
        },
    )  # fmt: skip
    return str(write_run(run))


def hypotheses(run_dir: Path) -> list[str]:
    path = run_dir / "evaluations" / f"step-{NUM_STEPS:08d}-validation" / "hypotheses.txt"
    return path.read_text(encoding="utf-8").splitlines()


def test_stopped_in_the_middle_of_its_last_evaluation(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = talkative(tiny_models["mbart"], tmp_path / "model")
    unbroken, stopped = (run_file(tmp_path, model, name=name) for name in ("unbroken", "stopped"))
    assert harness("train", unbroken).returncode == ExitCode.DONE

    first = harness("train", stopped, HARNESS_FAULT="decode:4:SIGTERM", HARNESS_FAULT_RANK="1")
    assert first.returncode == ExitCode.INTERRUPTED, first.stderr
    partial = tmp_path / "stopped" / "evaluations" / f".step-{NUM_STEPS:08d}-validation.partial"
    files = sorted(partial.iterdir())
    assert [path.name for path in files] == ["after-0-rank-0.json", "after-0-rank-1.json"]
    content = read_json(files[1])
    row = next(iter(content["rows"]))
    content["rows"][row][0][0] = KEPT
    files[1].write_text(json.dumps(content))
    num_kept = sum(len(read_json(path)["rows"]) for path in files)
    assert 1 < num_kept < NUM_ROWS

    second = harness("train", stopped, "launch.processes=1")
    assert second.returncode == ExitCode.DONE, second.stderr
    expected = hypotheses(tmp_path / "unbroken")
    assert len(set(expected)) > NUM_ROWS / 2
    assert hypotheses(tmp_path / "stopped") == [*expected[: int(row)], KEPT, *expected[int(row) + 1 :]]
    assert not partial.exists()
