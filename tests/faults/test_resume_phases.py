"""A run whose layers are thawed by and by, killed beside a phase's end, ends as the run that was not, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from harness.checkpoint.state import CheckpointTensors
from tests.runs import SHARD_ALL, harness, run_ranks, same_state, steps_of, tiny_run, write_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Runs = dict[str, dict[str, Any]]
NUM_STEPS, BOUNDARY = 6, 3
RULES = [{"embeddings": True}, {"encoder": "all", "until_step": BOUNDARY}, {"decoder": "0", "until_step": BOUNDARY}]
# In the last step of the first phase (it goes on from step 2), or in the first of the second (from the phase's end).
KILLED_IN = {"zero0": 4, "zero1": 3, "zero2": 4, "zero3": 3}


def runs_in(directory: Path, model: Path) -> Runs:
    return {
        preset: tiny_run(
            directory, model, name=preset, freeze=RULES,
            deepspeed={"preset": preset, "overrides": SHARD_ALL if preset == "zero3" else {}},
            model__dropout=0.1, optimizer__layer_decay=0.8, schedule__steps=NUM_STEPS,
            checkpoint__every_steps=2, checkpoint__keep_last=9, launch__processes=2, launch__max_restarts=0,
        )
        for preset in KILLED_IN
    }  # fmt: skip


def checkpoint(run: dict[str, Any], step: int = NUM_STEPS) -> Path:
    return Path(run["output_dir"]) / run["name"] / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def unbroken(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = runs_in(tmp_path_factory.mktemp("unbroken"), tiny_models["mbart"])
    run_ranks(list(runs.values()), world_size=2)
    return runs


@pytest.fixture(scope="module")
def resumed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = runs_in(tmp_path_factory.mktemp("resumed"), tiny_models["mbart"])
    for preset, run in runs.items():
        killed = harness(
            "train", str(write_run(run)), HARNESS_FAULT=f"step:{KILLED_IN[preset]}", HARNESS_FAULT_RANK="1"
        )
        assert killed.returncode == 1, killed.stderr
        assert "rank 1 was killed by SIGKILL" in killed.stderr
        assert [checkpoint(run, step).is_dir() for step in (2, 3, 4)] == [True, KILLED_IN[preset] > BOUNDARY, False]
    run_ranks(list(runs.values()), world_size=2)
    return runs


@pytest.mark.parametrize("preset", KILLED_IN)
def test_killed_beside_the_end_of_a_phase(preset: str, unbroken: Runs, resumed: Runs) -> None:
    ours, theirs = resumed[preset], unbroken[preset]
    for key in ("row_digest", "loss", "grad_norm", "learning_rate"):
        assert [step[key] for step in steps_of(ours)] == [step[key] for step in steps_of(theirs)], key
    assert same_state(checkpoint(ours), checkpoint(theirs))


@pytest.mark.parametrize("preset", KILLED_IN)
def test_each_phase_trains_its_parameters_and_no_others(preset: str, unbroken: Runs) -> None:
    run = unbroken[preset]
    before, after = (CheckpointTensors(checkpoint(run, step)) for step in (BOUNDARY, NUM_STEPS))
    thawed = set(after.names()) - set(before.names())
    assert thawed == {name for name in after.names() if "encoder.layers" in name or "decoder.layers.0." in name}
    assert {after.num_updates[name] for name in thawed} == {NUM_STEPS - BOUNDARY}
    assert {after.num_updates[name] for name in before.names()} == {NUM_STEPS}


@pytest.mark.parametrize("preset", KILLED_IN)
def test_the_exported_model_has_trained_and_frozen_weights(preset: str, unbroken: Runs) -> None:
    run = unbroken[preset]
    trained = CheckpointTensors(checkpoint(run))
    base = weights(Path(run["model"]["path"]))
    exported = weights(Path(run["output_dir"]) / preset / "export")
    assert exported.keys() == base.keys()
    for name, weight in exported.items():
        expected = trained.whole(name) if name in trained.names() else base[name]
        assert weight.equal(expected), name
    assert {name for name in base if name not in trained.names() and "embed" not in name and "shared" not in name} <= {
        "final_logits_bias"
    }


def weights(directory: Path) -> dict[str, Any]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_phase_is_told(unbroken: Runs) -> None:
    log = Path(unbroken["zero0"]["output_dir"]) / "zero0"
    records = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["event"] == "checkpoint"] == [2, 3, 4, 6]
