"""Requests to stop, from every side and at every time: all ranks agree on a step, save it, and end with 75.

One run is stopped again and again, and must end as the run that nobody stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.checkpoint.store import CheckpointStore
from harness.cli.main import main
from harness.errors import ExitCode
from harness.io.atomic import read_json, sha256_file
from harness.launch.run_directory import owner
from harness.training.metrics_file import read_metrics
from tests.pairs import PAIRS
from tests.runs import REPOSITORY, harness, same_state, tiny_run, write_pairs, write_run

pytestmark = pytest.mark.slow

NUM_STEPS, EVALUATE_EVERY, SAVE_EVERY = 90, 30, 12


class StoppedRun:
    """A run file, what has become of it, and the newest start of it."""

    def __init__(self, directory: Path, model: Path) -> None:
        held_out = write_pairs(directory / "held-out.tsv", PAIRS[:6])
        self.run = tiny_run(
            directory, model, name="run",
            model__dropout=0.1, data__train=[{"path": str(write_pairs(directory / "train.tsv", PAIRS[6:]))}],
            data__validation=str(held_out), data__test=str(held_out),
            schedule__steps=NUM_STEPS, deepspeed__preset="zero2", launch__processes=2,
            evaluation={"every_steps": EVALUATE_EVERY, "beam_size": 2, "max_target_length": 12, "metrics": ["chrf"]},
            checkpoint={"every_steps": SAVE_EVERY, "keep_last": 2, "keep_best": 1},
        )  # fmt: skip
        self.file = write_run(self.run)
        self.run_dir = directory / "run"
        self.store = CheckpointStore(self.run_dir / "checkpoints")
        self.private = directory / "tmp"
        self.private.mkdir()

    def start(self, fault: str = "", rank: int = 0) -> subprocess.Popen[str]:
        """`harness train`; `fault` strikes on `rank`."""
        own = {"TMPDIR": str(self.private), "HARNESS_FAULT": fault, "HARNESS_FAULT_RANK": str(rank)}
        return subprocess.Popen(
            [sys.executable, "-m", "harness", "train", str(self.file)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def last_step(self) -> int:
        steps = [record["step"] for record in read_metrics(self.run_dir / "metrics.jsonl") if record["event"] == "step"]
        return max(steps, default=0)

    def saved_step(self) -> int:
        return max(self.store.steps(), default=0)

    def wait_for_steps(self, process: subprocess.Popen[str], number: int) -> None:
        """Until so many more steps are made than are saved."""
        wanted, deadline = self.saved_step() + number, time.monotonic() + 240
        while self.last_step() < wanted:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, process: subprocess.Popen[str]) -> str:
        """Wait for a start that was asked to stop; checks what is always true then, returns standard error."""
        out, err = process.communicate(timeout=240)
        assert process.returncode == ExitCode.INTERRUPTED, (process.returncode, out, err)
        assert "Traceback" not in err
        saved = self.saved_step()
        assert err.rstrip().endswith(
            f"it resumes from the checkpoint of step {saved}" if saved else "it starts from the beginning"
        )
        self.check_clean()
        newest, passed_over = self.store.newest()
        assert not passed_over
        assert (newest.step if newest else 0) == saved
        return err

    def check_clean(self) -> None:
        left = [
            process.info["cmdline"]
            for process in psutil.process_iter(["cmdline"])
            if str(self.run_dir) in " ".join(process.info["cmdline"] or [])
        ]
        assert not left
        assert not list(self.private.iterdir())
        assert not [path for path in self.run_dir.rglob("*.tmp") if path.name.startswith(".")]
        for step in self.store.steps():
            self.store.open(step)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Records of one kind without what depends on the clock or the place."""
        volatile = {"time_s", "tokens_per_second", "decode_seconds", "peak_memory_bytes"}
        records = read_metrics(self.run_dir / "metrics.jsonl")
        return [{k: v for k, v in one.items() if k not in volatile} for one in records if one["event"] == kind]


@pytest.fixture(scope="module")
def unbroken(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StoppedRun:
    run = StoppedRun(tmp_path_factory.mktemp("unbroken"), tiny_models["mbart"])
    process = run.start()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    return run


@pytest.fixture(scope="module")
def stopped(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> StoppedRun:
    """The run that the tests of this file stop one after the other, in their order."""
    return StoppedRun(tmp_path_factory.mktemp("stopped"), tiny_models["mbart"])


def test_one_rank_while_it_prepares_the_rows(stopped: StoppedRun) -> None:
    stopped.end(stopped.start("prepare:1:SIGTERM"))
    assert not stopped.store.root.exists()


def test_the_supervisor_while_ranks_start(stopped: StoppedRun) -> None:
    process = stopped.start()
    log = stopped.run_dir / "logs" / "rank-1.log"
    log.unlink()
    while not log.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped.end(process)
    assert not stopped.store.root.exists()


def send(number: signal.Signals) -> Callable[[subprocess.Popen[str], StoppedRun], None]:
    """Twice at once, as `timeout` and batch systems do."""

    def act(process: subprocess.Popen[str], stopped: StoppedRun) -> None:
        process.send_signal(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    return act


def harness_stop(process: subprocess.Popen[str], stopped: StoppedRun) -> None:
    assert main(["stop", str(stopped.run_dir)]) == 0


@pytest.mark.parametrize("ask", [send(signal.SIGTERM), send(signal.SIGINT), harness_stop], ids=["TERM", "INT", "stop"])
def test_while_training(stopped: StoppedRun, ask: Callable[[subprocess.Popen[str], StoppedRun], None]) -> None:
    before = stopped.saved_step()
    process = stopped.start()
    stopped.wait_for_steps(process, 2)
    ask(process, stopped)
    stopped.end(process)
    saved = stopped.saved_step()
    assert before + 2 <= saved == stopped.last_step() < NUM_STEPS
    last = stopped.events("stop")[-1]
    assert (last["step"], last["reason"], last["world_size"]) == (saved, f"stopped and saved at step {saved}", 2)


def test_one_rank_alone(stopped: StoppedRun) -> None:
    before = stopped.saved_step()
    stopped.end(stopped.start("step:2:SIGUSR2", rank=1))
    assert stopped.saved_step() == stopped.last_step() == before + 3, "asked in the second step, agreed on in the third"


def test_during_a_save(stopped: StoppedRun) -> None:
    before = stopped.saved_step()
    stopped.end(stopped.start("checkpoint.after_shard:1:SIGINT", rank=1))
    due, saved = stopped.store.steps()[-2:]
    assert before < due == saved - 1
    assert due % SAVE_EVERY == 0 or due % EVALUATE_EVERY == 0


def test_before_the_ranks_train(stopped: StoppedRun) -> None:
    """The request outlives the start-up, in which that of an earlier start is forgotten."""
    before = stopped.store.steps()
    process = stopped.start()
    while str(process.pid) not in (owner(stopped.run_dir) or ""):
        time.sleep(0.01)
    asked = harness("stop", str(stopped.run_dir))
    assert asked.returncode == 0, asked.stderr
    assert f"asked pid {process.pid}" in asked.stdout
    stopped.end(process)
    assert stopped.store.steps() == before


def test_during_an_evaluation(stopped: StoppedRun) -> None:
    due = (stopped.saved_step() // EVALUATE_EVERY + 1) * EVALUATE_EVERY
    stopped.end(stopped.start("evaluation:1:SIGTERM", rank=1))
    assert stopped.saved_step() == due
    assert due not in [record["step"] for record in stopped.events("evaluation")], "it is made after the restart"


def test_during_the_last_evaluation(stopped: StoppedRun) -> None:
    num_validations = (NUM_STEPS - stopped.saved_step()) // EVALUATE_EVERY + 1
    stopped.end(stopped.start(f"evaluation:{num_validations + 1}:SIGUSR2", rank=1))
    assert stopped.saved_step() == NUM_STEPS
    assert not (stopped.run_dir / "export").exists()
    assert {record["set"] for record in stopped.events("evaluation")} == {"validation"}


def test_the_end_is_that_of_the_run_that_nobody_stopped(stopped: StoppedRun, unbroken: StoppedRun) -> None:
    process = stopped.start()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, (out, err)
    stopped.check_clean()
    last = f"step-{NUM_STEPS:08d}"
    assert same_state(stopped.store.root / last, unbroken.store.root / last)
    for kind in ("step", "evaluation"):
        assert stopped.events(kind) == unbroken.events(kind)
    names = ("steps", "exported_step", "best", "test", "target_tokens")
    ours, theirs = (read_json(run.run_dir / "summary.json") for run in (stopped, unbroken))
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    weights = [sha256_file(run.run_dir / "export" / "model.safetensors") for run in (stopped, unbroken)]
    assert weights[0] == weights[1]
    assert stopped.store.steps()[-1] == NUM_STEPS
    assert len(stopped.store.steps()) <= 3
