"""Short runs as jobs of the test cluster."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.cluster.cluster import HEAD, Cluster
from tests.runs import tiny_run, write_run

LAST_STEP = 12


def slurm_run(directory: Path, model: Path, *, name: str, slurm: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run file (as a dict) of a few steps, saved every fourth, on two nodes with a rank each."""
    section = {"nodes": 2, "time": "0:10:00", "signal_before_s": 60, **slurm}
    changes = {"schedule__steps": LAST_STEP, "checkpoint__every_steps": 4, "checkpoint__keep_last": 9, **changes}
    return tiny_run(directory, model, name=name, slurm=section, **changes)


def submit(cluster: Cluster, run: dict[str, Any], *options: str, **variables: str) -> str:
    """What `harness submit` prints on head."""
    command = (sys.executable, "-m", "harness", "submit", write_run(run), *options)
    return cluster.run(HEAD, *command, cwd=Path(run["output_dir"]), **variables).stdout


def training_job(printed: str) -> str:
    found = re.search(r"training: job (\d+),", printed)
    assert found is not None, printed
    return found[1]


def run_dir(run: dict[str, Any]) -> Path:
    return Path(run["output_dir"]) / run["name"]


def final_checkpoint(run: dict[str, Any], step: int = LAST_STEP) -> Path:
    return run_dir(run) / "checkpoints" / f"step-{step:08d}"


def launches(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir(run) / "launches.jsonl").read_text().splitlines()]
