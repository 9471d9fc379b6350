"""The same two-rank run by every launcher that needs no cluster, and what becomes of it when it is disturbed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import tiny_run, write_run

pytestmark = pytest.mark.slow

PROGRAMS = Path(sys.executable).parent
SCRIPT = str(Path(__file__).parents[2] / "launch" / "train.py")
LONG = ("schedule.steps=100000", "checkpoint.every_steps=10")


@pytest.fixture
def directory(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return with_run_file(tmp_path, tiny_models["mbart"])


@pytest.fixture(scope="module")
def expected_losses(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> list[float]:
    """Losses of the run by `harness train`."""
    directory = with_run_file(tmp_path_factory.mktemp("reference"), tiny_models["mbart"])
    finished = run(directory, "harness", "train", "run.yaml")
    assert finished.returncode == 0, finished.stderr
    assert len(step_losses(directory)) == 4
    return step_losses(directory)


def with_run_file(directory: Path, model: Path) -> Path:
    schedule = {"name": "constant", "steps": 4}
    write_run(tiny_run(directory, model, name="run", schedule=schedule, deepspeed__preset="zero2", launch__processes=2))
    return directory


def start(directory: Path, program: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.Popen(
        [str(PROGRAMS / program), *arguments],
        cwd=directory,
        env=environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory: Path, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    process = start(directory, program, *arguments, **variables)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def step_losses(directory: Path) -> list[float]:
    return [record["loss"] for record in records(directory) if record["event"] == "step"]


def records(directory: Path) -> list[dict]:
    path = directory / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(process: subprocess.Popen[str], directory: Path, step: int) -> None:
    wait_for(process, lambda: step in [one["step"] for one in records(directory) if one["event"] == "step"])


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.05)


def ranks_of(directory: Path) -> dict[int, int]:
    """{rank: process id} of the living processes that work in `directory`, launchers aside."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == directory:
                for variable in (entry / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(b"RANK="):
                        found[int(variable[5:])] = int(entry.name)
        except OSError:
            continue
    return found


def resume_and_stop(directory: Path, step: int) -> None:
    """The same command goes on after `step`, as metrics.jsonl shows; then end it."""
    process = start(directory, "harness", "train", "run.yaml", *LONG)
    wait_for(process, lambda: any(record["event"] == "restart" for record in records(directory)))
    wait_for_step(process, directory, step + 3)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    steps = [record["step"] for record in records(directory) if record["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_train_alike(launcher: str, directory: Path, expected_losses: list[float]) -> None:
    count = {
        "torchrun": ("--standalone", "--nproc-per-node", "2"),
        "deepspeed": ("--num_accelerators", "2", "--master_port", free_port()),
    }[launcher]
    finished = run(directory, launcher, *count, SCRIPT, "run.yaml", "launch.processes=1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert step_losses(directory) == expected_losses
    assert (directory / "run" / "export" / "model.safetensors").exists()


def test_bare_variables(directory: Path, expected_losses: list[float]) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_PORT": free_port()}
    ranks = [start(directory, "python", SCRIPT, "run.yaml", RANK=str(rank), **shared) for rank in range(2)]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert step_losses(directory) == expected_losses


def test_no_launcher_at_all_is_one_rank(directory: Path, expected_losses: list[float]) -> None:
    finished = run(directory, "python", SCRIPT, "run.yaml")
    assert finished.returncode == 0, finished.stderr
    assert step_losses(directory) == pytest.approx(expected_losses, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_ends_the_run_and_the_same_command_resumes(directory: Path, rank: int) -> None:
    process = start(directory, "harness", "train", "run.yaml", "launch.max_restarts=0", *LONG)
    wait_for_step(process, directory, 21)
    os.kill(ranks_of(directory)[rank], signal.SIGKILL)
    killed_at = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - killed_at < 5.0
    assert process.returncode == 1
    assert f"error: rank {rank} was killed by SIGKILL after step " in err
    assert not ranks_of(directory)
    checkpoint = int(err.rpartition("checkpoint of step ")[2])
    assert checkpoint >= 20
    resume_and_stop(directory, checkpoint)


def test_sigterm_saves_and_the_same_command_resumes(directory: Path) -> None:
    process = start(directory, "harness", "train", "run.yaml", *LONG)
    wait_for_step(process, directory, 5)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert not ranks_of(directory)
    stopped_at = int(err.rpartition("checkpoint of step ")[2])
    assert stopped_at == max(record["step"] for record in records(directory))
    resume_and_stop(directory, stopped_at)


def test_sigterm_before_the_first_step(directory: Path) -> None:
    process = start(directory, "harness", "train", "run.yaml")
    while len(ranks_of(directory)) < 2:
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert not ranks_of(directory)


def test_sigkill_of_the_command_leaves_no_rank(directory: Path) -> None:
    process = start(directory, "harness", "train", "run.yaml", *LONG)
    wait_for_step(process, directory, 2)
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 2.0
    while ranks_of(directory):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_harness_stop_works_with_another_launcher(directory: Path) -> None:
    process = start(directory, "torchrun", "--standalone", "--nproc-per-node", "2", SCRIPT, "run.yaml", *LONG)
    wait_for_step(process, directory, 3)
    assert run(directory, "harness", "stop", "run").returncode == 0
    process.communicate(timeout=60)
    assert not ranks_of(directory)
    errors = [json.loads((directory / f"run/errors/rank-{rank}.json").read_text()) for rank in range(2)]
    assert [error["exit_code"] for error in errors] == [75, 75]


def test_wrong_run_file_under_a_launcher(directory: Path) -> None:
    finished = run(directory, "python", SCRIPT, "run.yaml", "optimizer.learning_rate=1", RANK="0", WORLD_SIZE="1")
    assert finished.returncode == 2
    assert "learning_rate" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (directory / "run").exists()
