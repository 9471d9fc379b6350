"""Arguments and files that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
PRESETS = ("hf", "fairseq", "gnmt", "marian", "opennmt", "ctranslate2")
PRECISIONS = ("model", "bfloat16", "int8")


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """``RUN.yaml [key.path=value ...]``"""
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="set a key of the run file; the value is YAML"
    )


def add_run_directory(parser: argparse.ArgumentParser) -> None:
    """``RUN``: a run directory."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory: <output_dir>/<name>")


def positive(text: str) -> int:
    """argparse type: a whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``MODEL_OR_RUN [key.path=value ...]`` and everything that decides how it decodes.

    A run's own settings are the defaults.
    """
    parser.add_argument(
        "model", metavar="MODEL_OR_RUN", help="a model directory, hub name or run directory (then its exported model)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="set a key of `evaluation` or `data`, as in a run file, like evaluation.no_repeat_ngram=3",
    )
    parser.add_argument(
        "--ensemble",
        action="append",
        default=[],
        metavar="MODEL_OR_RUN",
        help="decode with this model too (repeatable)",
    )
    parser.add_argument("--source-language", metavar="CODE", help="language of the sources, as the tokeniser names it")
    parser.add_argument("--target-language", metavar="CODE", help="language of the outputs")
    parser.add_argument("--source-prefix", metavar="TEXT", help="text put before each source (T5)")
    parser.add_argument(
        "--preset", choices=PRESETS, help="score and stop rule, beams and length penalty of a toolkit (default hf)"
    )
    parser.add_argument("--beam-size", type=positive, metavar="N", help="beams per sentence; 1 is greedy (default 5)")
    parser.add_argument("--length-penalty", type=float, metavar="A", help="exponent of the length (default 1.0)")
    parser.add_argument("--max-length", type=positive, metavar="N", help="longest output in tokens (default 256)")
    parser.add_argument(
        "--max-length-ratio", type=float, metavar="R", help="longest output as a multiple of its own source, plus 10"
    )
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="batch: rows x beams x longest source (default 4096)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute type (default: that of the stored model)")
    parser.add_argument("--precision", choices=PRECISIONS, help="type of the weights while decoding (default model)")


def model_changes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The options of ``add_model_options`` that were given, as keys of the run file."""
    options = {
        "model": {"dtype": args.dtype},
        "data": {name: getattr(args, name) for name in ("source_language", "target_language", "source_prefix")},
        "batch": {"max_tokens_per_device": args.max_tokens},
        "evaluation": {
            "preset": args.preset,
            "beam_size": args.beam_size,
            "length_penalty": args.length_penalty,
            "max_target_length": args.max_length,
            "max_length_ratio": args.max_length_ratio,
            "max_tokens_per_device": args.max_tokens,
            "precision": args.precision,
        },
    }
    return {
        section: {key: value for key, value in values.items() if value is not None}
        for section, values in options.items()
    }


def existing_run_directory(path: Path) -> Path:
    """``path`` if a run was started there. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError("no such run directory", where=str(path), hint="it is <output_dir>/<name> of the run file")
    if not (path / "plan.json").is_file():
        raise ConfigError("not a run directory: it has no plan.json", where=str(path))
    return path


def rank_of(path: Path) -> int:
    """The number of `rank-12.log`, `rank-12.json`, `rank-12.stack`; -1 for any other name."""
    number = path.stem.removeprefix("rank-")
    return int(number) if number.isdecimal() else -1
