"""Contradictions within `launch` and `slurm`, and what would break the job that is made of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from math import prod

from harness.config.deepspeed import Problem
from harness.config.launch_schema import SlurmConfig
from harness.config.schema import RunConfig

LIMIT_SLACK_S = 60  # Slurm may send the signal before a time limit so much too early
_HOST_KEYS = ("hostfile", "include", "exclude")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_ARRAY = 1001  # Slurm's default MaxArraySize
# sbatch options that are written from keys, or that stopping and requeueing rest on.
_KEY_OF_OPTION = {
    **dict.fromkeys(("--nodes", "-N"), "slurm.nodes"),
    **dict.fromkeys(("--gpus-per-node", "--gpus", "-G", "--gres", "--gpus-per-task"), "slurm.gpus_per_node"),
    **dict.fromkeys(("--cpus-per-task", "-c"), "slurm.cpus_per_node"),
    **dict.fromkeys(("--mem", "--mem-per-cpu", "--mem-per-gpu"), "slurm.memory"),
    **dict.fromkeys(("--time", "-t"), "slurm.time"),
    **dict.fromkeys(("--account", "-A"), "slurm.account"),
    **dict.fromkeys(("--partition", "-p"), "slurm.partition"),
    **dict.fromkeys(("--qos", "-q"), "slurm.qos"),
    **dict.fromkeys(("--constraint", "-C"), "slurm.constraint"),
    "--reservation": "slurm.reservation",
    **dict.fromkeys(("--ntasks", "-n", "--ntasks-per-node"), "slurm.tasks"),
    **dict.fromkeys(("--array", "-a"), "slurm.sweep"),
    "--signal": "slurm.signal_before_s",
    **dict.fromkeys(("--job-name", "-J"), "name"),
    **dict.fromkeys(("--output", "-o", "--error", "-e"), "output_dir"),
}
_OURS = ("--requeue", "--no-requeue", "--open-mode", "--chdir", "-D", "--wrap", "--parsable", "--test-only")


def launch_problems(config: RunConfig) -> list[Problem]:
    """Every contradiction of `launch` and `slurm`."""
    problems = list(_launch(config))
    if config.slurm is not None:
        problems += [*_resources(config, config.slurm), *_lines(config.slurm), *_sweep(config.slurm)]
        problems += _evaluation(config, config.slurm)
    return problems


def seconds_of(time: str) -> float:
    """A Slurm time limit (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; 0, which is no limit, is infinite."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return total or float("inf")


def num_gpus(gpus: int | str | None) -> int:
    """GPUs of a node in `8`, `a100:8` or null."""
    if gpus is None or isinstance(gpus, int):
        return gpus or 0
    return int(gpus.rpartition(":")[2])


def ranks_per_node(config: RunConfig) -> int:
    """Ranks that a job of this run file will start on each node."""
    processes = config.launch.processes
    gpus = config.slurm.gpus_per_node if config.slurm is not None else None
    return max(1, num_gpus(gpus)) if processes == "auto" else processes


def _launch(config: RunConfig) -> Iterator[Problem]:
    launch = config.launch
    if launch.backend == "ssh" and launch.hostfile is None:
        yield "launch.backend", "ssh needs `launch.hostfile`: a file with a line `name slots=N` for each host"
    for key in _HOST_KEYS:
        if launch.backend != "ssh" and getattr(launch, key) is not None:
            yield f"launch.{key}", f"has no use with `launch.backend` {launch.backend}: remove it, or set that to ssh"
    if launch.include is not None and launch.exclude is not None:
        yield "launch.exclude", "contradicts `launch.include`: keep the one you mean (null switches a key off)"
    for name, value in launch.environment.items():
        if name in _RANK_VARIABLES:
            yield f"launch.environment.{name}", "is set for each rank by the launch itself: remove it"
        elif "\0" in value:
            yield f"launch.environment.{name}", "holds a NUL character"


def _resources(config: RunConfig, slurm: SlurmConfig) -> Iterator[Problem]:
    if problem := _gpus_problem(slurm.gpus_per_node):
        yield "slurm.gpus_per_node", problem
        return
    ranks, gpus = ranks_per_node(config), num_gpus(slurm.gpus_per_node)
    if gpus and ranks > gpus:
        yield "launch.processes", f"{ranks} ranks on each node, and `slurm.gpus_per_node` is {gpus}: lower it to {gpus}"
    if slurm.cpus_per_node is not None and slurm.cpus_per_node < ranks:
        yield "slurm.cpus_per_node", f"{slurm.cpus_per_node} cores for {ranks} ranks: raise it to {ranks} at least"
    if slurm.first_node_memory is not None and slurm.nodes == 1:
        yield "slurm.first_node_memory", "there is only one node: set `slurm.memory` instead"
    limit = seconds_of(slurm.time)
    if slurm.signal_before_s + LIMIT_SLACK_S >= limit:
        yield (
            "slurm.signal_before_s",
            f"the job is asked to save {slurm.signal_before_s} s before its limit of {limit:.0f} s, and Slurm may be "
            f"{LIMIT_SLACK_S} s early: raise `slurm.time`, or lower this",
        )


def _gpus_problem(gpus: int | str | None) -> str | None:
    if isinstance(gpus, str) and not re.fullmatch(r"([A-Za-z0-9._-]+:)?[1-9]\d{0,3}", gpus):
        return f"must be a number, or a type and a number like a100:8, got {gpus}"
    return None


def _lines(slurm: SlurmConfig) -> Iterator[Problem]:
    for key, lines in (("options", slurm.options), ("srun_options", slurm.srun_options)):
        for index, line in enumerate(lines):
            if problem := _option_problem(line, ours=key == "options"):
                yield f"slurm.{key}.{index}", problem
    for index, line in enumerate(slurm.setup):
        if len(line) - len(line.rstrip("\\")) & 1:
            yield f"slurm.setup.{index}", "ends in a backslash, which takes in the next line of the script: remove it"


def _option_problem(line: str, *, ours: bool) -> str | None:
    try:
        words = shlex.split(line)
    except ValueError as error:
        return f"is not complete: {error}"
    if not words or not words[0].startswith("-"):
        return "must be an option, like --exclusive"
    if not ours:
        return None
    option = words[0].partition("=")[0]
    option = option if option.startswith("--") else option[:2]
    if key := _KEY_OF_OPTION.get(option):
        return f"{option} is written from `{key}`: set that instead"
    if option in _OURS:
        return f"{option} is for `harness submit` to say: remove it"
    return None


def _sweep(slurm: SlurmConfig) -> Iterator[Problem]:
    if slurm.max_parallel is not None and not slurm.sweep:
        yield "slurm.max_parallel", "has no meaning without `slurm.sweep`: remove it"
    if slurm.sweep and slurm.first_node_memory is not None:
        yield "slurm.first_node_memory", "Slurm has no arrays of such jobs: set `slurm.memory`, or remove `sweep`"
    for key, values in slurm.sweep.items():
        if not values:
            yield "slurm.sweep", f"{key} has no values"
        if key.partition(".")[0] in ("name", "output_dir", "slurm", "launch"):
            yield "slurm.sweep", f"{key} is the same for all tasks of an array: remove it"
    count = prod(len(values) for values in slurm.sweep.values())
    if count > _LONGEST_ARRAY:
        yield "slurm.sweep", f"{count} combinations are more than an array has ({_LONGEST_ARRAY}): name fewer values"


def _evaluation(config: RunConfig, slurm: SlurmConfig) -> Iterator[Problem]:
    job = slurm.evaluation
    if job is None:
        return
    if job.data is None and config.data.test is None and config.data.validation is None:
        yield "slurm.evaluation", "there are no rows to score: set `slurm.evaluation.data` or `data.test`"
    if problem := _gpus_problem(job.gpus_per_node):
        yield "slurm.evaluation.gpus_per_node", problem
