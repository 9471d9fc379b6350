"""``harness compare``: what runs differ in, what came of it, and whether that is more than chance."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.cli.common import existing_run_directory

if TYPE_CHECKING:
    from harness.scoring.significance import WrittenEvaluation

HELP = (
    "Show where the configurations of runs differ and their scores, side by side, and test their outputs for the same\n"
    "rows against those of the first run (paired bootstrap). Evaluation directories can be compared too."
)
EXAMPLE = "harness compare runs/enro-lr1 runs/enro-lr2 runs/enro-lr3"

_NEVER_THE_SAME = ("name", "output_dir", "slurm.sweep")
_EVALUATION = re.compile(r"step-\d{8}-(test|validation)")  # of training; `harness evaluate` adds to the name
_LONGEST_CELL = 32
_ABSENT = "-"


class Line(NamedTuple):
    """A property of runs and its value in each of them."""

    name: str
    values: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", nargs="+", type=Path, metavar="RUN", help="run directories, or evaluation directories"
    )


def run(args: argparse.Namespace) -> int:
    from harness.errors import ConfigError

    paths: list[Path] = args.run_dirs
    if len(paths) < 2:
        raise ConfigError("one run cannot be compared", where=str(paths[0]), hint="name two run directories")
    if (paths[0] / "hypotheses.txt").is_file():
        _compare_evaluations(paths)
        return 0
    run_dirs = [existing_run_directory(path) for path in paths]
    print(table([Line("", _names(run_dirs)), *differences(run_dirs), *results(run_dirs)]))
    for run_dir in run_dirs[1:]:
        for text in paired_tests(run_dirs[0], run_dir):
            print(f"\n{text}")
    return 0


def _compare_evaluations(directories: Sequence[Path]) -> None:
    from harness.scoring.significance import WrittenEvaluation

    baseline, *others = [WrittenEvaluation.read(directory) for directory in directories]
    print("\n\n".join(paired_test(baseline, other) for other in others))


def paired_tests(baseline_run: Path, run_dir: Path) -> Iterator[str]:
    """Of each set that both runs have scored, how the outputs compare, or why they cannot be compared."""
    from harness.errors import DataError
    from harness.scoring.significance import WrittenEvaluation

    baselines, others = evaluations_of(baseline_run), evaluations_of(run_dir)
    for name in [name for name in baselines if name in others]:
        try:
            yield paired_test(WrittenEvaluation.read(baselines[name]), WrittenEvaluation.read(others[name]))
        except DataError as error:
            yield f"{others[name]} is not tested against {baselines[name]}: {error.what}"


def evaluations_of(run_dir: Path) -> dict[str, Path]:
    """The outputs for each set: those of the exported step, which is the best one, or else of the last step."""
    from harness.io.atomic import read_json

    found: dict[str, Path] = {}
    for hypotheses in sorted(run_dir.glob("evaluations/step-*/hypotheses.txt")):
        if match := _EVALUATION.fullmatch(hypotheses.parent.name):
            found[match[1]] = hypotheses.parent
    if (run_dir / "summary.json").is_file():
        step = read_json(run_dir / "summary.json")["exported_step"]
        exported = {name: run_dir / "evaluations" / f"step-{step:08d}-{name}" for name in found}
        found |= {name: path for name, path in exported.items() if path.is_dir()}
    return found


def paired_test(baseline: WrittenEvaluation, system: WrittenEvaluation) -> str:
    """A paired bootstrap of two sets of outputs, in words. Raises DataError when they are not for the same rows."""
    from harness.scoring.scores import LABELS
    from harness.scoring.significance import NUM_RESAMPLES, compare_written, num_changed

    found = compare_written(baseline, system)
    lines = [
        Line("", [LABELS[name] for name in found]),
        Line("first", [f"{one.baseline:.2f}" for one in found.values()]),
        Line("second", [f"{one.score:.2f}" for one in found.values()]),
        Line("difference", [f"{one.delta:+.2f}" for one in found.values()]),
        Line("95 %", ["{:+.2f} to {:+.2f}".format(*one.interval) for one in found.values()]),
        Line("p", [f"{one.p:.3f}" for one in found.values()]),
    ]
    return (
        f"first   {baseline.directory}\nsecond  {system.directory}\n"
        f"{num_changed(baseline, system):,} of {len(system.hypotheses):,} outputs differ; paired bootstrap, "
        f"{NUM_RESAMPLES:,} resamplings\n{table(lines)}"
    )


def differences(run_dirs: Sequence[Path]) -> list[Line]:
    """The keys of the run file that are not the same in all runs."""
    from harness.config.changes import leaves
    from harness.io.atomic import read_json

    runs = [dict(leaves(read_json(run_dir / "plan.json").get("config", {}))) for run_dir in run_dirs]
    keys = [key for key in dict.fromkeys(key for run in runs for key in run) if not key.startswith(_NEVER_THE_SAME)]
    lines = [Line(key, [json.dumps(run[key]) if key in run else _ABSENT for run in runs]) for key in keys]
    return [line for line in lines if len(set(line.values)) > 1]


def results(run_dirs: Sequence[Path]) -> list[Line]:
    """Step, scores on the test set, the best and the last of each validation score, speed and time of every run."""
    found = [result_of(run_dir) for run_dir in run_dirs]
    names = dict.fromkeys(name for result in found for name in result)
    return [Line(name, [result.get(name, _ABSENT) for result in found]) for name in names]


def result_of(run_dir: Path) -> dict[str, str]:
    """What one run has come to so far."""
    from harness.io.atomic import read_json
    from harness.scoring.scores import HIGHER_IS_BETTER
    from harness.training.metrics_file import read_metrics

    path = run_dir / "summary.json"
    summary: dict[str, Any] = read_json(path) if path.is_file() else {}
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if record.get("event") == "step"]
    shown = {"state": "finished" if summary else "not finished", "steps": f"{steps[-1]['step'] if steps else 0:,}"}
    shown |= {f"test {name}": _number(value) for name, value in summary.get("test", {}).items()}
    scored = [record for record in records if record.get("event") == "evaluation" and record.get("set") == "validation"]
    for name, is_higher_better in HIGHER_IS_BETTER.items():
        scores = [(record[name], record["step"]) for record in scored if isinstance(record.get(name), int | float)]
        if scores:
            value, step = (max if is_higher_better else min)(scores, key=lambda score: score[0])
            shown[f"best {name}"] = f"{value:.4g} at {step:,}"
            shown[f"last {name}"] = f"{scores[-1][0]:.4g}"
    if steps and "loss" in steps[-1]:
        shown["training loss"] = _number(steps[-1]["loss"])
    if summary:
        shown["tokens/s"] = f"{summary['tokens_per_second']:,.0f}"
        shown["hours"] = f"{summary['wall_time_s'] / 3600:.2f}"
        shown["restarts"] = str(summary["restarts"])
    return shown


def table(lines: Sequence[Line]) -> str:
    """Runs side by side, or one below the other when there are more of them than lines."""
    rows = [[line.name, *(_cut(value) for value in line.values)] for line in lines]
    if len(rows[0]) > len(rows):
        rows = [list(column) for column in zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The last parts of the paths, whole paths where those are the same."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 3]}..."
