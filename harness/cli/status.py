"""``harness status``: what a run is doing, from its files."""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.cli.common import add_run_directory, existing_run_directory

HELP = "Show the step, loss, scores and remaining time of a run, and whether it is alive."
EXAMPLE = "harness status runs/enro"

Record = dict[str, Any]
_STEPS_FOR_SPEED = 100
_SHOWN = ("loss", "nll", "learning_rate", "grad_norm")
_BOOKKEEPING = ("event", "step", "time_s", "set", "signature", "sentences", "decode_seconds")


@dataclass(frozen=True)
class Status:
    """A run at this moment; ``remaining_s`` is None when the end or the speed is not known."""

    state: str
    step: int = 0
    steps: int | None = None
    last_step: Record | None = None
    evaluations: list[Record] = field(default_factory=list)
    checkpoint_step: int | None = None
    remaining_s: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_directory(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    status = read_status(existing_run_directory(args.run_dir))
    print(json.dumps(asdict(status), indent=2) if args.json else describe(args.run_dir, status))
    return 0


def read_status(run_dir: Path) -> Status:
    """The state of the run in ``run_dir``. Raises DataError if its plan cannot be read."""
    from harness.io.atomic import read_json
    from harness.launch.run_directory import owner

    steps = read_json(run_dir / "plan.json").get("config", {}).get("schedule", {}).get("steps")
    recent: deque[Record] = deque(maxlen=_STEPS_FOR_SPEED)
    evaluations: list[Record] = []
    checkpoint: int | None = None
    ended: Record = {}
    for record in read_records(run_dir / "metrics.jsonl"):
        event = record.get("event")
        if event == "start":
            recent.clear()
            ended = {}
        elif event == "step":
            recent.append(record)
        elif event == "evaluation":
            evaluations.append(record)
        elif event == "checkpoint":
            checkpoint = record["step"]
        elif event == "stop":
            ended = record
    last = recent[-1] if recent else None
    step = last["step"] if last else max(checkpoint or 0, ended.get("step", 0))
    working = owner(run_dir)
    return Status(
        state=_state(run_dir, working, ended),
        step=step,
        steps=steps,
        last_step=last,
        evaluations=evaluations,
        checkpoint_step=checkpoint,
        remaining_s=_remaining_s(recent, steps) if working else None,
    )


def read_records(path: Path) -> Iterable[Record]:
    """The records of metrics.jsonl; a line that a crash cut short is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def describe(run_dir: Path, status: Status) -> str:
    """The text of ``harness status``."""
    of_steps = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    lines = [f"run         {run_dir}", f"state       {status.state}", f"step        {status.step:,}{of_steps}"]
    if status.last_step:
        record = status.last_step
        shown = [
            f"{name} {record[name]:.4g}" for name in ("loss", "nll", "learning_rate", "grad_norm") if name in record
        ]
        lines.append(f"last step   {', '.join(shown)}")
        if "tokens_per_second" in record:
            lines.append(f"speed       {record['tokens_per_second']:,.0f} target tokens per second")
    if status.remaining_s is not None:
        lines.append(f"remaining   about {_shown_time(status.remaining_s)}")
    if status.checkpoint_step is not None:
        lines.append(f"checkpoint  step {status.checkpoint_step:,}")
    lines += [f"scores      step {record['step']:,}, {_shown_scores(record)}" for record in status.evaluations]
    return "\n".join(lines)


def _state(run_dir: Path, working: str | None, ended: Record) -> str:
    if working:
        return f"running: {working}" + (", asked to stop" if (run_dir / "stop").exists() else "")
    if (run_dir / "summary.json").is_file():
        return "finished"
    if ended:
        return f"stopped: {ended.get('reason', 'no reason recorded')}"
    return "not running: start it again with the same command"


def _remaining_s(recent: deque[Record], steps: int | None) -> float | None:
    if steps is None or len(recent) < 2:
        return None
    done = recent[-1]["step"] - recent[0]["step"]
    seconds = recent[-1]["time_s"] - recent[0]["time_s"]
    return max(0, steps - recent[-1]["step"]) * seconds / done if done > 0 else None


def _shown_scores(record: Record) -> str:
    scores = (
        f"{name} {value:.4g}"
        for name, value in record.items()
        if name not in _BOOKKEEPING and isinstance(value, int | float)
    )
    return f"{record.get('set', 'evaluation')}: {', '.join(scores)}"


def _shown_time(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
