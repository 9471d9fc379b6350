"""``harness train``: plan, start the ranks, wait for them."""

from __future__ import annotations

import argparse

from harness.cli.common import add_run_file

HELP = "Train, evaluate and export as the run file says. The same command goes on with an interrupted run."
EXAMPLE = "harness train examples/quickstart.yaml optimizer.lr=1e-4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    import sys

    from harness.launch.environment import local_ranks
    from harness.launch.run_directory import completed, opened_run_directory, plan_run
    from harness.launch.supervisor import supervise

    plan = plan_run(args.run_file, args.overrides)
    if result := completed(plan):
        print(result)
        return 0
    with opened_run_directory(plan) as run_dir:
        return supervise(
            [sys.executable, "-m", "harness.training.rank", str(run_dir)],
            local_ranks(plan.world_size),
            run_dir=run_dir,
            stop_grace_s=plan.config.launch.stop_grace_s,
        )
