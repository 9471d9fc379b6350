"""``harness rehearse``: prove a Slurm job before it queues."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.common import add_run_file, positive

if TYPE_CHECKING:
    from harness.config.schema import RunConfig
    from harness.launch.preflight import Finding
    from harness.launch.submission import Submission
    from harness.plan.plan import Plan

HELP = (
    "Prove a job of Slurm before it queues: check what can be checked here, probe the nodes by a job of a minute,\n"
    "then run the very same script with a narrow model and a few rows, interrupt it, and see that it saves, is\n"
    "requeued, goes on, exports and scores. Each problem comes with what to change. Exit code 2 if there is one."
)
EXAMPLE = "harness rehearse examples/cluster.yaml --nodes 2"
SUFFIX, PROBE = "-rehearsal", "probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--nodes", type=positive, metavar="N", help="rehearse on so many nodes (default: slurm.nodes)")
    parser.add_argument("--probe-only", action="store_true", help="leave the small run out")
    parser.add_argument(
        "--private",
        action="store_true",
        help="on a Slurm of this machine alone; needs root, Debian and a checkout, installs packages",
    )
    parser.add_argument("--keep", action="store_true", help=f"keep <output_dir>/<name>{SUFFIX} after a success")


def run(args: argparse.Namespace) -> int:
    from harness.errors import ConfigError, ExitCode, HarnessError
    from harness.launch.submission import prepare

    try:
        submission = prepare(args.run_file, args.overrides)
    except HarnessError as error:
        raise ConfigError(f"the run cannot start: {error.what}", where=error.where, hint=error.hint) from error
    if not submission.plans:
        print("\n".join(submission.results))
        return ExitCode.DONE
    if args.private:
        return _on_private_cluster(args, submission.config)
    directory = submission.run_dir.with_name(submission.run_dir.name + SUFFIX)
    clear(directory)
    for phase in phases(submission, directory, nodes=args.nodes, probe_only=args.probe_only):
        if not told(phase):
            kept = f"; what the rehearsal has left is in {directory}" if directory.exists() else ""
            print(f"not ready: mend this and rehearse again{kept}")
            return ExitCode.CONFIG
    if not args.keep:
        clear(directory)
    print(f"ready: harness submit {shlex.join([str(args.run_file), *args.overrides])}")
    return ExitCode.DONE


def _on_private_cluster(args: argparse.Namespace, config: RunConfig) -> int:
    import subprocess

    from harness.launch.private_cluster import ITS_OWN, private_cluster

    assert config.slurm is not None
    nodes = args.nodes or config.slurm.nodes
    options = [
        f"--nodes={nodes}",
        *(f"--{name}" for name in ("probe-only", "keep") if getattr(args, name.replace("-", "_"))),
    ]
    command = [sys.executable, "-m", "harness", "rehearse", str(args.run_file), *options]
    overrides = [*args.overrides, *ITS_OWN, f"slurm.nodes={nodes}"]
    with private_cluster(config, nodes) as within:
        return subprocess.run([*within, *command, *overrides], check=False).returncode


def phases(
    submission: Submission, directory: Path, *, nodes: int | None, probe_only: bool
) -> Iterator[Iterable[Finding]]:
    """The findings of each phase, which begins when they are asked for."""
    from harness.launch.preflight import preflight
    from harness.launch.rehearsal import probe_nodes

    plan = submission.plans[0]
    yield preflight(submission, _records(plan.run_dir))
    yield probe_nodes(plan, nodes, directory / PROBE, say)
    if not probe_only:
        yield _small_run(plan, directory, nodes)


def _small_run(plan: Plan, directory: Path, nodes: int | None) -> Iterator[Finding]:
    from harness.io.atomic import write_json
    from harness.launch.preflight import measured_times, time_limit
    from harness.launch.submission import prepare
    from harness.training.rehearsal import interrupted_run, small_run

    config = small_run(plan.config, directory, nodes=nodes)
    run_file = directory / "run.yaml"  # JSON is YAML
    write_json(run_file, config.model_dump(mode="json"))
    small = prepare(run_file, [])
    yield from interrupted_run(small, say)
    if plan.config.checkpoint.every_steps is not None and measured_times(_records(plan.run_dir))[0] is None:
        yield from time_limit(plan, *measured_times(_records(small.run_dir)), is_same_run=False)


def _records(run_dir: str | Path) -> list[dict[str, Any]]:
    from harness.training.metrics_file import read_metrics

    return read_metrics(Path(run_dir) / "metrics.jsonl")


def clear(directory: Path) -> None:
    """Remove what an earlier rehearsal has left. ConfigError if the directory is something else."""
    import shutil

    from harness.errors import ConfigError

    if directory.exists() and not (directory / PROBE).is_dir():
        hint = "move it away, or give the run another name"
        raise ConfigError("a rehearsal would be made here, and this is not one", where=str(directory), hint=hint)
    shutil.rmtree(directory, ignore_errors=True)


def told(findings: Iterable[Finding]) -> bool:
    """Print findings as they come; False if one is a problem."""
    from harness.errors import HarnessError
    from harness.launch.preflight import Finding

    def line(finding: Finding) -> bool:
        print(f"{'problem' if finding.is_problem else 'ok':<8} {finding.text}", flush=True)
        if finding.is_problem:
            print(f"{'':<8} -> {finding.change}", flush=True)
        return not finding.is_problem

    try:
        return sum(not line(finding) for finding in findings) == 0
    except HarnessError as error:
        where = f"{error.where}: " if error.where else ""
        return line(Finding(f"{where}{error.what}", error.hint or "mend this"))


def say(text: str) -> None:
    print(f"{'':<8} {text}", file=sys.stderr, flush=True)
