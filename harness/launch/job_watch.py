"""What Slurm will do with this job: how long it still has, and whether it is still ours."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from harness.errors import HarnessError
from harness.launch import scheduler
from harness.launch.allocation import Allocation
from harness.launch.scheduler import Job

_ASK_EVERY_S = 30.0
_PATIENCE_S = 120.0  # the controller may be starting anew
_TAIL_BYTES = 1 << 20
_SAVES_LOOKED_AT = 5
_SAFETY = 1.5
_MARGIN_S = 60.0  # to end the step, and for a limit that Slurm enforces early


class JobWatch:
    """A thread that asks Slurm now and then, and sends this process SIGUSR2 when what is left of the job is only just
    enough to save, SIGTERM when the job is no longer ours (on a node that has lost its slurmd nobody else says so)."""

    def __init__(self, allocation: Allocation, run_dir: Path) -> None:
        self.cause = ""  # of the signal, once one was sent
        self._allocation, self._run_dir = allocation, run_dir
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="job watch")

    def __enter__(self) -> JobWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(_ASK_EVERY_S)

    def job(self) -> Job | None:
        """This job as Slurm sees it now; None if it does not know it, or does not answer for minutes."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._ask()
            except HarnessError:
                if time.monotonic() > deadline:
                    return None
                time.sleep(5.0)

    def is_ours(self, job: Job | None) -> bool:
        """Whether Slurm still holds this start of the job for running."""
        return job is not None and job.state == "RUNNING" and job.restarts == self._allocation.requeues

    def _ask(self) -> Job | None:
        found = scheduler.find_jobs(self._allocation.job_id)
        return next((job for job in found if job.job_id == self._allocation.job_id), None)

    def _watch(self) -> None:
        wait_s = _ASK_EVERY_S
        while not self._is_over.wait(wait_s):
            with suppress(HarnessError):
                job = self._ask()
                if not self.is_ours(job):
                    state = "unknown" if job is None else job.state
                    self._send(signal.SIGTERM, f"Slurm has taken the job back ({state})")
                    return
                left_s = float("inf") if job is None or job.end_time is None else job.end_time - time.time()
                spare_s = left_s - saving_time(self._run_dir)
                if spare_s <= 0:
                    self._send(signal.SIGUSR2, "time limit")
                    return
                wait_s = min(_ASK_EVERY_S, spare_s)

    def _send(self, number: signal.Signals, cause: str) -> None:
        self.cause = cause
        os.kill(os.getpid(), number)


def saving_time(run_dir: Path) -> float:
    """Seconds to leave for a last save: from the longest of the recent ones, 0 if none was measured."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    saves = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            if record["event"] == "checkpoint":
                saves.append(float(record["seconds"]))
    return max(saves[-_SAVES_LOOKED_AT:]) * _SAFETY + _MARGIN_S if saves else 0.0
