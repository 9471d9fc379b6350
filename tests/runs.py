"""Short real runs for tests: a run file for a tiny model, ranks started as processes, records read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from harness.checkpoint.state import CheckpointTensors
from harness.engine.fragments import MASTER
from tests.pairs import PAIRS

WORKER = Path(__file__).with_name("worker.py")
REPOSITORY = Path(__file__).parent.parent
# ZeRO-3 leaves small tensors whole on every rank: in a tiny model that would be all of them.
SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def write_pairs(path: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> Path:
    lines = ["source\ttarget", *(f"{source}\t{target}" for source, target in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_run(directory: Path, model: Path, *, name: str, **changes: Any) -> dict[str, Any]:
    """A run file (as a dict) of 20 steps on the pairs; `changes` are dotted keys written with `__`."""
    run: dict[str, Any] = {
        "name": name,
        "output_dir": str(directory),
        "model": {"path": str(model), "dropout": 0.0},
        "data": {
            "train": [{"path": str(write_pairs(directory / "pairs.tsv"))}],
            "source_language": "en_XX",
            "target_language": "de_DE",
            "max_source_length": 60,
            "max_target_length": 60,
        },
        "batch": {"tokens_per_step": 400, "max_tokens_per_device": 400},
        "loss": {"label_smoothing": 0.1},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.01},
        "schedule": {"name": "linear", "warmup_steps": 5, "steps": 20},
        "deepspeed": {"preset": "zero0"},
        "evaluation": None,
        "monitor": {"tensorboard": False, "log_every_steps": 5},
    }
    return with_changes(run, changes)


def with_changes(run: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`run` in place with dotted keys, written with `__`, set to other values."""
    for key, value in changes.items():
        *sections, last = key.split("__")
        target = run
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return run


def write_run(run: dict[str, Any]) -> Path:
    path = Path(run["output_dir"]) / f"{run['name']}.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def run_ranks(
    runs: Sequence[dict[str, Any]], world_size: int, *, worker: Path = WORKER, timeout_s: float = 280.0
) -> None:
    """Make several runs on `world_size` processes that stay the same; a failure shows the ranks' output."""
    directory = Path(runs[0]["output_dir"])
    files = [str(write_run(run)) for run in runs]
    store = directory / f"store-{runs[0]['name']}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": str(world_size)}
    logs = [directory / f"{runs[0]['name']}-rank-{rank}.log" for rank in range(world_size)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(store), str(rank), str(world_size), *files],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)


def steps_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The step records of a run, in order."""
    path = Path(run["output_dir"]) / run["name"] / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["event"] == "step"]


def harness(*arguments: str, timeout_s: float = 240.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run(
        [sys.executable, "-m", "harness", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def same_state(left: Path, right: Path) -> bool:
    """True if two checkpoints hold the same parameters and moments, bit for bit, however they are cut up."""
    first, second = CheckpointTensors(left), CheckpointTensors(right)
    assert first.shapes == second.shapes
    assert any(kind != MASTER for _, kind in first.shapes)
    return all(torch.equal(first.whole(*key), second.whole(*key)) for key in first.shapes)
