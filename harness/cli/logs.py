"""``harness logs``: why a run failed, or what one of its ranks prints."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cli.common import add_run_directory, existing_run_directory, positive, rank_of

HELP = (
    "Find the first error among all ranks of a run's last start and show it with its surroundings, or show the log\n"
    "of one rank."
)
EXAMPLE = "harness logs runs/enro --rank 3 --follow"

Record = dict[str, Any]
_POLL_S = 0.5
_SURROUNDINGS = 10  # lines before and after the error in the log


@dataclass(frozen=True)
class RankError:
    """What a rank wrote before it ended, at `time` (seconds since 1970); `is_echo`: because another rank was gone."""

    rank: int
    host: str
    time: float
    message: str
    step: int | None = None
    traceback: str = ""
    is_echo: bool = False

    @property
    def headline(self) -> str:
        step = "" if self.step is None else f", step {self.step:,}"
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"rank {self.rank} on {self.host}{step}, {at}: {self.message}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_directory(parser)
    parser.add_argument("--rank", type=rank_number, metavar="N", help="show the end of this rank's log instead")
    parser.add_argument("--lines", type=positive, default=40, metavar="N", help="lines of it (default 40)")
    parser.add_argument("--follow", action="store_true", help="with --rank: go on as it grows, until Ctrl-C")


def rank_number(text: str) -> int:
    """argparse type: a whole number from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a rank: 0, 1, ..., got {text}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    run_dir = existing_run_directory(args.run_dir)
    if args.rank is None:
        print(describe(run_dir))
    else:
        show_log(log_of(run_dir, args.rank), num_lines=args.lines, follow=args.follow)
    return 0


def describe(run_dir: Path) -> str:
    """How the run ended, the first error with its surroundings, its echoes, and what else there is to look at."""
    end, directory = last_end(run_dir), run_dir / "errors"
    errors = rank_errors(directory)
    if not errors and rank_errors(directory / "previous"):  # a start since then has put them there
        directory = directory / "previous"
        errors = rank_errors(directory)
    lines = [] if end is None else [f"{end['when']} exit code {end.get('exit_code')}: {end.get('reason')}"]
    if errors:
        first, *others = errors
        lines += [first.headline, *(f"  {line}" for line in first.traceback.splitlines())]
        lines += [] if first.traceback else _surroundings(run_dir, first.rank, first.message)
        lines += [f"then  {error.headline}" for error in others]
    elif end is not None and (blamed := re.search(r"\brank (\d+)\b", str(end.get("reason")))):
        lines += _surroundings(run_dir, int(blamed[1]))
    stacks = sorted(directory.glob("rank-*.stack"), key=rank_of)
    lines += [f"where rank {rank_of(path)} stood when it was killed: {path}" for path in stacks]
    return "\n".join(lines) if lines else f"no rank of {run_dir} has left an error; its logs are in {run_dir / 'logs'}"


def last_end(run_dir: Path) -> Record | None:
    """The last end that was no success, as launches.jsonl has it (nothing else may be known of ranks that were killed),
    with `when` in words; None if there is none."""
    from harness.launch.restarts import read_launches

    records = read_launches(run_dir)
    ends = [record for record in records if record.get("event") == "end" and record.get("exit_code") != 0]
    if not ends:
        return None
    return {**ends[-1], "when": "the run ended with" if records[-1] is ends[-1] else "an earlier start ended with"}


def rank_errors(directory: Path) -> list[RankError]:
    """The errors that ranks recorded in `errors/`, the cause first and its echoes last."""
    from harness.errors import ExitCode
    from harness.launch.failures import PEER_LOST

    found = []
    for path in directory.glob("rank-*.json"):
        record = _object(path)
        if not record or record.get("exit_code") in (ExitCode.DONE, ExitCode.INTERRUPTED):
            continue
        found.append(
            RankError(
                rank=rank_of(path),
                host=record.get("host", "?"),
                time=record.get("time", 0.0),
                message=record.get("message", "no message"),
                step=record.get("step"),
                traceback=record.get("traceback", "").rstrip(),
                is_echo=record.get("kind") == PEER_LOST,
            )
        )
    return sorted(found, key=lambda error: (error.is_echo, error.time))


def log_of(run_dir: Path, rank: int) -> Path:
    """The log of a rank. Raises ConfigError."""
    from harness.errors import ConfigError

    path = run_dir / "logs" / f"rank-{rank}.log"
    if not path.is_file():
        ranks = sorted(rank_of(log) for log in path.parent.glob("rank-*.log"))
        hint = f"there are logs of ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank has been started"
        raise ConfigError(f"rank {rank} has no log", where=str(path), hint=hint)
    return path


def show_log(path: Path, *, num_lines: int, follow: bool) -> None:
    """Print the last lines of a log, and with `follow` what is added to it until the user interrupts."""
    with path.open(encoding="utf-8", errors="replace") as log, suppress(KeyboardInterrupt):
        print("".join(deque(log, num_lines)), end="", flush=True)
        while follow:
            print(log.read(), end="", flush=True)
            time.sleep(_POLL_S)


def _surroundings(run_dir: Path, rank: int, message: str = "") -> list[str]:
    """The lines of the rank's log around the last place that has the message, else its last lines."""
    path = run_dir / "logs" / f"rank-{rank}.log"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    sought = message.partition("\n")[0] or None
    last = next((number for number in reversed(range(len(lines))) if sought and sought in lines[number]), len(lines))
    shown = lines[max(0, last - _SURROUNDINGS) : last + _SURROUNDINGS + 1]
    return [f"in {path}:", *(f"  {line}" for line in shown)]


def _object(path: Path) -> Record:
    """A JSON object; empty if a full disk cut it short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
