"""Arguments and files that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.errors import ConfigError


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """``RUN.yaml [key.path=value ...]``"""
    parser.add_argument("run_file", type=Path, metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="set a key of the run file; the value is YAML"
    )


def add_run_directory(parser: argparse.ArgumentParser) -> None:
    """``RUN``: a run directory."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory: <output_dir>/<name>")


def existing_run_directory(path: Path) -> Path:
    """``path`` if a run was started there. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError("no such run directory", where=str(path), hint="it is <output_dir>/<name> of the run file")
    if not (path / "plan.json").is_file():
        raise ConfigError("not a run directory: it has no plan.json", where=str(path))
    return path
