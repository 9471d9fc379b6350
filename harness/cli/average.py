"""``harness average``: the mean of several checkpoints of a run as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.common import positive
from harness.cli.export import add_export_options, described, export

if TYPE_CHECKING:
    from harness.checkpoint.store import Checkpoint

HELP = (
    "Write the mean of the weights of several checkpoints of a run as `harness export` writes one of them. Without a\n"
    "choice all checkpoints that the run has kept are averaged."
)
EXAMPLE = "harness average runs/enro enro-average --last 5"
RECORD = "average.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_export_options(parser)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--last", type=positive, metavar="N", help="the N newest")
    chosen.add_argument("--best", action="store_true", help="the best by the run's score (checkpoint.keep_best)")
    chosen.add_argument("--steps", type=_steps, metavar="A,B", default=(), help="those of these steps")


def run(args: argparse.Namespace) -> int:
    from harness.io.atomic import write_json

    def choose(run_dir: Path) -> list[Checkpoint]:
        from harness.training.finish import choose_to_average

        return choose_to_average(run_dir, num_last=args.last, best=args.best, steps=args.steps)

    steps = [checkpoint.step for checkpoint in export(args, choose)]
    write_json(args.out / RECORD, {"run": args.run_dir.resolve().name, "steps": steps})
    print(described(args, f"mean of steps {', '.join(f'{step:,}' for step in steps)}"))
    return 0


def _steps(text: str) -> list[int]:
    return [positive(step.strip()) for step in text.split(",")]
