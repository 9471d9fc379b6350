"""A run that is killed and started again ends with the weights of the run that was not, bit for bit (float32, CPU)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs import SHARD_ALL, harness, run_ranks, same_state, steps_of, tiny_run, write_run

pytestmark = pytest.mark.slow

PRESETS = ("zero0", "zero1", "zero2", "zero3")
NUM_STEPS = 10


def run_of(directory: Path, model: Path, *, name: str, preset: str) -> dict[str, Any]:
    return tiny_run(
        directory, model, name=name,
        deepspeed={"preset": preset, "overrides": SHARD_ALL if preset == "zero3" else {}},
        model__dropout=0.1, schedule__steps=NUM_STEPS,
        checkpoint__every_steps=2, checkpoint__keep_last=2, launch__processes=2, launch__max_restarts=0,
    )  # fmt: skip


def final_checkpoint(run: dict[str, Any]) -> Path:
    return Path(run["output_dir"]) / run["name"] / "checkpoints" / f"step-{NUM_STEPS:08d}"


def no_process_mentions(text: str) -> bool:
    return not any(text in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


@pytest.fixture(scope="module")
def unbroken(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One run for each ZeRO stage that nothing happens to."""
    directory = tmp_path_factory.mktemp("unbroken")
    runs = {preset: run_of(directory, tiny_models["mbart"], name=preset, preset=preset) for preset in PRESETS}
    run_ranks(list(runs.values()), world_size=2)
    return runs


@pytest.mark.parametrize("preset", PRESETS)
def test_killed_in_the_first_and_in_a_later_epoch(
    preset: str, unbroken: dict[str, dict[str, Any]], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = run_of(tmp_path, tiny_models["mbart"], name="run", preset=preset)
    command = ("train", str(write_run(run)))

    started = time.monotonic()
    killed = harness(*command, HARNESS_FAULT="step:3", HARNESS_FAULT_RANK="1")
    assert time.monotonic() - started < 60
    assert killed.returncode == 1
    assert "rank 1 was killed by SIGKILL" in killed.stderr
    assert "checkpoint of step 2" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert no_process_mentions(str(tmp_path))

    killed = harness(*command, HARNESS_FAULT="step:6", HARNESS_FAULT_RANK="0")
    assert killed.returncode == 1
    assert steps_of(run)[-1]["epoch"] >= 1

    finished = harness(*command)
    assert finished.returncode == 0, finished.stderr
    assert same_state(final_checkpoint(run), final_checkpoint(unbroken[preset]))
    assert [step["row_digest"] for step in steps_of(run)] == [step["row_digest"] for step in steps_of(unbroken[preset])]
    assert [step["loss"] for step in steps_of(run)] == [step["loss"] for step in steps_of(unbroken[preset])]


@pytest.mark.parametrize(
    "place",
    ["before_shard", "after_shard", "before_manifest", "before_rename", "before_pointer"],
)
def test_killed_while_saving(
    place: str, unbroken: dict[str, dict[str, Any]], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run = run_of(tmp_path, tiny_models["mbart"], name="run", preset="zero2")
    command = ("train", str(write_run(run)))
    checkpoints = Path(run["output_dir"]) / run["name"] / "checkpoints"

    killed = harness(*command, HARNESS_FAULT=f"checkpoint.{place}:2", HARNESS_FAULT_RANK="0")
    assert killed.returncode == 1
    committed = sorted(path.name for path in checkpoints.glob("step-*"))
    assert committed == ["step-00000002"] + ["step-00000004"] * (place == "before_pointer")

    finished = harness(*command)
    assert finished.returncode == 0, finished.stderr
    assert f"from {committed[-1]}" in finished.stdout
    assert not list(checkpoints.glob(".step-*"))
    assert same_state(final_checkpoint(run), final_checkpoint(unbroken["zero2"]))
