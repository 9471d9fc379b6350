"""``harness check``: everything that can be wrong before a run, without starting it."""

from __future__ import annotations

import argparse

from harness.cli.common import add_run_file

HELP = (
    "Validate a run file, its model, tokeniser and data; show one row as the model will see it. Trains nothing and\n"
    "writes nothing but the cache of encoded rows, which the run will use."
)
EXAMPLE = "harness check examples/quickstart.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    from harness.cluster.backends import plan_run
    from harness.launch.run_directory import refuse_changes

    plan = plan_run(args.run_file, args.overrides)
    refuse_changes(plan)
    print(f"run file    {args.run_file}: right, for {plan.world_size} rank{'s' * (plan.world_size > 1)}", flush=True)

    from harness.training.check import findings

    for title, text in findings(plan.config):
        print(f"{title:<11} {text}".replace("\n", "\n" + " " * 12), flush=True)
    return 0
