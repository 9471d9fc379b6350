"""The ``harness`` command: one verb per module of this package, imported only when it is the chosen one."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from harness import __version__
from harness.errors import ExitCode, HarnessError, Interrupted

# Verb -> the line of `harness --help`; the verb's module is harness/cli/<verb>.py.
VERBS: dict[str, str] = {
    "train": "plan, launch, train, evaluate and export; the same command resumes",
    "submit": "submit the run as a job of Slurm, which saves before its time limit and goes on by itself",
    "rehearse": "prove a Slurm job before it queues: checks, a probe of the nodes, a small run that is interrupted",
    "check": "validate a run file, its model and its data; show one example row; train nothing",
    "plan": "batch arithmetic, memory per rank, DeepSpeed JSON, recommended stage",
    "schema": "JSON Schema of the run file, for completion in editors",
    "evaluate": "decode a test set and score it",
    "translate": "translate standard input line by line",
    "predict": "classify the lines of standard input or the rows of a file",
    "export": "write a run's model as a Hugging Face directory",
    "average": "write the mean of a run's checkpoints as a Hugging Face directory",
    "status": "what a run is doing",
    "logs": "the first error among all ranks of a run, or the log of one",
    "compare": "what runs differ in, and their scores side by side",
    "stop": "ask a run to save and stop",
    "tokenizer": "train a sentencepiece model on your own text",
    "doctor": "versions, accelerator, compilers, network, a small all-reduce",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((argument for argument in arguments if not argument.startswith("-")), None)
    debug = "--debug" in arguments
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of PEFT's calls
    try:
        args = _parse(arguments, verb if verb in VERBS else None)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help, --version or a wrong command line
        return stop.code if isinstance(stop.code, int) else ExitCode.OTHER
    except Interrupted as stop:
        return _report(debug, f"harness: {stop}", stop.exit_code)
    except HarnessError as error:
        return _report(debug, f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _report(debug, "interrupted", 128 + 2)
    except BrokenPipeError:  # the reader of our output went away, as in `harness plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OTHER
    except Exception as error:
        kind, text = type(error).__name__, " ".join(str(error).split())[:300]
        return _report(debug, f"error: {kind}: {text}\n  -> run again with --debug for the traceback", ExitCode.OTHER)


def _report(debug: bool, message: str, code: int) -> int:
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    return int(code)


def _parse(arguments: list[str], verb: str | None) -> argparse.Namespace:
    """Parse a command line. Overrides may stand anywhere after the run file, so argparse's leftovers are looked at."""
    parser = _parser(verb)
    args, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(args, "overrides") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)} (see harness {verb} --help)")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with the arguments of ``verb``; the other verbs stand there with their help line only."""
    parser = argparse.ArgumentParser(
        prog="harness",
        description="Fine-tune translation models with DeepSpeed and score them with beam search.",
        epilog="Example: harness train examples/quickstart.yaml optimizer.lr=1e-4",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", dest="verb", required=True)
    for name, summary in VERBS.items():
        if name != verb:
            verbs.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"harness.cli.{name}")
        chosen = verbs.add_parser(
            name,
            help=summary,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        chosen.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    return parser
