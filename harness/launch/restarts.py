"""Starts a run again when something broke that may not break again, and keeps a record of all its starts.

<run_dir>/launches.jsonl has a `start` and an `end` of each: time, newest checkpoint, who started it, how it ended.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.errors import ExitCode
from harness.launch.failures import Outcome, newest_checkpoint

LAUNCHES_FILE = "launches.jsonl"
Record = dict[str, Any]


def run_attempts(
    attempt: Callable[[], Outcome], run_dir: Path, *, max_restarts: int, origin: Mapping[str, Any]
) -> Outcome:
    """Call `attempt` until the run is done, is interrupted, must be mended by the user, or has used up its restarts.

    `max_restarts` starts in a row may come to no newer checkpoint than the start before; a newer one refills that.
    `origin` is recorded with each start. If it has the `job_id` and the number of `requeues` of a batch job, its
    earlier starts count too: they were made by the batch system, nobody has looked at them.
    """
    launches = read_launches(run_dir)
    number = _number_in_row(launches, newest_checkpoint(run_dir), origin)
    if number > max_restarts:
        return _refused(launches, max_restarts)
    while True:
        before = newest_checkpoint(run_dir)
        host = socket.gethostname()
        _append(run_dir, event="start", time=time.time(), step=before, restart=number, host=host, **origin)
        outcome = attempt()
        after = newest_checkpoint(run_dir)
        exit_code, reason = int(outcome.exit_code), outcome.reason
        _append(run_dir, event="end", time=time.time(), step=after, exit_code=exit_code, reason=reason)
        if not outcome.is_restartable or max_restarts == 0:
            return outcome
        number = 1 if _is_newer(after, before) else number + 1
        if number > max_restarts:
            return replace(outcome, advice=f"{_in_vain(max_restarts)}; {outcome.advice}")
        where = "from the beginning" if after is None else f"from the checkpoint of step {after}"
        replace(outcome, advice=f"starting again {where}: restart {number} of {max_restarts}").report()


def read_launches(run_dir: Path) -> list[Record]:
    """The records of launches.jsonl; a line that a crash cut short is passed over."""
    try:
        lines = (run_dir / LAUNCHES_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            if isinstance(record := json.loads(line), dict):
                found.append(record)
    return found


def _number_in_row(launches: Sequence[Record], step: int | None, origin: Mapping[str, Any]) -> int:
    """How many starts before this one, by the same batch job, have come to no checkpoint newer than that of `step`."""
    last = next((record for record in reversed(launches) if record.get("event") == "start"), None)
    if last is None or origin.get("job_id") is None or last.get("job_id") != origin["job_id"]:
        return 0
    is_requeued = origin.get("requeues", 0) > last.get("requeues", 0)
    return last.get("restart", 0) + 1 if is_requeued and not _is_newer(step, last.get("step")) else 0


def _is_newer(step: int | None, other: int | None) -> bool:
    return step is not None and (other is None or step > other)


def _refused(launches: Sequence[Record], max_restarts: int) -> Outcome:
    last = next((record.get("reason") for record in reversed(launches) if record.get("event") == "end"), None)
    reason = f"not started again: {_in_vain(max_restarts)}"
    return Outcome(
        ExitCode.OTHER,
        f"{reason} (the last one: {last})" if last else reason,
        advice="mend the cause, then submit the job anew: that is a fresh start with all its restarts",
    )


def _in_vain(max_restarts: int) -> str:
    return f"{max_restarts} restarts in a row (launch.max_restarts) have come to no newer checkpoint"


def _append(run_dir: Path, **record: Any) -> None:
    """On a line of its own, even after one that was cut short; a full disk does not hold the run up."""
    with suppress(OSError), (run_dir / LAUNCHES_FILE).open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        separator = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(separator + json.dumps(record).encode() + b"\n")
