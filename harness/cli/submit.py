"""``harness submit``: the run as a job of Slurm."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from harness.cli.common import add_run_file

if TYPE_CHECKING:
    from harness.launch.submission import Submission

HELP = (
    "Check the run file, write the sbatch script of its `slurm` section into the run directory, and submit it. The\n"
    "job saves before its time limit and goes on by itself. A sweep becomes an array, `slurm.evaluation` a job\n"
    "that follows."
)
EXAMPLE = "harness submit examples/quickstart.yaml 'slurm={nodes: 2, time: 4:00:00}' --dry-run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the scripts; write and submit nothing")
    only.add_argument("--test-only", action="store_true", help="ask Slurm when they would start; submit nothing")


def run(args: argparse.Namespace) -> int:
    from harness.launch import scheduler
    from harness.launch.submission import evaluation_dependency, prepare, submit

    submission = prepare(args.run_file, args.overrides)
    for result in submission.results:
        print(result)
    if not submission.plans:
        return 0
    if args.dry_run:
        print(submission.training, end="")
        if submission.evaluation is not None:
            print(f"\n# sbatch {evaluation_dependency(submission, 'TRAINING_JOB')}\n{submission.evaluation}", end="")
        return 0
    if args.test_only:
        print(f"training: {scheduler.test_only(submission.training)}")
        if submission.evaluation is not None:
            print(f"evaluation: {scheduler.test_only(submission.evaluation)}")
        return 0
    print(describe(submission, submit(submission)))
    return 0


def describe(submission: Submission, jobs: dict[str, int]) -> str:
    """What was submitted, and where to look."""
    slurm = submission.config.slurm
    assert slurm is not None
    nodes = f"{slurm.nodes} node{'s' if slurm.nodes > 1 else ''}"
    runs = f"{len(submission.plans)} runs, each " if slurm.sweep else ""
    first = submission.plans[0]
    size = f"{runs}{first.world_size} ranks on {nodes}, at most {slurm.time} at a time"
    lines = [f"training: job {jobs['training']}, {size}"]
    if "evaluation" in jobs:
        after = "each task after that of its run" if slurm.sweep else "after the training"
        lines.append(f"evaluation: job {jobs['evaluation']}, {after} has ended well")
    lines.append(f"output: {first.run_dir}/slurm-*.out; harness status {first.run_dir}")
    return "\n".join(lines)
