"""Checkpoint directories as plain files, and tensors that are cut one way and read another."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from harness.checkpoint import store as store_module
from harness.checkpoint.state import CheckpointTensors, _agreed, _write_errors_explained, newest
from harness.checkpoint.store import LATEST, MANIFEST, Checkpoint, CheckpointStore, record_file
from harness.errors import DataError, HarnessError, ResourceError

CONTENTS = {"rank-00000.json": b"[]\n", "rank-00000-0000.safetensors": bytes(range(256)) * 8}
STATE = {"step": 2, "best": {"1": 0.1 + 0.2}, "data_digest": "é", "best_value": None}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def commit(store: CheckpointStore, step: int, contents: dict[str, bytes] = CONTENTS) -> Checkpoint:
    directory = store.begin(step)
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return store.commit(step, [record_file(directory / name) for name in reversed(contents)], STATE | {"step": step})


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_is_committed_is_read_back(store: CheckpointStore) -> None:
    assert store.newest() == (None, [])
    assert store.steps() == []
    made = commit(store, 2)
    assert made.num_bytes == sum(map(len, CONTENTS.values()))
    assert store.newest() == (made, [])
    assert store.open(2) == made == CheckpointStore(store.root).open(2)
    assert made.state == STATE
    assert snapshot(store.root).keys() == {LATEST, *(f"step-00000002/{name}" for name in (*CONTENTS, MANIFEST))}
    assert (store.root / LATEST).read_text() == "step-00000002\n"
    assert not store.temporary(2).exists()


def test_steps_are_ordered_as_numbers_and_other_names_are_left_alone(store: CheckpointStore) -> None:
    for step in (100_000_000, 99_999_999, 3):
        commit(store, step)
    for name in ("step-3", "step-000000004", "step-00000003.old", "step-" + "\u0661" * 8, "other"):
        (store.root / name).mkdir()
    (store.root / "step-00000009").write_text("a file")
    before = set(store.root.iterdir())
    assert store.steps() == [3, 99_999_999, 100_000_000]
    store.remove_leftovers()
    store.retain(100_000_000, num_last=1, best=[])
    assert set(store.root.iterdir()) == before - {store.root / "step-00000003", store.root / "step-99999999"}


def test_a_save_that_was_cut_short_is_no_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each place between the first byte and the pointer."""
    commit(store, 2)

    class Killed(BaseException):
        pass

    places = ("checkpoint.before_manifest", "checkpoint.before_rename", "checkpoint.before_pointer")
    for place in places:

        def strike(name: str, place: str = place) -> None:
            if name == place:
                raise Killed

        monkeypatch.setattr(store_module, "fault_point", strike)
        with pytest.raises(Killed):
            commit(store, 4)
        newest, passed_over = store.newest()
        assert newest is not None
        assert newest.step == (4 if place == places[-1] else 2)
        assert passed_over == []
        store.remove_leftovers()
        assert {path.name for path in store.root.iterdir()} <= {LATEST, "step-00000002", "step-00000004"}
    assert (store.root / LATEST).read_text() == "step-00000002\n"
    assert CheckpointStore(store.root).open(4).files == store.open(2).files


def test_leftovers_are_removed_and_nothing_else(store: CheckpointStore) -> None:
    commit(store, 2)
    before = snapshot(store.root)
    (store.begin(4) / "rank-00000-0000.safetensors").write_bytes(b"half")
    (store.root / ".step-00000001.removed.tmp" / "deep").mkdir(parents=True)
    (store.root / ".latest.0123.tmp").write_text("st")
    (store.root / "step-00000002" / ".manifest.json.0123.tmp").write_text("{")
    store.remove_leftovers()
    assert snapshot(store.root) == before
    assert {path.name for path in store.root.iterdir()} == {LATEST, "step-00000002"}


def test_begin_takes_nothing_over_from_an_earlier_try(store: CheckpointStore) -> None:
    (store.begin(4) / "rank-00001.json").write_bytes(b"old")
    assert not list(store.begin(4).iterdir())
    store.discard(4)
    store.discard(4)
    assert not list(store.root.iterdir())


def test_amending_changes_the_state_and_no_file(store: CheckpointStore) -> None:
    commit(store, 2)
    before = snapshot(store.root)
    store.amend(2, {"best_value": 1.5, "new": [1]})
    checkpoint = store.open(2)
    assert checkpoint.state == STATE | {"best_value": 1.5, "new": [1]}
    after = snapshot(store.root)
    manifest = f"step-00000002/{MANIFEST}"
    assert after.pop(manifest) != before.pop(manifest)
    assert after == before


@pytest.mark.parametrize(
    ("step", "num_last", "best", "left"),
    [
        (10, 2, [], [8, 10]),
        (10, 1, [], [10]),
        (10, 9, [], [2, 4, 6, 8, 10]),
        (10, 1, [4], [4, 10]),
        (10, 2, [4, 10], [4, 8, 10]),
        (10, 1, [4, 5], [4, 10]),
        (6, 1, [], [6, 8, 10]),  # 8 and 10 were broken: the run went on from an older one
        (6, 2, [2], [2, 4, 6, 8, 10]),
    ],
)
def test_retention(store: CheckpointStore, step: int, num_last: int, best: list[int], left: list[int]) -> None:
    for one in (2, 4, 6, 8, 10):
        commit(store, one)
    store.retain(step, num_last=num_last, best=best)
    assert store.steps() == left
    assert all(store.open(one).step == one for one in left)
    assert not list(store.root.glob(".*"))


# How a checkpoint is damaged -> what the message says. Each gets the checkpoint's directory.


def edit_manifest(directory: Path, change: Callable[[Any], Any], *, forge: bool = False) -> None:
    """Change the manifest; `forge`: with a sha256 of its own that fits."""
    path = directory / MANIFEST
    content = json.loads(path.read_text())
    content = change(content) or content
    if forge:
        content.pop("sha256", None)
        content["sha256"] = store_module._digest(content)
    path.write_text(json.dumps(content))


def shard(directory: Path) -> Path:
    return directory / "rank-00000-0000.safetensors"


def truncate(directory: Path) -> None:
    with shard(directory).open("r+b") as file:
        file.truncate(2000)


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def name_file(name: Any) -> Callable[[Path], None]:
    return lambda directory: edit_manifest(directory, lambda m: m["files"][0].update(name=name), forge=True)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "0000.safetensors: the file has 2000 bytes, its manifest says 2048"),
    "emptied": (lambda d: shard(d).write_bytes(b""), "0000.safetensors: the file has 0 bytes"),
    "extra bytes": (lambda d: shard(d).write_bytes(shard(d).read_bytes() + b"\0"), "has 2049 bytes"),
    "a flipped bit": (lambda d: flip_bit(shard(d), 1000), "0000.safetensors: the file's sha256 differs"),
    "index changed": (lambda d: (d / "rank-00000.json").write_bytes(b"{}\n"), "00000.json: the file's sha256 differs"),
    "missing": (lambda d: shard(d).unlink(), "0000.safetensors: the file is missing"),
    "a directory": (lambda d: (shard(d).unlink(), shard(d).mkdir()), "the file is missing"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "manifest.json: cannot read the file"),
    "empty manifest": (lambda d: (d / MANIFEST).write_bytes(b""), "manifest.json:1: not JSON"),
    "manifest cut": (lambda d: (d / MANIFEST).write_bytes((d / MANIFEST).read_bytes()[:-9]), "not JSON"),
    "manifest not text": (lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe"), "not UTF-8"),
    "manifest of zeros": (lambda d: (d / MANIFEST).write_bytes(bytes(500)), "not JSON"),
    "manifest is a list": (lambda d: (d / MANIFEST).write_text("[]"), "not a checkpoint manifest"),
    "manifest is null": (lambda d: (d / MANIFEST).write_text("null"), "not a checkpoint manifest"),
    "manifest without anything": (lambda d: (d / MANIFEST).write_text("{}"), "not a checkpoint manifest"),
    "another format": (lambda d: edit_manifest(d, lambda m: m.update(format=2)), "its format is 2, not 4"),
    "state changed": (lambda d: edit_manifest(d, lambda m: m["state"].update(best_value=9.0)), "has been changed"),
    "sha256 left out": (lambda d: edit_manifest(d, lambda m: m.pop("sha256") and None), "not a checkpoint manifest"),
    "of another step": (lambda d: (d / MANIFEST).write_bytes(
        (d.with_name("step-00000002") / MANIFEST).read_bytes()), "it is the manifest of step 2"),
    "forged, no files": (lambda d: edit_manifest(d, lambda m: m.pop("files") and None, forge=True), "not a checkpoint"),
    "path up": (name_file("../step-00000002/rank-00000.json"), "'../step-00000002/rank-00000.json' is not a plain"),
    "absolute path": (name_file("/etc/passwd"), "'/etc/passwd' is not a plain file name"),
    "no path": (name_file(""), "the file is missing"),
    "parent": (name_file(".."), "the file is missing"),
    "name no text": (name_file(7), "not a checkpoint manifest"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_passed_over_and_an_older_one_used(store: CheckpointStore, damage: str) -> None:
    older, newer = commit(store, 2), commit(store, 4)
    apply, message = DAMAGES[damage]
    apply(newer.directory)
    before = snapshot(store.root)

    checkpoint, passed_over = store.newest()

    assert checkpoint == older
    assert len(passed_over) == 1
    assert message in passed_over[0]
    assert "step-00000004" in passed_over[0]
    assert snapshot(store.root) == before
    with pytest.raises(DataError, match=re.escape(message)):
        store.open(4)
    assert commit(store, 4) == newer == store.newest()[0], "a new save of the step replaces the broken one"
    assert not list(store.root.glob(".*"))


def test_all_broken_is_an_error_that_lists_them_and_deletes_nothing(store: CheckpointStore) -> None:
    for step in (2, 4, 6):
        commit(store, step)
    truncate(store.root / "step-00000002")
    flip_bit(shard(store.root / "step-00000004"), 0)
    (store.root / "step-00000006" / MANIFEST).unlink()
    before = snapshot(store.root)
    with pytest.raises(DataError) as caught:
        store.newest()
    text = str(caught.value)
    expected = ["step-00000006/manifest.json", "step-00000004/rank", "step-00000002/rank", "step 0"]
    positions = [text.index(part) for part in expected]
    assert positions == sorted(positions)
    assert snapshot(store.root) == before


@pytest.mark.parametrize("pointer", [None, "", "step-00000008\n", "step-00000002\n", "../../etc\n", "\0"])
def test_the_pointer_is_for_people_only(store: CheckpointStore, pointer: str | None) -> None:
    commit(store, 2)
    newer = commit(store, 4)
    (store.root / LATEST).unlink()
    if pointer is not None:
        (store.root / LATEST).write_text(pointer)
    assert store.newest() == (newer, [])


def test_ranks_verify_shares_of_the_files(store: CheckpointStore) -> None:
    checkpoint = commit(store, 2)
    flip_bit(shard(checkpoint.directory), 0)
    assert checkpoint.files[0]["name"] == shard(checkpoint.directory).name
    with pytest.raises(DataError):
        store.open(2, slice(0, None, 2))
    assert store.open(2, slice(1, None, 2)) == checkpoint
    assert store.open(2, slice(5, None, 8)) == checkpoint


# Tensors: pieces of flattened parameters in the files of any number of ranks.


@st.composite
def cuts(draw: st.DrawFn, numel: int) -> list[tuple[int, int]]:
    """[0, numel) as consecutive (start, numel)."""
    inner = draw(st.sets(st.integers(1, max(1, numel - 1)), max_size=6)) if numel > 1 else set()
    return [(low, high - low) for low, high in pairwise([0, *sorted(inner), numel])]


def commit_pieces(
    store: CheckpointStore, pieces: list[list[tuple[str, str, Tensor, int, int]]], step: int = 2
) -> CheckpointTensors:
    """One file and index for each rank's pieces: (name, kind, whole tensor, start, numel)."""
    directory = store.begin(step)
    for rank, ours in enumerate(pieces):
        file = f"rank-{rank:05d}-0000.safetensors"
        tensors, index = {}, []
        for name, kind, whole, start, numel in ours:
            key = f"{name}|{kind}|{start}|{len(index)}"
            tensors[key] = whole.reshape(-1)[start : start + numel].clone()
            index.append({"name": name, "kind": kind, "shape": list(whole.shape), "start": start, "numel": numel,
                          "file": file, "key": key, "updates": step})  # fmt: skip
        save_file(tensors, directory / file)
        (directory / f"rank-{rank:05d}.json").write_text(json.dumps(index))
    names = sorted(path.name for path in directory.iterdir())
    return CheckpointTensors(store.commit(step, [record_file(directory / name) for name in names], STATE).directory)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_is_read_in_any_other_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3))
    world_size = data.draw(st.integers(1, 4))
    wholes, pieces = {}, [[] for _ in range(world_size)]
    for number, shape in enumerate(shapes):
        for kind in ("master", "exp_avg"):
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(number * 2 + len(kind)))
            wholes[f"layer.{number}", kind] = whole
            for start, numel in data.draw(cuts(whole.numel())):
                rank = data.draw(st.integers(0, world_size - 1))
                pieces[rank].append((f"layer.{number}", kind, whole, start, numel))

    tensors = commit_pieces(CheckpointStore(tmp_path_factory.mktemp("cut")), pieces)

    assert tensors.names() == sorted({name for name, _ in wholes})
    for (name, kind), whole in wholes.items():
        assert tensors.shapes[name, kind] == tuple(whole.shape)
        assert tensors.moments(name) == ["exp_avg"]
        assert tensors.num_updates[name] == 2
        assert torch.equal(tensors.whole(name, kind), whole)
        for start, numel in data.draw(cuts(whole.numel())):
            assert torch.equal(tensors.read(name, kind, start, numel), whole.reshape(-1)[start : start + numel])
        assert tensors.read(name, kind, whole.numel(), 0).numel() == 0


def test_what_is_not_stored_is_an_error_even_if_something_else_is_there_twice(store: CheckpointStore) -> None:
    whole = torch.arange(10.0)
    twice = [("w", "master", whole, 0, 5), ("w", "master", whole, 0, 5)]
    tensors = commit_pieces(store, [twice, [("w", "master", whole, 8, 2)]])
    assert torch.equal(tensors.read("w", "master", 1, 4), whole[1:5])
    assert torch.equal(tensors.read("w", "master", 8, 2), whole[8:])
    for start, numel, missing in [(0, 10, "5 to 10"), (5, 3, "5 to 8"), (4, 3, "5 to 7"), (8, 3, "10 to 11")]:
        with pytest.raises(DataError, match=f"elements {missing} of w \\(master\\) are not stored"):
            tensors.read("w", "master", start, numel)
    with pytest.raises(DataError, match="exp_avg"):
        tensors.read("w", "exp_avg", 0, 1)


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_files_that_are_not_in_the_manifest_are_never_opened(store: CheckpointStore, tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    directory = commit_pieces(store, [[("w", "master", whole, 0, 6)]]).directory
    payload = pickle.dumps(Trap(tmp_path / "executed"))
    for name in ("rank-00000.pt", "pytorch_model.bin", "optimizer.pt", "rank-00001-0000.safetensors", "state.pkl"):
        (directory / name).write_bytes(payload)
    (directory / "rank-00001.json").write_bytes(payload)
    store.open(2)
    tensors = CheckpointTensors(directory)
    assert tensors.names() == ["w"]
    assert torch.equal(tensors.whole("w"), whole)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("file", ["../secret.safetensors", "rank-00009-0000.safetensors", "/etc/passwd"])
def test_an_index_names_only_files_of_the_manifest(store: CheckpointStore, tmp_path: Path, file: str) -> None:
    save_file({"w|master": torch.zeros(4)}, store.root.parent / "secret.safetensors")
    directory = store.begin(2)
    entry = {"name": "w", "kind": "master", "shape": [4], "start": 0, "numel": 4, "file": file, "key": "w|master"}
    (directory / "rank-00000.json").write_text(json.dumps([entry]))
    committed = store.commit(2, [record_file(directory / "rank-00000.json")], STATE).directory
    with pytest.raises(DataError, match=re.escape(repr(file))):
        CheckpointTensors(committed)


class Pair:
    """Two ranks of which this is the first; the other one has these answers when values are gathered."""

    is_first, rank, world_size = True, 0, 2

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def gather(self, value: Any) -> list[Any]:
        return json.loads(json.dumps([value, self.answers.pop(0)]))

    def sum(self, values: list[float]) -> list[float]:
        return [2 * value for value in values]


@pytest.mark.parametrize("is_other", [True, False])
@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, ResourceError, "No space left on device; it needs 2,000 bytes"),
        (errno.EDQUOT, ResourceError, "it needs 2,000 bytes"),
        (errno.EROFS, HarnessError, "Read-only file system"),
    ],
)
def test_ranks_agree_that_a_save_failed(
    store: CheckpointStore, is_other: bool, number: int, kind: type[HarnessError], text: str
) -> None:
    """The rank that failed and the one that did not raise the same, and nothing of the save is left."""
    store.begin(4)
    processes: Any = Pair([number, os.strerror(number)] if is_other else None)

    def write() -> None:
        if not is_other:
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    with pytest.raises(HarnessError) as caught, _write_errors_explained(store, processes, 4, 1000):
        _agreed(processes, write)
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert str(store.root) in str(caught.value)
    assert not list(store.root.iterdir())


def test_ranks_agree_on_the_checkpoint(store: CheckpointStore) -> None:
    """Each sees the files it verifies; the first decides which checkpoints there are."""
    assert newest(store, Pair([2])) == (None, [])
    older, newer = commit(store, 2), commit(store, 4)
    assert newest(store, Pair([2], None)) == (newer, [])
    assert newest(store, Pair([], "seen by the other", None)) == (older, ["seen by the other"])
    shard(newer.directory).unlink()
    assert newest(store, Pair([], None, None))[0] == older
    with pytest.raises(DataError, match="seen by the other"):
        newest(store, Pair([], None, "seen by the other"))
