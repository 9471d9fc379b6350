"""Runs that come back to damaged checkpoints, to other data or another model, on another layout, or to a full disk.

Most of it happens in three starts of ranks that make many short runs, each from its own damaged copy of one run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.checkpoint.state import CheckpointTensors
from harness.checkpoint.store import LATEST, MANIFEST, CheckpointStore
from harness.errors import ExitCode
from tests.pairs import PAIRS
from tests.runs import harness, run_ranks, same_state, steps_of, tiny_run, write_pairs, write_run
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow

NUM_STEPS = 8


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def shard(checkpoint: Path, rank: int = 0) -> Path:
    return checkpoint / f"rank-{rank:05d}-0000.safetensors"


def edit_state(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["state"]["world_size"] = 1
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def leave_leftovers(checkpoint: Path) -> None:
    """A newer save that was killed, a removal that was killed, a pointer to nowhere."""
    shutil.copytree(checkpoint, checkpoint.parent / ".step-00000006.tmp")
    shutil.copytree(checkpoint, checkpoint.parent / ".step-00000001.removed.tmp")
    (checkpoint.parent / LATEST).write_text("step-00000006\n")


# What happens to the newest checkpoint, that of step 4 -> what the user is told, or None: nothing, it is used.
MENDED: dict[str, tuple[Callable[[Path], Any], str | None]] = {
    "truncated": (lambda c: cut(shard(c)), "rank-00000-0000.safetensors: the file has"),
    "flipped": (lambda c: flip(shard(c, 1)), "rank-00001-0000.safetensors: the file's sha256 differs"),
    "index-cut": (lambda c: cut(c / "rank-00001.json"), "rank-00001.json: the file has"),
    "rank-missing": (lambda c: shard(c, 1).unlink(), "rank-00001-0000.safetensors: the file is missing"),
    "manifest-cut": (lambda c: cut(c / MANIFEST), "manifest.json"),
    "state-edited": (edit_state, "manifest.json: the manifest's sha256 differs"),
    "pointer-empty": (lambda c: (c.parent / LATEST).write_bytes(b""), None),
    "leftovers": (leave_leftovers, None),
}


class Runs:
    """One run of 8 steps that nothing happens to, and copies of it as it was after 4 steps."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.directory, self.model = directory, model
        self.whole = self.run("whole")

    def run(self, name: str, **changes: Any) -> dict[str, Any]:
        saving = {"every_steps": 2, "keep_last": 4}
        changes = {"deepspeed__preset": "zero2", "schedule__steps": NUM_STEPS, "checkpoint": saving} | changes
        return tiny_run(self.directory, self.model, name=name, **changes)

    def copy(self, name: str, steps: tuple[int, ...] = (2, 4), source: str = "whole", **changes: Any) -> dict[str, Any]:
        for step in steps:
            checkpoint = self.checkpoint(source, step)
            shutil.copytree(checkpoint, self.checkpoint(name, step))
        (self.store(name) / LATEST).write_text(f"step-{steps[-1]:08d}\n")
        shutil.copy(self.directory / source / "metrics.jsonl", self.directory / name)
        return self.run(name, **changes)

    def store(self, name: str) -> Path:
        return self.directory / name / "checkpoints"

    def checkpoint(self, name: str, step: int) -> Path:
        return self.store(name) / f"step-{step:08d}"

    def errors(self, name: str) -> list[str]:
        return [path.read_text() for path in sorted((self.directory / name).glob("error-*.txt"))]


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("damage"), tiny_models["mbart"])
    run_ranks([made.whole], world_size=2)

    alone = made.copy("alone", deepspeed__preset="zero3")
    run_ranks([alone], world_size=1)

    back = made.copy("back", (4, 6), source="alone")
    damaged = []
    for name, (damage, _) in MENDED.items():
        damaged.append(made.copy(name))
        damage(made.checkpoint(name, 4))
    lost = made.copy("all-broken")
    flip(shard(made.checkpoint("all-broken", 2)))
    cut(made.checkpoint("all-broken", 4) / MANIFEST)
    changed = write_pairs(made.directory / "changed.tsv", [*PAIRS[:-1], ("Good evening.", "Guten Abend.")])
    other_rows = made.copy("other-rows", data__train=[{"path": str(changed)}])
    wider = make_tiny_model("mbart", made.directory / "wider", d_model=48)
    other_model = made.copy("other-model", model__path=str(wider))
    run_ranks([back, *damaged, lost, other_rows, other_model], world_size=2, timeout_s=600)
    return made


@pytest.mark.parametrize("name", MENDED)
def test_the_newest_whole_checkpoint_is_used(runs: Runs, name: str) -> None:
    message = MENDED[name][1]
    assert not runs.errors(name)
    metrics = (runs.directory / name / "metrics.jsonl").read_text()
    assert f'"reason": "from step-0000000{2 if message else 4}"' in metrics
    assert same_state(runs.checkpoint(name, NUM_STEPS), runs.checkpoint("whole", NUM_STEPS))
    log = (runs.directory / "back-rank-0.log").read_text()
    told = [line for line in log.splitlines() if f"/{name}/" in line and "a checkpoint was passed over" in line]
    assert len(told) == bool(message)
    assert not message or message in told[0]
    store = CheckpointStore(runs.store(name))
    assert [store.open(step).step for step in store.steps()] == [2, 4, 6, 8], "the broken one is replaced"
    assert not list(store.root.glob(".*"))


def test_all_broken_never_starts_from_the_beginning(runs: Runs) -> None:
    for error in runs.errors("all-broken"):
        assert error.startswith("DataError: ")
        assert "no checkpoint of this run can be used" in error
        assert error.index("step-00000004/manifest.json") < error.index("step-00000002/rank-00000-0000.safetensors")
    assert len(runs.errors("all-broken")) == 2
    assert CheckpointStore(runs.store("all-broken")).steps() == [2, 4]


def test_other_rows_are_refused(runs: Runs) -> None:
    assert len(runs.errors("other-rows")) == 2
    for error in runs.errors("other-rows"):
        assert error.startswith("DataError: ")
        assert "the training rows have changed" in error
        assert "  -> bring the old data back" in error


def test_another_model_is_refused(runs: Runs) -> None:
    assert len(runs.errors("other-model")) == 2
    for error in runs.errors("other-model"):
        assert error.startswith("DataError: ")
        assert "the checkpoint is of another model" in error
        assert "32) in the checkpoint and (" in error
        assert "48) in the model" in error
    assert CheckpointStore(runs.store("other-model")).steps() == [2, 4]


@pytest.mark.parametrize("name", ["alone", "back"])
def test_another_world_size_and_stage_go_the_same_way(runs: Runs, name: str) -> None:
    """Two ranks of ZeRO-2, from step 4 one of ZeRO-3 (`alone`), from step 6 two of ZeRO-2 again (`back`)."""
    assert not runs.errors(name)
    ours, theirs = steps_of(runs.run(name)), steps_of(runs.whole)
    assert [step["row_digest"] for step in ours] == [step["row_digest"] for step in theirs]
    assert [step["learning_rate"] for step in ours] == [step["learning_rate"] for step in theirs]
    assert [step["loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], rel=1e-5)
    left = CheckpointTensors(runs.checkpoint(name, NUM_STEPS))
    right = CheckpointTensors(runs.checkpoint("whole", NUM_STEPS))
    assert left.shapes == right.shapes
    for key in left.shapes:
        torch.testing.assert_close(left.whole(*key), right.whole(*key), rtol=1e-5, atol=1e-5)


def test_the_command_tells_of_changed_rows_and_of_broken_checkpoints(runs: Runs, tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, runs.model, name="run",
        schedule__steps=NUM_STEPS, deepspeed__preset="zero2", launch__processes=2, checkpoint={"every_steps": 2},
    )  # fmt: skip
    for step in (2, 4):
        shutil.copytree(runs.checkpoint("whole", step), tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    write_pairs(tmp_path / "pairs.tsv", PAIRS[1:])
    refused = harness("train", str(write_run(run)))
    assert refused.returncode == ExitCode.DATA
    assert "the training rows have changed since this checkpoint was written" in refused.stderr
    assert "bring the old data back, or give the run a new name" in refused.stderr

    for step in (2, 4):
        flip(shard(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
    refused = harness("train", str(write_run(run)))
    assert refused.returncode == ExitCode.DATA
    assert "no checkpoint of this run can be used" in refused.stderr
    assert refused.stderr.count("its content has changed") == 2
    assert "Traceback" not in refused.stderr + refused.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own for checkpoints, of so many bytes; called again, it gets another size."""
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)

    def resize(num_bytes: int) -> Path:
        how = ["-o", f"size={num_bytes},remount"] if root.is_mount() else ["-t", "tmpfs", "-o", f"size={num_bytes}"]
        done = subprocess.run(["mount", *how, "tmpfs", str(root)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return root

    yield resize
    if root.is_mount():
        subprocess.run(["umount", str(root)], check=True)


def test_full_disk(runs: Runs, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    whole = CheckpointStore(runs.store("whole")).open(NUM_STEPS)
    root = small_disk(whole.num_bytes * 5 // 2)
    run = tiny_run(
        tmp_path, runs.model, name="run",
        schedule__steps=NUM_STEPS, deepspeed__preset="zero2", launch__processes=2,
        checkpoint={"every_steps": 2, "keep_last": 4},
    )  # fmt: skip
    command = ("train", str(write_run(run)))
    full = harness(*command)
    assert full.returncode == ExitCode.RESOURCES, full.stderr
    store = CheckpointStore(root)
    assert store.steps() == [2, 4]
    assert store.newest()[0] == store.open(4)
    assert {path.name for path in root.iterdir()} == {LATEST, "step-00000002", "step-00000004"}
    assert f"{root}: the checkpoint of step 6 could not be written: No space left on device; it needs " in full.stderr
    needed, free = (
        int(text.split()[0].replace(",", "")) for text in full.stderr.split("it needs ")[1].split(" bytes, ")[:2]
    )
    assert 0.8 * whole.num_bytes < needed < 1.2 * whole.num_bytes
    assert 0 < free < needed
    assert "resumes from the checkpoint of step 4" in full.stderr
    assert "Traceback" not in full.stderr + full.stdout

    small_disk(whole.num_bytes * 6)
    finished = harness(*command)
    assert finished.returncode == 0, finished.stderr
    assert same_state(root / whole.directory.name, whole.directory)
