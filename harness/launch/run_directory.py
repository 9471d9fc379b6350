"""The run directory at the start of a run: who owns it, and what was asked for, planned and found."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ruamel.yaml import YAML

import harness
from harness.config.changes import forbidden_changes
from harness.config.schema import RunConfig
from harness.errors import ConfigError, HarnessError, ResourceError
from harness.io.accelerator import accelerator, num_devices
from harness.io.atomic import read_json, write_json, write_text
from harness.launch.failures import newest_checkpoint
from harness.plan.plan import Plan

STOP_FILE = "stop"  # the request of `harness stop`
_LOCK_FILE = "run.lock"
_PACKAGES = (
    "torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "datasets", "accelerate",
    "peft", "bitsandbytes", "sacrebleu", "tensorboard", "numpy", "pydantic",
)  # fmt: skip


def refuse_changes(plan: Plan) -> None:
    """Raises ConfigError if the run has checkpoints and its run file differs in a key that decides what is learnt."""
    run_dir = Path(plan.run_dir)
    step = newest_checkpoint(run_dir)
    if step is None or not (run_dir / "plan.json").is_file():
        return
    changes = forbidden_changes(read_json(run_dir / "plan.json").get("config", {}), plan.config)
    if changes:
        lines = "".join(f"\n  {key}: {json.dumps(old)} -> {json.dumps(new)}" for key, old, new in changes)
        raise ConfigError(
            f"this run has learnt {step} steps, and the run file now says something else of what is learnt:{lines}",
            where=str(run_dir),
            hint="put the old values back to go on, or give the run a new `name` to start again",
        )


def completed(plan: Plan) -> str | None:
    """What the run has come to, if it has ended and this run file asks for nothing more; else None.

    A run that early stopping has ended goes on when that section has changed.
    """
    path = Path(plan.run_dir) / "summary.json"
    summary = read_json(path) if path.is_file() else {}
    is_over = summary.get("steps", 0) >= summary.get("total_steps", float("inf"))
    stopping = plan.config.early_stopping and plan.config.early_stopping.model_dump(mode="json")
    if not (is_over or (stopping and summary.get("early_stopping") == stopping)):
        return None
    config = read_json(path.with_name("plan.json")).get("config", {})
    if forbidden_changes(config, plan.config):
        return None
    shown = {name: "not finite" if value is None else f"{value:.4g}" for name, value in summary["test"].items()}
    scores = "".join(f", test {name} {value}" for name, value in shown.items())
    return (
        f"{plan.run_dir} is complete: {summary['steps']} steps{scores}\n"
        f"  -> the model is in {plan.run_dir}/export; to train again give the run another `name`"
    )


@contextmanager
def opened_run_directory(plan: Plan) -> Iterator[Path]:
    """The run's directory, ours alone until the end of the block, with config.yaml, plan.json and environment.json.

    ConfigError when another process works in it, it cannot be written or holds another run's checkpoints;
    ResourceError when the disk is full.
    """
    run_dir = Path(plan.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / _LOCK_FILE).open("a+")
    except OSError as error:
        raise _cannot_write(run_dir, error) from error
    with lock:
        _take(lock, run_dir)
        refuse_changes(plan)
        try:
            (run_dir / "summary.json").unlink(missing_ok=True)
            (run_dir / STOP_FILE).unlink(missing_ok=True)  # it was for an earlier start
            write_text(run_dir / "config.yaml", _yaml(plan.config))
            write_json(run_dir / "plan.json", plan.to_json())
            write_json(run_dir / "environment.json", describe_environment())
        except OSError as error:
            raise _cannot_write(run_dir, error) from error
        yield run_dir


def owner(run_dir: Path) -> str | None:
    """`pid P on HOST` of the process that works in the run directory now, or None."""
    try:
        with (run_dir / _LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (run_dir / _LOCK_FILE).read_text().strip() or "another process"
    except OSError:
        return None
    return None


def describe_environment() -> dict[str, Any]:
    """What a later reader needs to know of this start: versions, machine, command."""
    return {
        "harness": harness.__version__,
        "commit": _commit(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "num_cores": len(os.sched_getaffinity(0)),
        "accelerator": accelerator(),
        "num_devices": num_devices(),
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _take(lock: IO[str], run_dir: Path) -> None:
    """Lock the run directory; the kernel gives the lock back when we end, however we end."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{owner(run_dir) or 'another process'} works in this run directory",
            where=str(run_dir),
            hint="wait for it, end it with `harness stop`, or give this run another name",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            raise
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def _yaml(config: RunConfig) -> str:
    text = io.StringIO()
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def _commit() -> str | None:
    """Commit of the harness itself when it runs from a checkout, with `-dirty` if files differ from it."""
    checkout = Path(harness.__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cannot_write(run_dir: Path, error: OSError) -> HarnessError:
    what = f"cannot write the run directory: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(what, where=str(run_dir), hint="free some space, or set another `output_dir`")
    return ConfigError(what, where=str(run_dir), hint="set another `output_dir`")
