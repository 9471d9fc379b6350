"""Backend `slurm`: the driver of a run within its job.

It reaches every node through srun, tells what ended an attempt, and puts the job back into the queue where that helps.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from harness.config.launch_rules import LIMIT_SLACK_S
from harness.config.launch_schema import SlurmConfig
from harness.config.schema import RunConfig
from harness.errors import ExitCode, HarnessError
from harness.launch import scheduler
from harness.launch.allocation import Allocation, Host, current_allocation
from harness.launch.failures import Outcome
from harness.launch.fleet import Way, supervise_nodes
from harness.launch.job_watch import JobWatch
from harness.launch.restarts import run_attempts
from harness.launch.run_directory import STOP_FILE, opened_run_directory, owner
from harness.launch.scheduler import Job
from harness.launch.signals import SENT_TO_RANKS
from harness.launch.slurm_tasks import supervise_tasks
from harness.plan.plan import Plan

_COMMON = ("srun", "--export=ALL", "--mpi=none", "--kill-on-bad-exit=0", "--wait=0")
_NODE_PATIENCE_S = 30.0
_OWNER_ASKED_EVERY_S = 5.0
_LIMIT_CHECKED_EVERY_S = 60  # Slurm may deliver --signal so much later than asked for, too


def run_in_job(plan: Plan) -> Outcome:
    """Run the plan on the nodes of this job, with restarts; requeue the job if it is to go on. ConfigError outside of
    a job."""
    allocation = current_allocation()
    origin = {"backend": "slurm", "job_id": allocation.job_id, "requeues": allocation.requeues}
    if allocation.requeues:
        _wait_for_earlier_start(Path(plan.run_dir), plan.config.launch.stop_grace_s)
    with _noted_signals() as noted, opened_run_directory(plan) as run_dir:
        driver = _Driver(plan.config, run_dir, allocation, noted)
        outcome = run_attempts(driver.attempt, run_dir, max_restarts=plan.config.launch.max_restarts, origin=origin)
        return driver.requeued(outcome)


def _wait_for_earlier_start(run_dir: Path, patience_s: float) -> None:
    """Until an earlier start of this job, on a node that Slurm has given up, has let go of the run."""
    deadline = time.monotonic() + patience_s
    while (working := owner(run_dir)) is not None and time.monotonic() < deadline:
        print(f"harness: waiting for {working}, which still works in {run_dir}", file=sys.stderr, flush=True)
        time.sleep(_OWNER_ASKED_EVERY_S)


class _Driver:
    def __init__(self, config: RunConfig, run_dir: Path, allocation: Allocation, noted: list[signal.Signals]) -> None:
        self.launch, self.slurm = config.launch, config.slurm or SlurmConfig()
        self.run_dir, self.allocation, self.noted = run_dir, allocation, noted
        self.watch = JobWatch(allocation, run_dir)
        self.is_requeue_wanted = False

    def attempt(self) -> Outcome:
        """One start of the ranks; its reason begins with what Slurm or somebody else did, if they did anything."""
        if self.noted:
            return self.explained(Outcome(ExitCode.INTERRUPTED, "stopped before the ranks were started"))
        self.watch = JobWatch(self.allocation, self.run_dir)
        with self.watch:
            outcome = self.start_ranks()
        return self.explained(outcome)

    def start_ranks(self) -> Outcome:
        python = "python" if self.slurm.container else sys.executable
        within = [*self.slurm.container, python]
        nodes = self.allocation.nodes(self.launch)
        if self.slurm.tasks == "device":
            return supervise_tasks(
                within, self.allocation, nodes, run_dir=self.run_dir, launch=self.launch, slurm=self.slurm
            )
        supervisor = [*within, "-m", "harness.launch.node"]
        ways = [
            Way([*step_on(host, self.slurm), *supervisor, str(number)], [number], has_environment=True)
            for number, host in enumerate(self.allocation.hosts)
        ]
        command = [python, "-m", "harness.training.rank", str(self.run_dir.absolute())]
        return supervise_nodes(ways, nodes, command, run_dir=self.run_dir, launch=self.launch, may_insist=False)

    def explained(self, outcome: Outcome) -> Outcome:
        """The outcome with its cause. What a lost node or Slurm itself has ended is not tried again in this job."""
        if outcome.exit_code not in (ExitCode.INTERRUPTED, ExitCode.OTHER):
            return outcome
        job = self.watch.job()
        if outcome.exit_code is ExitCode.INTERRUPTED:
            self.is_requeue_wanted = True
            return replace(outcome, reason=f"{self.cause(job)}: {outcome.reason}")
        if not self.watch.is_ours(job):
            state = "no longer known" if job is None else job.state
            return replace(outcome, reason=f"Slurm ({state}): {outcome.reason}", is_restartable=False)
        if lost := self.lost_nodes():
            self.is_requeue_wanted = True
            return replace(outcome, reason=f"node failure ({', '.join(lost)}): {outcome.reason}", is_restartable=False)
        return outcome

    def cause(self, job: Job | None) -> str:
        """Why the ranks were asked to stop."""
        if (self.run_dir / STOP_FILE).exists():
            return "harness stop"
        if self.watch.cause:
            return self.watch.cause
        if job is None or not self.watch.is_ours(job):
            return "Slurm does not know the job" if job is None else f"Slurm ({job.state})"
        if job.preempt_time is not None:
            return "preemption"
        left_s = float("inf") if job.end_time is None else job.end_time - time.time()
        if left_s <= self.slurm.signal_before_s + LIMIT_SLACK_S + _LIMIT_CHECKED_EVERY_S:
            return "time limit"
        return "signal"

    def lost_nodes(self) -> list[str]:
        """The nodes on which srun can start nothing now."""
        tried = [(host, _quiet([*step_on(host, self.slurm), "true"])) for host in self.allocation.hosts]
        deadline = time.monotonic() + _NODE_PATIENCE_S
        lost = []
        for host, process in tried:
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            if status:
                lost.append(host.name)
        return lost

    def requeued(self, outcome: Outcome) -> Outcome:
        """Put the job back into the queue if it is to go on and Slurm does not do so by itself."""
        if not self.is_requeue_wanted or (self.run_dir / STOP_FILE).exists():
            return outcome
        job = self.watch.job()
        if job is None or not self.watch.is_ours(job):
            return outcome
        if not (job.is_batch and job.may_requeue):
            return outcome
        outcome = replace(outcome, advice=f"job {job.job_id} goes back into the queue; {outcome.advice}")
        for number in SENT_TO_RANKS:
            signal.signal(number, signal.SIG_IGN)  # the job is ended now, and we have only to say why
        try:
            scheduler.requeue(job.job_id)
        except HarnessError as error:
            return replace(outcome, advice=f"Slurm does not requeue the job: {error.what}; submit it again")
        return outcome


def step_on(host: Host, slurm: SlurmConfig) -> list[str]:
    """The srun that starts one command on one node, beside whatever else runs there."""
    more = [word for line in slurm.srun_options for word in shlex.split(line)]
    return [*_COMMON, "--cpu-bind=none", *host.options(), *more]


@contextmanager
def _noted_signals() -> Iterator[list[signal.Signals]]:
    """Between attempts nobody listens: a stop signal then is noted, and there is no further attempt."""
    noted: list[signal.Signals] = []
    previous = {
        number: signal.signal(number, lambda number, _: noted.append(signal.Signals(number)))
        for number in SENT_TO_RANKS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def _quiet(command: Sequence[str]) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
