"""The tensors of a checkpoint: float32 master weights and optimizer moments, independent of stage and world size.

Every rank writes the pieces of parameters that it owns, flattened, one safetensors file per holder (so that the copy
in host memory stays small), and `rank-*.json` says which piece lies where. A reader asks for any range of any
parameter, so a run may come back on another layout.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, FileRecord, record_file
from harness.engine import fragments
from harness.engine.fragments import MASTER, Holder
from harness.engine.moments import moment_sizes, read_moments, set_num_updates, write_moment
from harness.engine.processes import Processes
from harness.errors import DataError, HarnessError, ResourceError
from harness.io import heartbeat
from harness.io.atomic import read_json, write_json
from harness.io.faults import fault_point

T = TypeVar("T")


def save(
    store: CheckpointStore, engine: Any, processes: Processes, *, step: int, state: dict[str, Any]
) -> Checkpoint | None:
    """Write and commit a checkpoint; a collective. Rank 0 gets it back, the others None.

    When a rank cannot write, nothing is left of it and all ranks raise ResourceError (no room) or HarnessError.
    """
    holders = _holders_to_write(engine, processes)
    with _write_errors_explained(store, processes, step, _num_bytes(holders, fragments.base_optimizer(engine))):
        _agreed(processes, partial(store.begin, step) if processes.is_first else _nothing)
        fault_point("checkpoint.before_shard")
        records = _agreed(processes, partial(_write_rank, store.temporary(step), holders, engine, processes.rank))
        fault_point("checkpoint.after_shard")
        files = [record for part in processes.gather(records) for record in part]
        state = {**state, "world_size": processes.world_size}
        return _agreed(processes, partial(store.commit, step, files, state) if processes.is_first else _nothing)


def amend(store: CheckpointStore, processes: Processes, *, step: int, state: dict[str, Any]) -> None:
    """Replace entries of the state of a committed checkpoint whose tensors are the present ones; a collective."""
    with _write_errors_explained(store, processes, step, num_bytes=0):
        _agreed(processes, partial(store.amend, step, state) if processes.is_first else _nothing)


def newest(store: CheckpointStore, processes: Processes) -> tuple[Checkpoint | None, list[str]]:
    """`CheckpointStore.newest` with one answer, or one DataError, on all ranks; a collective."""
    return store.newest_of(processes.gather(store.steps())[0], partial(open_together, store, processes))


def open_together(store: CheckpointStore, processes: Processes, step: int) -> Checkpoint:
    """`CheckpointStore.open`; every rank verifies a share of the files, and all raise if one finds a fault."""
    checkpoint, fault = None, None
    try:
        checkpoint = store.open(step, slice(processes.rank, None, processes.world_size))
    except DataError as error:
        fault = str(error)
    if faults := [one for one in processes.gather(fault) if one]:
        raise DataError(faults[0])
    assert checkpoint is not None
    return checkpoint


def load(checkpoint: Checkpoint, engine: Any, *, thawed: Collection[str] = ()) -> None:
    """Put masters and moments back into the optimizer of every rank, and the weights that follow from them.

    Parameters in `thawed` were frozen when the checkpoint was written, so they are not in it: they start from the
    weights that the engine was built with and without moments.
    Raises DataError when the checkpoint is of another model, or holds trained parameters that are frozen now: their
    values could not be kept.
    """
    tensors = CheckpointTensors(checkpoint.directory)
    _check_model(tensors, engine, thawed)
    optimizer = fragments.base_optimizer(engine)
    for holder in fragments.holders(engine):
        heartbeat.beat("load")
        with holder.resident(True):
            _load_holder(holder, tensors, optimizer)
    fragments.publish_masters(engine)


@dataclass(frozen=True)
class _Entry:
    file: str
    key: str
    start: int
    numel: int


class CheckpointTensors:
    """Random access to the tensors of a checkpoint directory by parameter name and kind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self.num_updates: dict[str, int | None] = {}  # of each parameter, for bias correction
        self._entries: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
        files = {record["name"] for record in read_json(directory / MANIFEST)["files"]}
        for index in sorted(name for name in files if name.endswith(".json")):
            for item in read_json(directory / index):
                if item["file"] not in files:
                    raise DataError(f"{item['file']!r} is not a file of the manifest", where=str(directory / index))
                self.shapes[item["name"], item["kind"]] = tuple(item["shape"])
                self.num_updates[item["name"]] = item["updates"]
                entry = _Entry(item["file"], item["key"], item["start"], item["numel"])
                self._entries[item["name"], item["kind"]].append(entry)

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def names(self) -> list[str]:
        """Names of all parameters."""
        return sorted({name for name, _ in self.shapes})

    def moments(self, name: str) -> list[str]:
        """The optimizer's tensors stored for a parameter."""
        return sorted(kind for parameter, kind in self.shapes if parameter == name and kind != MASTER)

    def whole(self, name: str, kind: str = MASTER) -> Tensor:
        """A whole tensor, float32, in its own shape."""
        shape = torch.Size(self.shapes[name, kind])
        return self.read(name, kind, 0, shape.numel()).reshape(shape)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor. Raises DataError if some are not stored."""
        result = torch.empty(numel, dtype=torch.float32)
        position, end = start, start + numel
        for entry in sorted(self._entries.get((name, kind), []), key=lambda entry: entry.start):
            entry_end = min(entry.start + entry.numel, end)
            if entry.start <= position < entry_end:
                piece = self._open(entry.file).get_slice(entry.key)[position - entry.start : entry_end - entry.start]
                result[position - start : entry_end - start] = piece
                position = entry_end
        if position != end:
            what = f"elements {position} to {end} of {name} ({kind}) are not stored"
            raise DataError(what, where=str(self.directory))
        return result

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.directory / file, framework="pt")
        return self._files[file]


def _nothing() -> None:
    """What ranks other than the first do while it works."""


def _agreed(processes: Processes, action: Callable[[], T]) -> T:
    """Run `action` on every rank; when it raises OSError on one, all raise that; a collective."""
    result, failure = None, None
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        failure = _errno_and_reason(error)
    for one in processes.gather(failure):
        if one is not None:
            raise OSError(*one)
    return result  # type: ignore[return-value]  # no failure: it is what `action` returned


def _errno_and_reason(error: OSError | SafetensorError) -> tuple[int, str]:
    """safetensors writes in Rust and gives the system's error as text."""
    if isinstance(error, OSError):
        return error.errno or 0, error.strerror or str(error)
    found = re.search(r"os error (\d+)", str(error))
    return (int(found[1]), os.strerror(int(found[1]))) if found else (0, str(error))


@contextmanager
def _write_errors_explained(store: CheckpointStore, processes: Processes, step: int, num_bytes: int) -> Iterator[None]:
    """Turn the OSError that all ranks raise into an error for the user, after removing what has been written.

    `num_bytes` is what this rank writes.
    """
    try:
        yield
    except OSError as error:
        if processes.is_first:
            store.discard(step)
        needed_bytes = int(processes.sum([num_bytes])[0])
        what = f"the checkpoint of step {step} could not be written: {error.strerror}"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HarnessError(what, where=str(store.root)) from error
        free_bytes = shutil.disk_usage(store.root).free
        raise ResourceError(
            f"{what}; it needs {needed_bytes:,} bytes, {free_bytes:,} are free",
            where=str(store.root),
            hint="free some space (or raise the quota or file size limit), or lower checkpoint.keep_last or keep_best",
        ) from error


def _holders_to_write(engine: Any, processes: Processes) -> list[Holder]:
    """All of this rank's holders, or its share of them when every rank holds the same."""
    holders = fragments.holders(engine)
    return holders[processes.rank :: processes.world_size] if fragments.is_replicated(engine) else holders


def _num_bytes(holders: list[Holder], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of masters and moments."""
    moments = (size for holder in holders for size in moment_sizes(optimizer, holder.tensor).values())
    return 4 * (sum(holder.tensor.numel() for holder in holders) + sum(moments))


def _write_rank(directory: Path, holders: list[Holder], engine: Any, rank: int) -> list[FileRecord]:
    optimizer = fragments.base_optimizer(engine)
    index: list[dict[str, Any]] = []
    records: list[FileRecord] = []
    for number, batch in enumerate(_batched(holders)):
        file = directory / f"rank-{rank:05d}-{number:04d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for holder in batch:
            heartbeat.beat("save")
            with holder.resident(False):
                _collect(holder, optimizer, file.name, tensors, index)
        save_file(tensors, file)
        records.append(record_file(file))
    index_file = directory / f"rank-{rank:05d}.json"
    write_json(index_file, index)
    return [*records, record_file(index_file)]


def _batched(holders: list[Holder], max_numel: int = 1 << 28) -> list[list[Holder]]:
    """Holders grouped into files of about a GiB of masters."""
    batches: list[list[Holder]] = []
    room = 0
    for holder in holders:
        if not batches or holder.numel > room:
            batches.append([])
            room = max_numel
        batches[-1].append(holder)
        room -= holder.numel
    return batches


def _collect(
    holder: Holder, optimizer: torch.optim.Optimizer, file: str, tensors: dict[str, Tensor], index: list[dict[str, Any]]
) -> None:
    parts = {MASTER: holder.tensor, **read_moments(optimizer, holder.tensor)}
    num_updates = holder.num_updates(optimizer)
    for piece in holder.pieces:
        for kind, tensor in parts.items():
            elementwise = tensor.numel() == holder.tensor.numel()  # else a factored moment of a whole parameter
            flat = tensor.detach().reshape(-1)
            if elementwise:
                flat = flat[piece.offset : piece.offset + piece.numel]
            key = f"{piece.name}|{kind}"
            tensors[key] = flat.to("cpu", copy=True)
            index.append({
                "name": piece.name, "kind": kind, "shape": list(piece.shape if elementwise else tensor.shape),
                "start": piece.start if elementwise else 0, "numel": flat.numel(), "file": file, "key": key,
                "updates": num_updates,
            })  # fmt: skip


def _check_model(tensors: CheckpointTensors, engine: Any, thawed: Collection[str]) -> None:
    parameters = dict(engine.module.named_parameters())
    here = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items() if p.requires_grad}
    there = {name: shape for (name, kind), shape in tensors.shapes.items() if kind == MASTER}
    if frozen := sorted(name for name in there.keys() - here.keys() if name in parameters):
        raise DataError(
            f"the checkpoint holds {len(frozen)} trained parameters that are frozen now, such as {frozen[0]}",
            where=str(tensors.directory),
            hint="leave `freeze` as it was, or export the checkpoint and start a new run from that model",
        )
    expected = {name: shape for name, shape in here.items() if name in there or name not in thawed}
    if differing := sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name)):
        first = differing[0]
        raise DataError(
            f"the checkpoint is of another model: {len(differing)} parameters differ; {first} has shape "
            f"{there.get(first)} in the checkpoint and {expected.get(first)} in the model",
            where=str(tensors.directory),
            hint="bring the old model back, or give the run a new name to start again",
        )


def _load_holder(holder: Holder, tensors: CheckpointTensors, optimizer: torch.optim.Optimizer) -> None:
    names = {piece.name for piece in holder.pieces}
    if not names & tensors.num_updates.keys():  # padding alone, or parameters that are trained from now on
        return
    _fill(holder.tensor, MASTER, holder, tensors)
    first = holder.pieces[0]
    kinds = tensors.moments(first.name)
    for kind in kinds:
        if tensors.shapes[first.name, kind] != first.shape:  # factored
            moment = tensors.whole(first.name, kind)
        else:
            moment = torch.zeros(holder.tensor.shape)
            _fill(moment, kind, holder, tensors)
        write_moment(optimizer, holder.tensor, kind, moment)
    # Parameters in one holder are trained since the same step (engine/groups.py).
    (num_updates,) = {tensors.num_updates[name] for name in names}
    if kinds and num_updates is not None:
        set_num_updates(optimizer, holder.tensor, num_updates)


def _fill(target: Tensor, kind: str, holder: Holder, tensors: CheckpointTensors) -> None:
    with torch.no_grad():
        flat = target.view(-1)
        for piece in holder.pieces:
            flat[piece.offset : piece.offset + piece.numel] = tensors.read(piece.name, kind, piece.start, piece.numel)
