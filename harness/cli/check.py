"""``harness check``: everything that can be wrong before a run, without starting it."""

from __future__ import annotations

import argparse

from harness.cli.common import add_run_file

HELP = "Validate a run file, its model, tokeniser and data; show one row as the model will see it. Trains nothing."
EXAMPLE = "harness check examples/quickstart.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    from harness.config.load import load_run_config
    from harness.plan.plan import make_plan

    config = load_run_config(args.run_file, args.overrides)
    make_plan(config, world_size=1)
    print(f"run file   {args.run_file}: right")
    return 0
