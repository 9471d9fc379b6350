"""A training job on two nodes, struck by everything that Slurm, its nodes and its users do to jobs: it goes on by
itself and ends with the weights, rows and losses of the run that nothing has happened to."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import HEAD, Cluster, wait_until
from tests.cluster.faults import SAVE_EVERY, End, end_of, num_lost_steps, slow_run, wait_for_step
from tests.cluster.slurm_runs import launches, run_dir, submit, training_job

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

TIMEOUT_S = 300.0
STEP = 13  # of the strike: three steps after a checkpoint


class Training:
    """A submitted run."""

    def __init__(self, cluster: Cluster, run: dict[str, Any]) -> None:
        self.cluster, self.run = cluster, run
        self.job_id = training_job(submit(cluster, run))

    def wait_for_step(self, step: int) -> None:
        def failure() -> str | None:
            job = self.cluster.job(self.job_id)
            is_over = job["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED")
            return self.printed() if is_over else None

        wait_for_step(self.run, step, failure, TIMEOUT_S)

    def printed(self) -> str:
        return "\n".join(path.read_text() for path in run_dir(self.run).glob("slurm-*.out"))

    def finish(self) -> dict[str, str]:
        return self.cluster.wait_job(self.job_id, {"COMPLETED"}, TIMEOUT_S)

    def reasons(self) -> list[str]:
        """Of the ends of all starts but the last."""
        return [one["reason"] for one in launches(self.run) if one["event"] == "end"][:-1]

    def kill(self, host: str, words: str) -> None:
        """SIGKILL the process of `host` whose command line has `words`."""
        shown = self.cluster.run(host, "ps", "-e", "-o", "pid=,args=").stdout.splitlines()
        [pid] = [int(line.split()[0]) for line in shown if words in line]
        self.cluster.kill(host, pid)


Start = Callable[..., Training]


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path, tiny_models: dict[str, Path]) -> Start:
    def start_run(
        *,
        seconds_per_step: float = 0.3,
        slurm: dict[str, Any] | None = None,
        fault: str = "",
        fault_rank: int = 1,
        **changes: Any,
    ) -> Training:
        section = {"nodes": 2, "time": "0:20:00", "signal_before_s": 60} | (slurm or {})
        changes = {"launch__max_restarts": 3, "launch__heartbeat_timeout_s": 15.0, **changes}
        run = slow_run(tmp_path, tiny_models["mbart"], seconds_per_step=seconds_per_step, slurm=section, **changes)
        if fault:
            run["launch"]["environment"] |= {"HARNESS_FAULT": fault, "HARNESS_FAULT_RANK": str(fault_rank)}
        return Training(cluster, run)

    return start_run


def signal_to_the_driver(training: Training) -> None:
    training.cluster.run(HEAD, "scancel", "--signal=USR2", "--batch", training.job_id)


def signal_to_the_steps(training: Training) -> None:
    training.cluster.run(HEAD, "scancel", "--signal=USR2", training.job_id)


def requeue(training: Training) -> None:
    training.cluster.run(HEAD, "scontrol", "requeue", training.job_id)


@pytest.mark.parametrize(
    ("strike", "cause", "tasks"),
    [
        (signal_to_the_driver, "signal: ", "node"),
        (signal_to_the_driver, "signal: ", "device"),
        (signal_to_the_steps, "signal: ", "node"),
        (requeue, "Slurm (", "node"),
    ],
)
def test_announced_stop(
    start: Start, undisturbed: End, strike: Callable[[Training], None], cause: str, tasks: str
) -> None:
    training = start(slurm={"tasks": tasks})
    training.wait_for_step(STEP)
    strike(training)
    job = training.finish()
    assert end_of(training.run) == undisturbed
    assert num_lost_steps(training.run) == 0
    assert job["Restarts"] == "1"
    [reason] = training.reasons()
    assert reason.startswith(cause)


def test_announced_stop_of_a_task_of_an_array(start: Start, undisturbed: End, cluster: Cluster) -> None:
    training = start(slurm={"sweep": {"monitor.log_every_steps": [5]}})
    training.run = {**training.run, "name": "run-0"}
    training.wait_for_step(STEP)
    cluster.run(HEAD, "scancel", "--signal=USR2", "--batch", f"{training.job_id}_0")
    job = training.finish()
    assert end_of(training.run) == undisturbed
    assert num_lost_steps(training.run) == 0
    assert (job["ArrayTaskId"], job["Restarts"]) == ("0", "1")


def test_preemption(start: Start, undisturbed: End, cluster: Cluster) -> None:
    training = start(slurm={"partition": "low"})
    training.wait_for_step(STEP)
    urgent = ("--partition=high", "--nodes=3", "--ntasks-per-node=4", "--time=1", "--output=/dev/null")
    cluster.run(HEAD, "sbatch", *urgent, "--wrap=sleep 3")
    job = training.finish()
    assert end_of(training.run) == undisturbed
    assert num_lost_steps(training.run) == 0
    assert job["Restarts"] == "1"
    [reason] = training.reasons()
    assert reason.startswith("preemption: ")


def test_time_limit(start: Start, undisturbed: End) -> None:
    """As often as it takes: each start is as long as Slurm's checks, twice a minute, let it be."""
    training = start(seconds_per_step=2.0, slurm={"time": "0:02:00", "signal_before_s": 45}, launch__max_restarts=5)
    training.wait_for_step(1)
    time.sleep(60)  # for the patience of the wait that follows
    job = training.finish()
    assert end_of(training.run) == undisturbed
    assert num_lost_steps(training.run) == 0
    reasons = training.reasons()
    assert 1 <= len(reasons) == int(job["Restarts"])
    assert all(reason.startswith("time limit: ") for reason in reasons)


@pytest.mark.parametrize(("tasks", "who"), [("node", "rank 1"), ("device", "a rank")])
def test_killed_rank(start: Start, undisturbed: End, tasks: str, who: str) -> None:
    """Starts again within the job."""
    training = start(slurm={"tasks": tasks})
    training.wait_for_step(STEP)
    training.kill("node2", "harness.training.rank")
    job = training.finish()
    assert end_of(training.run) == undisturbed
    assert 3 <= num_lost_steps(training.run) < SAVE_EVERY
    assert job["Restarts"] == "0"
    [reason] = training.reasons()
    assert f"{who} was killed by SIGKILL" in reason


@pytest.mark.parametrize("host", ["node1", "node2"])
@pytest.mark.parametrize("fault", ["power", "slurmd"])
def test_lost_node(start: Start, undisturbed: End, cluster: Cluster, host: str, fault: str) -> None:
    """node1 has the driver. Without its slurmd a node computes on, but after a while Slurm gives it up."""
    training = start(seconds_per_step=0.3 if fault == "power" else 2.0)
    training.wait_for_step(STEP)
    if fault == "power":
        cluster.power_off(host)
    else:
        training.kill(host, "slurmd -N")
    try:
        job = training.finish()
        assert host not in cluster.run(HEAD, "scontrol", "show", "hostnames", job["NodeList"]).stdout.split()
        assert end_of(training.run) == undisturbed
        assert int(job["Restarts"]) >= 1
        assert num_lost_steps(training.run) < int(job["Restarts"]) * SAVE_EVERY
        if fault == "slurmd":
            assert wait_until(lambda: not cluster.processes(host), 30)
    finally:
        if fault == "slurmd":
            cluster.power_off(host)  # comes back whole


def test_requeue_while_saving(start: Start, undisturbed: End) -> None:
    """A rank stands still in the midst of a save. Slurm lets it go on before it asks it to end, so the save is done."""
    training = start(fault="checkpoint.after_shard:3:SIGSTOP")
    training.wait_for_step(3 * SAVE_EVERY)
    time.sleep(1)
    checkpoints = run_dir(training.run) / "checkpoints"
    assert [path.name for path in checkpoints.glob(".*")] == [".step-00000030.tmp"]
    requeue(training)
    job = training.finish()
    assert end_of(training.run) == undisturbed
    assert num_lost_steps(training.run) == 0
    assert job["Restarts"] == "1"
    assert not [*checkpoints.glob(".*")]


def test_harness_stop(start: Start, undisturbed: End, cluster: Cluster) -> None:
    """The one stop after which the job does not go on by itself, but when it is submitted again."""
    training = start()
    training.wait_for_step(STEP)
    cluster.run(HEAD, sys.executable, "-m", "harness", "stop", run_dir(training.run))
    job = cluster.wait_job(training.job_id, {"FAILED"}, TIMEOUT_S)
    assert (job["Restarts"], job["ExitCode"]) == ("0", "75:0")
    again = Training(cluster, training.run)
    again.finish()
    assert end_of(again.run) == undisturbed
    assert num_lost_steps(again.run) == 0
    [reason] = again.reasons()
    assert reason.startswith("harness stop: ")


def test_no_progress(start: Start) -> None:
    """A job that comes no further gives up, and does not go round for ever."""
    training = start(fault="prepare:1:SIGTERM", fault_rank=0, launch__max_restarts=1)
    job = training.cluster.wait_job(training.job_id, {"FAILED"}, TIMEOUT_S)
    assert (job["Restarts"], job["ExitCode"]) == ("2", "1:0")
    assert "not started again: 1 restarts in a row" in training.printed()


LOOKS_AT_THE_CLOCK = """
import signal, sys
from pathlib import Path
from harness.cluster.allocation import current_allocation
from harness.cluster.job_watch import JobWatch
signal.signal(signal.SIGUSR2, lambda *_: None)
with JobWatch(current_allocation(), Path(sys.argv[1])) as watch:
    signal.pause()
    print(watch.cause)
"""


def test_long_saves_begin_before_the_signal(cluster: Cluster, tmp_path: Path) -> None:
    """A save that took 100 s, with half as much again and a minute: half a minute of a job of 4 minutes is left."""
    (tmp_path / "metrics.jsonl").write_text('{"event": "checkpoint", "step": 1, "time_s": 1, "seconds": 100.0}\n')
    watch = (sys.executable, "-c", LOOKS_AT_THE_CLOCK, tmp_path)
    assert cluster.run(HEAD, "srun", "--time=4", *watch, timeout_s=120).stdout == "time limit\n"
