"""``harness train``: plan, start the ranks, wait for them."""

from __future__ import annotations

import argparse

from harness.cli.common import add_run_file

HELP = "Train, evaluate and export as the run file says. The same command goes on with an interrupted run."
EXAMPLE = "harness train examples/quickstart.yaml optimizer.lr=1e-4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from harness.launch.backends import start_ranks
    from harness.launch.restarts import run_attempts
    from harness.launch.run_directory import completed, opened_run_directory, plan_run

    plan = plan_run(args.run_file, args.overrides)
    if result := completed(plan):
        print(result)
        return 0
    if plan.config.launch.backend == "slurm":
        from harness.launch.slurm import run_in_job

        return run_in_job(plan).report()
    with opened_run_directory(plan) as run_dir:
        return run_attempts(
            partial(start_ranks, plan.config, run_dir),
            run_dir,
            max_restarts=plan.config.launch.max_restarts,
            origin={"backend": plan.config.launch.backend},
        ).report()
