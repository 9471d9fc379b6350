"""``harness stop``: ask a run to save and stop."""

from __future__ import annotations

import argparse

from harness.cli.common import add_run_directory, existing_run_directory

HELP = "Ask a run to save and stop after its present step. The command that started it goes on later."
EXAMPLE = "harness stop runs/enro"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_directory(parser)


def run(args: argparse.Namespace) -> int:
    from harness.errors import ConfigError
    from harness.io.atomic import write_text
    from harness.launch.run_directory import STOP_FILE, owner

    run_dir = existing_run_directory(args.run_dir)
    working = owner(run_dir)
    if working is None:
        print(f"{run_dir} is not running: nothing to stop")
        return 0
    try:
        write_text(run_dir / STOP_FILE, "harness stop\n")
    except OSError as error:
        raise ConfigError(f"cannot leave the request: {error.strerror}", where=str(run_dir)) from error
    print(f"asked {working} to save and stop after its present step")
    return 0
