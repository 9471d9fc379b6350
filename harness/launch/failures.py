"""How a run ended: which rank failed first, why, and what the user is told."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import ExitCode
from harness.io.atomic import write_text

PEER_LOST = "peer"  # `kind` of an error record: this rank failed only because another one was gone
_HEAD_START_S = 1.0  # peers feel a lost connection a little before the kernel reports the death behind it
_TAIL_LINES = 15


@dataclass(frozen=True)
class RankEnd:
    """A rank that has ended; `status` as in `Popen.returncode`, `time` in seconds since the epoch."""

    rank: int
    status: int
    time: float
    is_killed_by_us: bool = False


@dataclass(frozen=True)
class Failure:
    """What the user is told of one rank's failure; `details` is a traceback or the rank's last lines."""

    exit_code: ExitCode
    what: str
    time: float
    details: str = ""
    is_echo: bool = False
    is_restartable: bool = False


@dataclass(frozen=True)
class NodeEnd:
    """How the ranks of one machine ended."""

    failure: Failure | None  # the first one
    is_interrupted: bool = False  # a rank stopped on request and has saved
    is_killed: bool = False  # ranks that did not end by themselves
    is_requested: bool = False  # it was asked to stop


@dataclass(frozen=True)
class Outcome:
    """How one start of a run ended; `is_restartable`: something broke that may not break again."""

    exit_code: ExitCode
    reason: str = ""
    details: str = ""  # several lines of where and how, shown before the reason
    advice: str = ""
    is_restartable: bool = False

    @property
    def message(self) -> str:
        """What the user is told: nothing when the run is done."""
        kind = "harness" if self.exit_code is ExitCode.INTERRUPTED else "error"
        lines = [self.details, f"{kind}: {self.reason}", f"  -> {self.advice}"]
        return "\n".join(line for line in lines if line) if self.reason else ""

    def report(self) -> ExitCode:
        """Tell the user; gives the exit code."""
        if self.message:
            print(self.message, file=sys.stderr, flush=True)
        return self.exit_code


def outcome(ends: Sequence[NodeEnd], run_dir: Path, *, num_ranks: int) -> Outcome:
    """Of all machines of a run: the first failure decides."""
    is_requested = any(end.is_requested for end in ends)
    found = [end.failure for end in ends if end.failure is not None]
    if found:
        first = min(found, key=_order)
        others = "the other ranks were stopped; " if num_ranks > 1 else ""
        what_next = others + advice(run_dir, first.exit_code)
        return Outcome(first.exit_code, first.what, first.details, what_next, first.is_restartable and not is_requested)
    if any(end.is_killed for end in ends):
        why = "stopped before the save was done" if is_requested else "some ranks did not end"
        what_next = advice(run_dir, ExitCode.OTHER)
        return Outcome(ExitCode.OTHER, why, advice=what_next, is_restartable=not is_requested)
    if any(end.is_interrupted for end in ends):
        what_next = advice(run_dir, ExitCode.INTERRUPTED)
        return Outcome(ExitCode.INTERRUPTED, "stopped on request, saved", advice=what_next)
    return Outcome(ExitCode.DONE)


def set_aside_records(run_dir: Path, ranks: Iterable[int]) -> None:
    """What these ranks have left in `errors` at their last start goes to `errors/previous`."""
    previous = run_dir / "errors" / "previous"
    for rank in ranks:
        for name in (f"rank-{rank}.json", f"rank-{rank}.stack"):
            (previous / name).unlink(missing_ok=True)
            if (run_dir / "errors" / name).exists():
                previous.mkdir(exist_ok=True)
                (run_dir / "errors" / name).rename(previous / name)


def write_stacks(run_dir: Path, stacks: Mapping[int, str]) -> None:
    """Where ranks were when they were killed, as `errors/rank-N.stack`; a full disk is no reason to keep them alive."""
    with suppress(OSError):
        for rank, stack in stacks.items():
            if stack:
                write_text(run_dir / "errors" / f"rank-{rank}.stack", stack)


def main_stack(stacks: str) -> str:
    """The main thread's part of what faulthandler has written: it comes last."""
    lines = stacks.rstrip().rpartition("\n\n")[2].splitlines()
    return "\n".join(lines[:_TAIL_LINES])


def first_failure(
    ends: Iterable[RankEnd], run_dir: Path, *, requested: signal.Signals | None, late: Failure | None = None
) -> Failure | None:
    """The failure that caused the others, or None when every rank ended with 0 or 75.

    Ranks write `errors/rank-N.json`; a rank without one (killed, crashed) is judged by how and when it ended. A rank
    that dies of the stop signal `requested` had not begun to train: that is an interruption, not a failure. `late` is
    the failure of a rank that was killed because it gave no sign of life.
    """
    failures = [] if late is None else [late]
    for end in ends:
        failure = _recorded_failure(end, run_dir)
        if failure is None and not end.is_killed_by_us and end.status not in (ExitCode.DONE, ExitCode.INTERRUPTED):
            failure = _unrecorded_failure(end, run_dir, requested)
        if failure is not None:
            failures.append(failure)
    return min(failures, key=_order, default=None)


def describe_end(end: RankEnd) -> str:
    if end.status >= 0:
        return f"rank {end.rank} ended with exit code {end.status}"
    return f"rank {end.rank} was killed by {_signal_name(-end.status)}"


def last_step(run_dir: Path) -> int | None:
    """The last optimizer step in metrics.jsonl; a torn last line is skipped."""
    for line in reversed(_tail(run_dir / "metrics.jsonl")):
        record = _parse_object(line)
        if record.get("event") == "step" and isinstance(record.get("step"), int):
            return int(record["step"])
    return None


def newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest committed checkpoint: one that has a manifest."""
    names = [path.parent.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*/manifest.json")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def advice(run_dir: Path, exit_code: ExitCode) -> str:
    """What to do next: mend the cause, or only start again."""
    checkpoint = newest_checkpoint(run_dir)
    resume = "starts from the beginning" if checkpoint is None else f"resumes from the checkpoint of step {checkpoint}"
    if exit_code in (ExitCode.OTHER, ExitCode.INTERRUPTED):
        return f"run the same command again: it {resume}"
    return f"mend this, then run the same command again: it {resume}"


def _order(failure: Failure) -> tuple[bool, float]:
    return failure.is_echo, failure.time


def _recorded_failure(end: RankEnd, run_dir: Path) -> Failure | None:
    record = _read_record(run_dir / "errors" / f"rank-{end.rank}.json")
    exit_code = _exit_code(record.get("exit_code"))
    if not record or exit_code in (ExitCode.DONE, ExitCode.INTERRUPTED):
        return None
    step, time, is_echo = record.get("step"), record.get("time"), record.get("kind") == PEER_LOST
    where = f"rank {end.rank}" if step is None else f"rank {end.rank} after step {step}"
    return Failure(
        exit_code=exit_code,
        what=f"{where}: {record.get('message', 'no message')}",
        time=float(time) if isinstance(time, int | float) else end.time,
        details="" if end.rank == 0 else str(record.get("traceback") or "").rstrip(),  # rank 0's is on the terminal
        is_echo=is_echo,
        is_restartable=exit_code is ExitCode.OTHER and (is_echo or step is not None),  # not a fault of the start
    )


def _unrecorded_failure(end: RankEnd, run_dir: Path, requested: signal.Signals | None) -> Failure:
    if requested is not None and end.status == -requested:
        return Failure(ExitCode.INTERRUPTED, f"stopped by {requested.name} while starting", end.time)
    step, details = last_step(run_dir), ""
    what = describe_end(end) + (" before the first step" if step is None else f" after step {step}")
    if end.status == -signal.SIGKILL:
        what += " (a common reason is that the machine ran out of memory: see the kernel log)"
    else:
        log = run_dir / "logs" / f"rank-{end.rank}.log"
        details = "\n".join([f"last lines of {log}:", *_tail(log)[-_TAIL_LINES:]])
    is_sudden = end.status < 0 and end.status != -signal.SIGABRT  # aborts are often the echo of a lost peer
    time = end.time - (_HEAD_START_S if is_sudden else 0.0)
    return Failure(_exit_code(end.status), what, time, details, is_restartable=end.status < 0)


def _exit_code(value: Any) -> ExitCode:
    return ExitCode(value) if value in set(ExitCode) else ExitCode.OTHER


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return _parse_object(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _tail(path: Path, num_bytes: int = 65536) -> Sequence[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - num_bytes))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
