"""``harness status``: what a run is doing, from its files."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.cli.common import add_run_directory, existing_run_directory

HELP = (
    "Show whether a run is alive, its Slurm job, step, loss, scores, next checkpoint and remaining time, the last\n"
    "sign of life of its ranks, and its restarts."
)
EXAMPLE = "harness status runs/enro"

Record = dict[str, Any]
_STEPS_FOR_SPEED = 100
_MOST_RANKS_SHOWN = 8
_BOOKKEEPING = ("event", "step", "time_s", "set", "signature", "sentences", "decode_seconds")


@dataclass(frozen=True)
class Status:
    """A run at this moment; times in seconds, None where the end or the speed is not known.

    `pulses`: the last sign of life of each rank that works now, the oldest first; `starts`: how often the run has been
    started, `last_end`: how the last start that is over ended.
    """

    state: str
    job: str | None = None
    step: int = 0
    steps: int | None = None
    last_step: Record | None = None
    evaluations: list[Record] = field(default_factory=list)
    checkpoint_step: int | None = None
    next_checkpoint_step: int | None = None
    next_checkpoint_s: float | None = None
    remaining_s: float | None = None
    pulses: list[Record] = field(default_factory=list)
    starts: int = 0
    last_end: Record | None = None


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
    from harness.launch.restarts import read_launches
    from harness.launch.run_directory import owner
    from harness.training.metrics_file import read_metrics

    config = read_json(run_dir / "plan.json").get("config", {})
    steps = config.get("schedule", {}).get("steps")
    recent: deque[Record] = deque(maxlen=_STEPS_FOR_SPEED)
    evaluations: list[Record] = []
    checkpoint: int | None = None
    ended: Record = {}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        event = record.get("event")
        if event in ("start", "restart"):
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
    seconds = _seconds_per_step(recent) if working else None
    next_checkpoint = _next_checkpoint(step, steps, config) if working else None
    launches = read_launches(run_dir)
    ends = [record for record in launches if record.get("event") == "end"]
    return Status(
        state=_state(run_dir, working, ended),
        job=_job(run_dir),
        step=step,
        steps=steps,
        last_step=last,
        evaluations=evaluations,
        checkpoint_step=checkpoint,
        next_checkpoint_step=next_checkpoint,
        next_checkpoint_s=None if next_checkpoint is None or seconds is None else seconds * (next_checkpoint - step),
        remaining_s=None if steps is None or seconds is None else seconds * max(0, steps - step),
        pulses=_pulses(run_dir) if working else [],
        starts=sum(record.get("event") == "start" for record in launches),
        last_end=ends[-1] if ends else None,
    )


def describe(run_dir: Path, status: Status) -> str:
    """The text of ``harness status``."""
    of_steps = f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else ""
    lines = [f"run         {run_dir}", f"state       {status.state}"]
    lines += [f"job         {status.job}"] if status.job else []
    lines.append(f"step        {status.step:,}{of_steps}")
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
    if status.next_checkpoint_step is not None:
        when = "" if status.next_checkpoint_s is None else f", in about {_shown_time(status.next_checkpoint_s)}"
        lines.append(f"next        checkpoint at step {status.next_checkpoint_step:,}{when}")
    lines += _shown_pulses(status.pulses)
    if status.starts > 1 or status.last_end:
        end = status.last_end or {}
        lines.append(f"starts      {status.starts}; the last end: {end.get('reason', 'not recorded')}")
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


def _job(run_dir: Path) -> str | None:
    """What Slurm says of the newest job of the run, None if there is none or no Slurm here."""
    from harness.errors import HarnessError
    from harness.launch import scheduler
    from harness.launch.submission import submitted_jobs

    numbers = [record["job_id"] for record in submitted_jobs(run_dir) if record["kind"] == "training"]
    if not numbers or shutil.which("scontrol") is None:
        return None
    try:
        jobs = scheduler.find_jobs(numbers[-1])
    except HarnessError as error:
        return f"{numbers[-1]}: {error.what}"
    if not jobs:
        return f"{numbers[-1]} is over: Slurm no longer knows it"
    job = jobs[-1]
    text = f"{job.job_id} is {job.state}" + (f" ({job.reason})" if job.reason != "None" else "")
    text += f" on {job.nodes}" if job.nodes else ""
    text += f", requeued {job.restarts} times" if job.restarts else ""
    if job.state == "RUNNING" and job.end_time is not None:
        text += f", time limit in {_shown_time(max(0.0, job.end_time - time.time()))}"
    return text


def _seconds_per_step(recent: deque[Record]) -> float | None:
    if len(recent) < 2:
        return None
    done = recent[-1]["step"] - recent[0]["step"]
    return (recent[-1]["time_s"] - recent[0]["time_s"]) / done if done > 0 else None


def _next_checkpoint(step: int, steps: int | None, config: Record) -> int | None:
    """The step of the next planned save: the next multiple of `checkpoint.every_steps`, at the latest the last step."""
    every = config.get("checkpoint", {}).get("every_steps")
    planned = (step // every + 1) * every if every else None
    return min((number for number in (planned, steps) if number is not None and number > step), default=None)


def _pulses(run_dir: Path) -> list[Record]:
    """`rank`, `host`, `phase`, `step` and `age_s` of each rank's last sign of life, the oldest first."""
    from harness.io.atomic import read_json

    path = run_dir / "pulses.json"
    if not path.is_file():
        return []
    content = read_json(path)
    passed = max(0.0, time.time() - content["time"])
    ranks = [{"rank": int(rank), **pulse, "age_s": pulse["age_s"] + passed} for rank, pulse in content["ranks"].items()]
    return sorted(ranks, key=lambda pulse: -pulse["age_s"])


def _shown_pulses(pulses: list[Record]) -> list[str]:
    lines = [
        f"rank {pulse['rank']:<6} alive {_shown_time(pulse['age_s'])} ago on {pulse['host']}: {pulse['phase']}"
        + (f" after step {pulse['step']:,}" if pulse["step"] else "")
        for pulse in pulses[:_MOST_RANKS_SHOWN]
    ]
    if len(pulses) > _MOST_RANKS_SHOWN:
        lines.append(f"            and {len(pulses) - _MOST_RANKS_SHOWN} ranks with a newer sign of life")
    return lines


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
