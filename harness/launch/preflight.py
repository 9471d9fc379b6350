"""What can be said of a job before it queues, on the machine that submits it."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness.config.launch_rules import LIMIT_SLACK_S, seconds_of
from harness.config.schema import RunConfig
from harness.errors import HarnessError
from harness.launch import scheduler
from harness.launch.submission import Submission
from harness.plan.advice import shown_bytes
from harness.plan.plan import Plan

_FASTEST_FLOPS = {"GPU": 2.5e15, "CPU": 1e13}  # of one rank, dense; no device of 2026 is faster
_STEPS_FOR_SPEED = 100
_ADVICE = {  # a sign in what sbatch says, in small letters -> what to change
    "partition": "set slurm.partition to one of `sinfo -o '%P %l %D %G'` that you may use",
    "account": "set slurm.account to one of `sacctmgr show associations user=$USER`",
    "qos": "set slurm.qos to one of `sacctmgr show associations user=$USER format=account,qos`",
    "time limit": "lower slurm.time to what the partition allows: sinfo -o '%P %l'",
    "feature": "set slurm.constraint to features that nodes have: sinfo -o '%N %f'",
    "reservation": "set slurm.reservation to one of `scontrol show reservation`",
    "node configuration": "lower slurm.gpus_per_node, cpus_per_node or memory: see sinfo -o '%N %G %c %m'",
    "node count": "lower slurm.nodes to what the partition has: sinfo -o '%P %D'",
}


class Finding(NamedTuple):
    """One line of the report: what is right, or what is wrong and, as `change`, what to do about it."""

    text: str
    change: str = ""

    @property
    def is_problem(self) -> bool:
        return bool(self.change)


def preflight(submission: Submission, records: list[dict[str, Any]]) -> Iterator[Finding]:
    """Findings on a checked submission; `records`: metrics.jsonl of what the run has done so far."""
    plan = submission.plans[0]
    yield Finding(f"the run file is right, for {plan.world_size} ranks")
    for kind, script in (("training", submission.training), ("evaluation", submission.evaluation)):
        if script is not None:
            yield _accepted(kind, script)
    yield from _files(plan.config)
    yield _writable(Path(plan.config.output_dir))
    yield from _room(plan)
    yield from time_limit(plan, *measured_times(records))


def measured_times(records: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """(seconds of a step, the median of the last ones; seconds of the longest save) of a run's records, None where
    there are none."""
    steps = [record for record in records if record.get("event") == "step"][-_STEPS_FOR_SPEED:]
    seconds = [
        after["time_s"] - before["time_s"]
        for before, after in itertools.pairwise(steps)
        if after["step"] == before["step"] + 1
    ]
    saves = [record["seconds"] for record in records if record.get("event") == "checkpoint"]
    return statistics.median(seconds) if seconds else None, max(saves, default=None)


def time_limit(
    plan: Plan, step_s: float | None, save_s: float | None, *, is_same_run: bool = True
) -> Iterator[Finding]:
    """Is a checkpoint reached within one start of the job, and does the signal leave time to save?

    Without a measured `step_s` the step is given the time that its arithmetic takes on the fastest device, which is
    too short; so is the step of a narrow model (`is_same_run=False`). What is found too long is too long for certain.
    """
    slurm, every = plan.config.slurm, plan.config.checkpoint.every_steps
    assert slurm is not None
    at_work_s = seconds_of(slurm.time) - slurm.signal_before_s - LIMIT_SLACK_S
    if save_s is not None and is_same_run and save_s > slurm.signal_before_s:
        what = f"saving has taken {save_s:.0f} s, and the job is told {slurm.signal_before_s} s before its limit"
        yield Finding(what, f"raise slurm.signal_before_s above {save_s:.0f}")
    how = "as measured in this run" if is_same_run else "as the narrow model of this rehearsal took"
    is_bound = step_s is None
    if is_bound:
        step_s, how = _fastest_step_s(plan), "if the arithmetic alone counted, on the fastest device there is"
    if every is None:
        lost = "up to a whole start of the job"
        yield Finding(f"checkpoint.every_steps is not set: a stop is saved when it is announced, a crash costs {lost}")
    elif step_s is not None and every * step_s > at_work_s:
        what = f"no checkpoint within one start of the job: {every:,} steps take {_shown(every * step_s)} ({how})"
        fitting = max(1, int(at_work_s / step_s / 4))
        change = f"lower checkpoint.every_steps to {fitting:,} or raise slurm.time above {slurm.time}"
        yield Finding(f"{what}, and {_shown(at_work_s)} are left before the signal", change)
    elif step_s is not None and is_bound:
        yield Finding(
            f"by the arithmetic of its steps a checkpoint fits into {slurm.time}; their speed is not known yet"
        )
    elif step_s is not None:
        yield Finding(f"a checkpoint every {_shown(every * step_s)} or more ({how}), within a limit of {slurm.time}")


def _fastest_step_s(plan: Plan) -> float | None:
    """No step is faster: two passes over all parameters, a third over those that are trained, 2 FLOP each a token."""
    if plan.num_parameters is None or plan.num_trained is None:
        return None
    slurm = plan.config.slurm
    device = "GPU" if slurm is not None and slurm.gpus_per_node is not None else "CPU"
    flop = (4 * plan.num_parameters + 2 * plan.num_trained) * plan.batches.tokens_per_step
    return flop / (_FASTEST_FLOPS[device] * plan.world_size)


def _accepted(kind: str, script: str) -> Finding:
    try:
        return Finding(f"Slurm would take the {kind} job: {scheduler.test_only(script)}")
    except HarnessError as error:
        known = (change for sign, change in _ADVICE.items() if sign in error.what.lower())
        change = next(known, error.hint or "ask Slurm again, or those who run it")
        return Finding(f"Slurm would not take the {kind} job: {error.what}", change)


def input_files(config: RunConfig) -> list[Path]:
    """Every file and directory that the run reads, absolute; a model of the hub is none."""
    from harness.data.sources import as_source, source_files

    data = config.data
    sources = [*data.train, *(as_source(source) for source in (data.validation, data.test) if source is not None)]
    files = [path for source in sources for path in source_files(source)]
    model = Path(config.model.path or config.model.config or "").expanduser()
    if model.is_dir() or model.is_absolute():
        files.append(model)
    if config.slurm is not None and config.slurm.evaluation is not None and config.slurm.evaluation.data is not None:
        files.append(Path(config.slurm.evaluation.data))
    return list(dict.fromkeys(path.absolute() for path in files))


def _files(config: RunConfig) -> Iterator[Finding]:
    files = input_files(config)
    missing = [path for path in files if not os.access(path, os.R_OK)]
    for path in missing:
        why = "cannot be read" if path.exists() else "is not there"
        yield Finding(f"{path} {why} on this machine", "mend the path in the run file, or the rights of the file")
    if not missing:
        yield Finding(f"{len(files)} data and model files are here")


def _writable(directory: Path) -> Finding:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        token = directory / f".harness-rehearse-{os.getpid()}"
        token.touch()
        token.unlink()
    except OSError as error:
        return Finding(
            f"output_dir {directory} cannot be written: {error.strerror}", "name another output_dir, or mend its rights"
        )
    return Finding(f"output_dir {directory} can be written")


def _room(plan: Plan) -> Iterator[Finding]:
    directory, options = Path(plan.config.output_dir), plan.config.checkpoint
    if plan.checkpoint_bytes is None or not directory.is_dir():
        return
    count = options.keep_last + options.keep_best + 1  # one is written before one is deleted
    needed, free = count * plan.checkpoint_bytes, shutil.disk_usage(directory).free
    what = f"{count} checkpoints of {shown_bytes(plan.checkpoint_bytes)} need {shown_bytes(needed)}"
    if needed > free:
        change = "free some, name another output_dir, or lower checkpoint.keep_last and keep_best"
        yield Finding(f"{what}, and {directory} has {shown_bytes(free)}", change)
    else:
        yield Finding(f"{what} of {shown_bytes(free)} that are free")


def _shown(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
