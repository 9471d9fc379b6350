"""Runs that start themselves again, and those that must not: small scripts as ranks, then a real training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.launch.restarts import read_launches
from tests.runs import REPOSITORY, harness, run_ranks, same_state, steps_of, tiny_run, write_run
from tests.supervised import wait_until

COUNT_STARTS = """
starts = run / f"starts-{rank}"
start = len(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text("x" * start)
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def save(step):
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
"""
KILLED = "rank 1 was killed by SIGKILL before the first step (a common reason is that the machine ran out of memory: "


def events(run_dir: Path, kind: str, *fields: str) -> list[tuple[Any, ...]]:
    records = [record for record in read_launches(run_dir) if record["event"] == kind]
    return [tuple(record.get(field) for field in fields) for record in records]


def test_a_killed_rank_is_started_again(start) -> None:
    run = start(COUNT_STARTS + "if start == 1: die() if rank else time.sleep(600)", max_restarts=2)
    code, _, err = run.finish()
    assert code == 0
    assert f"error: {KILLED}" in err
    assert err.rstrip().endswith("  -> starting again from the beginning: restart 1 of 2")
    assert events(run.run_dir, "start", "step", "restart", "backend") == [(None, 0, "local"), (None, 1, "local")]
    (first, reason), second = events(run.run_dir, "end", "exit_code", "reason")
    assert (first, second) == (1, (0, ""))
    assert reason.startswith(KILLED)


def test_a_rank_that_is_killed_at_every_start_uses_the_budget_up(start) -> None:
    run = start(COUNT_STARTS + "die() if rank else time.sleep(600)", max_restarts=2)
    code, _, err = run.finish(40.0)
    assert code == 1
    assert (run.run_dir / "starts-1").read_text() == "xxx"
    last_error = err[err.rindex("error: ") :]
    assert last_error.startswith(f"error: {KILLED}")
    assert "2 restarts in a row (launch.max_restarts) have come to no newer checkpoint; the other ranks" in last_error
    assert [restart for (restart,) in events(run.run_dir, "start", "restart")] == [0, 1, 2]


def test_a_new_checkpoint_refills_the_budget(start) -> None:
    run = start(COUNT_STARTS + "save(start)\nif start < 5: die()", num_ranks=1, max_restarts=1)
    code, _, err = run.finish(60.0)
    assert code == 0
    assert events(run.run_dir, "start", "step") == [(None,), (1,), (2,), (3,), (4,)]
    assert events(run.run_dir, "end", "step") == [(1,), (2,), (3,), (4,), (5,)]
    assert "starting again from the checkpoint of step 4: restart 1 of 1" in err


@pytest.mark.parametrize(
    ("body", "code", "num_starts"),
    [
        ("record(message='a bug', exit_code=1, traceback='Traceback of it'); sys.exit(1)", 1, 1),
        ("raise ValueError('a bug')", 1, 1),
        ("record(message='bad rows', exit_code=3, step=4); sys.exit(3)", 3, 1),
        ("sys.exit(5)", 5, 1),
        ("sys.exit(75)", 75, 1),
        ("record(message='the network', exit_code=1, step=4); sys.exit(1)", 1, 2),
        ("os.abort()", 1, 2),
    ],
)  # fmt: skip
def test_what_is_worth_another_start(start, body: str, code: int, num_starts: int) -> None:
    """Not an error before the first step, nor one that the user must mend, nor an interruption."""
    run = start(COUNT_STARTS + body, max_restarts=1)
    assert run.finish()[0] == code
    assert (run.run_dir / "starts-0").read_text() == "x" * num_starts


def test_a_run_that_was_asked_to_stop_is_not_started_again(start) -> None:
    run = start(COUNT_STARTS + "on_stop(lambda number: die()); ready(); time.sleep(600)", max_restarts=2)
    run.wait_ready()
    run.process.terminate()
    assert run.finish()[0] == 1
    assert (run.run_dir / "starts-0").read_text() == "x"


def test_what_the_last_start_has_left_is_set_aside(start) -> None:
    run = start(COUNT_STARTS + """
if start == 1:
    record(message="first", exit_code=1, step=1)
    sys.exit(1)
""", num_ranks=1, max_restarts=1)  # fmt: skip
    assert run.finish()[0] == 0
    assert not (run.run_dir / "errors" / "rank-0.json").exists()
    assert json.loads((run.run_dir / "errors" / "previous" / "rank-0.json").read_text())["message"] == "first"


NUM_STEPS, SAVED, FAULT = 100, 50, "step:52:SIGSTOP"


@pytest.fixture(scope="module")
def unbroken(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = training(tmp_path_factory.mktemp("unbroken"), tiny_models["mbart"])
    run_ranks([run], world_size=2)
    return run


def training(directory: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return tiny_run(
        directory, model, name="run", deepspeed__preset="zero2", model__dropout=0.1, schedule__steps=NUM_STEPS,
        checkpoint__every_steps=10, launch__processes=2, **changes,
    )  # fmt: skip


def run_directory(run: dict[str, Any]) -> Path:
    return Path(run["output_dir"]) / run["name"]


def assert_as_unbroken(run: dict[str, Any], unbroken: dict[str, Any]) -> None:
    for key in ("step", "row_digest", "loss"):
        assert [step[key] for step in steps_of(run)] == [step[key] for step in steps_of(unbroken)], key
    ours, theirs = (run_directory(one) / "checkpoints" / f"step-{NUM_STEPS:08d}" for one in (run, unbroken))
    assert same_state(ours, theirs)


@pytest.mark.slow
def test_a_training_whose_rank_is_killed_ends_as_if_it_had_not_been(
    unbroken: dict[str, Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = training(tmp_path, tiny_models["mbart"])
    # Rank 0 stops in step 52, so that rank 1 is killed in the middle of that step: it waits for rank 0.
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", "train", str(write_run(run))],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HARNESS_FAULT": FAULT, "HARNESS_FAULT_RANK": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    is_there = (run_directory(run) / "checkpoints" / f"step-{SAVED:08d}" / "manifest.json").exists
    wait_until(is_there, timeout_s=200.0)
    victim = rank_process(process.pid, 1)
    time.sleep(1.0)
    victim.kill()
    killed_at = time.monotonic()
    first_line = process.stderr.readline()
    assert time.monotonic() - killed_at < 2.0
    assert first_line == "harness: rank 1 was killed by SIGKILL; the other ranks are being stopped\n"
    assert process.wait(200) == 0
    assert f"starting again from the checkpoint of step {SAVED}: restart 1 of 2" in process.stderr.read()
    process.stderr.close()
    assert events(run_directory(run), "start", "step", "restart") == [(None, 0), (SAVED, 1)]
    assert events(run_directory(run), "end", "step", "exit_code") == [(SAVED, 1), (NUM_STEPS, 0)]
    assert_as_unbroken(run, unbroken)


def rank_process(supervisor: int, rank: int) -> psutil.Process:
    ranks = [child for child in psutil.Process(supervisor).children() if "harness.training.rank" in child.cmdline()]
    return next(child for child in ranks if child.environ()["RANK"] == str(rank))


@pytest.mark.slow
def test_a_training_whose_rank_hangs_ends_as_if_it_had_not(
    unbroken: dict[str, Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = training(tmp_path, tiny_models["mbart"], launch__heartbeat_timeout_s=3.0)
    result = harness("train", str(write_run(run)), HARNESS_FAULT=FAULT, HARNESS_FAULT_RANK="1")
    assert result.returncode == 0, result.stderr
    assert "in phase step after step 51, has given no sign of life for" in result.stderr
    assert "rank 1 was here:" in result.stderr
    for rank in (0, 1):
        stack = (run_directory(run) / "errors" / "previous" / f"rank-{rank}.stack").read_text()
        assert "training/loop.py" in stack
    assert events(run_directory(run), "end", "exit_code") == [(1,), (0,)]
    assert_as_unbroken(run, unbroken)


@pytest.mark.slow
def test_a_lock_that_a_killed_compiler_has_left_is_named(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    run = tiny_run(
        tmp_path, tiny_models["mbart"], name="run", optimizer__implementation="deepspeed",
        deepspeed__preset="zero2_offload", launch={"timeouts_s": {"load": 10.0}, "max_restarts": 0},
    )  # fmt: skip
    result = harness("train", str(write_run(run)), TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert result.returncode == 1
    assert f"a compiler's lock lies in {lock}: remove it if nothing compiles there" in result.stderr
    assert "in phase load, has got no further for" in result.stderr
    assert "file_baton.py" in (run_directory(run) / "errors" / "rank-0.stack").read_text()
