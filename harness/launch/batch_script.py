"""The scripts of `harness submit` as pure functions of the run file. sbatch expands nothing in its #SBATCH lines, so
every value stands there written out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from harness.config.document import parse_value
from harness.config.launch_rules import num_gpus, ranks_per_node
from harness.config.launch_schema import SlurmConfig
from harness.config.schema import RunConfig
from harness.errors import ConfigError

OUTPUT, ARRAY_OUTPUT = "slurm-%j.out", "slurm-%A_%a.out"
_TRAIN_NOTE = "Trains the run file below; by hand: sbatch [OPTIONS] THIS_FILE RUN.yaml [key.path=value ...]"
_EVALUATE_NOTE = "Scores the run below; by hand: sbatch [OPTIONS] THIS_FILE RUN_DIR [OPTIONS of harness evaluate]"


@dataclass(frozen=True)
class Place:
    """Where a job runs and what it starts there.

    `command`: the words of `harness` on the first node, `container_command` those within `slurm.container`.
    `directory`: of the job, None for that of the sbatch command. `run_dir`: of the run, of an array without the index.
    `output_dir`: of what the job prints; None for `run_dir`, in an array for each task its own.
    """

    command: Sequence[str]
    run_dir: str
    directory: str | None = None
    output_dir: str | None = None
    container_command: Sequence[str] = ("python", "-m", "harness")


def sweep_overrides(config: RunConfig) -> list[list[str]]:
    """The overrides of each task of the array, all combinations, the last key fastest; empty without a sweep."""
    sweep = config.slurm.sweep if config.slurm is not None else {}
    if not sweep:
        return []
    return [
        [f"name={config.name}-{index}", *(f"{key}={_yaml(value)}" for key, value in zip(sweep, values, strict=True))]
        for index, values in enumerate(product(*sweep.values()))
    ]


def training_script(
    config: RunConfig, place: Place, run_file: str, overrides: Sequence[str] = (), tasks: Sequence[int] | None = None
) -> str:
    """The script that ends in `harness train` as the driver of all nodes; `tasks`: those of the array, default all."""
    assert config.slurm is not None
    sweep = sweep_overrides(config)
    array = (range(len(sweep)) if tasks is None else tasks) if sweep else []
    body = [_default_arguments([run_file, *overrides])]
    if sweep:
        body.append(_case(sweep))
    body.append(f'exec {shlex.join(place.command)} train "$@" launch.backend=slurm')
    header = [
        *_common(config.slurm, config.name, place, array),
        f"--signal=B:USR2@{config.slurm.signal_before_s}",
        *_training_resources(config, config.slurm),
    ]
    return _script(config.slurm, _TRAIN_NOTE, header, body)


def evaluation_script(config: RunConfig, place: Place, tasks: Sequence[int] | None = None) -> str:
    """The script of the job that scores the exported model; its dependency is for sbatch's command line to say."""
    assert config.slurm is not None
    assert config.slurm.evaluation is not None
    slurm, job = config.slurm, config.slurm.evaluation
    sweep = sweep_overrides(config)
    array = (range(len(sweep)) if tasks is None else tasks) if sweep else []
    run_dir = shlex.quote(place.run_dir) + ('-"$SLURM_ARRAY_TASK_ID"' if sweep else "")
    options = [] if job.data is None else ["--data", job.data]
    if num_gpus(job.gpus_per_node) > 1 and "--processes" not in job.arguments:
        options += ["--processes", str(num_gpus(job.gpus_per_node))]
    arguments = " ".join([run_dir, *map(shlex.quote, [*options, *job.arguments])])
    command = [*slurm.container, *place.container_command] if slurm.container else place.command
    header = [
        *_common(slurm, f"{config.name}-evaluation", place, array),
        "--kill-on-invalid-dep=yes",
        "--nodes=1",
        "--ntasks-per-node=1",
        *_valued("gpus-per-node", job.gpus_per_node),
        *_valued("cpus-per-task", slurm.cpus_per_node),
        *_valued("mem", job.memory),
        *_valued("time", job.time),
        *_account(slurm),
    ]
    body = [_default_arguments_line(arguments), f'exec {shlex.join(command)} evaluate "$@"']
    return _script(slurm, _EVALUATE_NOTE, header, body)


def _script(slurm: SlurmConfig, note: str, header: Sequence[str], body: Sequence[str]) -> str:
    # A login shell knows `module`. What modules and activation scripts do often fails under `set -u`.
    modules = [f"module load {shlex.quote(name)}" for name in slurm.modules]
    preparation = [*modules, *slurm.setup]
    strict = ["set -eo pipefail", *preparation, "set -u"] if preparation else ["set -euo pipefail"]
    directives = [f"#SBATCH {line}" for line in header]
    lines = ["#!/bin/bash -l" if modules else "#!/bin/bash", f"# {note}", *directives, "", *strict, "", *body]
    return "\n".join(lines) + "\n"


def _common(slurm: SlurmConfig, name: str, place: Place, array: Sequence[int]) -> Iterator[str]:
    """Who the job is, where it is, and how it goes on after an interruption."""
    yield f"--job-name={name}"
    if array:
        limit = f"%{slurm.max_parallel}" if slurm.max_parallel is not None else ""
        yield f"--array={_ranges(array)}{limit}"
    if place.directory is not None:
        yield f"--chdir={directive_value(place.directory)}"
    folder = place.output_dir
    if folder is None:
        folder = _without_symbols(place.run_dir) + ("-%a" if array else "")
    output = ARRAY_OUTPUT if array else OUTPUT
    yield f"--output={directive_value(f'{folder}/{output}' if folder else output)}"
    yield "--open-mode=append"
    yield "--requeue"


def _training_resources(config: RunConfig, slurm: SlurmConfig) -> Iterator[str]:
    """The nodes; where the first needs more memory, as a heterogeneous job whose first component it is."""
    if slurm.first_node_memory is None:
        yield from _nodes(config, slurm, slurm.nodes, slurm.memory)
    else:
        yield from _nodes(config, slurm, 1, slurm.first_node_memory)
        yield "hetjob"
        yield from _nodes(config, slurm, slurm.nodes - 1, slurm.memory)


def _nodes(config: RunConfig, slurm: SlurmConfig, count: int, memory: str | None) -> Iterator[str]:
    tasks = ranks_per_node(config) if slurm.tasks == "device" else 1
    yield f"--nodes={count}"
    yield f"--ntasks-per-node={tasks}"
    yield from _valued("gpus-per-node", slurm.gpus_per_node)
    if slurm.cpus_per_node is not None:
        yield f"--cpus-per-task={slurm.cpus_per_node // tasks}"
    yield from _valued("mem", memory)
    yield from _valued("time", slurm.time)
    yield from _account(slurm)


def _account(slurm: SlurmConfig) -> Iterator[str]:
    for name in ("account", "partition", "qos", "constraint", "reservation"):
        yield from _valued(name, getattr(slurm, name))
    yield from slurm.options


def _valued(option: str, value: int | str | None) -> Iterator[str]:
    if value is not None:
        yield f"--{option}={directive_value(str(value))}"


def directive_value(value: str) -> str:
    """A value for a #SBATCH line, quoted if it must be. sbatch takes a backslash for an escape within any quotes.

    Raises ConfigError for a control character, which such a line cannot hold.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise ConfigError(f"{value!r} holds a control character, which a #SBATCH line cannot", hint="use another name")
    if re.fullmatch(r"[\w@%+=:,./*&|()\[\]!-]*", value, flags=re.ASCII):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _without_symbols(path: str) -> str:
    """A path for --output, where `%` begins a symbol. Raises ConfigError for a backslash, which ends all symbols."""
    if "\\" in path:
        raise ConfigError("holds a backslash, with which sbatch cannot name files", where=path, hint="use another name")
    return path.replace("%", "%%")


def _default_arguments(words: Sequence[str]) -> str:
    return _default_arguments_line(shlex.join(words))


def _default_arguments_line(arguments: str) -> str:
    return f"if (($# == 0)); then\n    set -- {arguments}\nfi"


def _case(sweep: Sequence[Sequence[str]]) -> str:
    branches = [f'    {index}) set -- "$@" {shlex.join(overrides)} ;;' for index, overrides in enumerate(sweep)]
    unknown = '    *) echo "no overrides for array task $SLURM_ARRAY_TASK_ID" >&2 && exit 2 ;;'
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *branches, unknown, "esac"])


def _ranges(numbers: Sequence[int]) -> str:
    """0 1 2 5 -> `0-2,5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _yaml(value: Any) -> str:
    """A value as it is written in an override: text as it stands where YAML reads it so."""
    if isinstance(value, str):
        try:
            if parse_value(value) == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False)
