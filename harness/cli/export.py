"""``harness export``: a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.common import DTYPES, add_run_directory, existing_run_directory

if TYPE_CHECKING:
    from harness.checkpoint.store import Checkpoint

HELP = (
    "Write a checkpoint of a run as a Hugging Face directory, or its adapter as one of PEFT. It is loaded again with\n"
    "the plain libraries and compared with the checkpoint before it is called done."
)
EXAMPLE = "harness export runs/enro enro-model --step 2000 --dtype float32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_export_options(parser)
    parser.add_argument(
        "--step", type=int, metavar="N", help="a step with a checkpoint (default: the best, else the last)"
    )


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """``RUN OUT`` and how the model is written."""
    add_run_directory(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty directory")
    parser.add_argument("--merge", action="store_true", help="add the adapter into the weights of its base")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: model.dtype of the run)")


def run(args: argparse.Namespace) -> int:
    def choose(run_dir: Path) -> list[Checkpoint]:
        from harness.training.finish import choose_checkpoint

        return [choose_checkpoint(run_dir, args.step)]

    (checkpoint,) = export(args, choose)
    print(described(args, f"step {checkpoint.step:,}"))
    return 0


def export(args: argparse.Namespace, choose: Callable[[Path], list[Checkpoint]]) -> list[Checkpoint]:
    """Write the model of the chosen checkpoints, their mean if there are several, to ``args.out``; returns them."""
    from harness.errors import ConfigError, ResourceError
    from harness.io.atomic import read_json
    from harness.plan.plan import Plan

    run_dir, out = existing_run_directory(args.run_dir), args.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("is there already, and not an empty directory", where=str(args.out), hint="name a new one")
    if out == Path.cwd():
        raise ConfigError(
            "is the current directory, which cannot be replaced", where=str(args.out), hint="name another"
        )
    config = Plan.from_json(read_json(run_dir / "plan.json")).config
    if args.merge and config.adapter is None:
        raise ConfigError("the run has no adapter", where="--merge", hint="leave it out")
    args.dtype = args.dtype or config.model.dtype
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": args.dtype})})

    from harness.training.finish import export_checkpoint
    from harness.training.prepare import build_task, with_prepared_labels

    checkpoints = choose(run_dir)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        config = with_prepared_labels(config, run_dir)
        comparison = export_checkpoint(checkpoints, config, build_task(config), out, merge=args.merge)
    except OSError as error:
        kind = ResourceError if error.errno == errno.ENOSPC else ConfigError
        raise kind(f"cannot be written: {error.strerror}", where=str(args.out)) from error
    if comparison:
        print(comparison)
    return checkpoints


def described(args: argparse.Namespace, what: str) -> str:
    """What has been written, in words."""
    size = sum(path.stat().st_size for path in args.out.iterdir())
    return f"{what} of {args.run_dir} as {args.dtype} in {args.out}: {size / 1e6:,.1f} MB, verified"
