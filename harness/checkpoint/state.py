"""The tensors of a checkpoint: float32 master weights and optimizer moments, independent of stage and world size.

Every rank writes the pieces of parameters that it owns, flattened, one safetensors file per holder (so that the copy
in host memory stays small), and `rank-*.json` says which piece lies where. A reader asks for any range of any
parameter, so a run may come back on another layout.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness.checkpoint.store import Checkpoint, CheckpointStore, FileRecord, record_file
from harness.engine import fragments
from harness.engine.fragments import MASTER, Holder
from harness.engine.processes import Processes
from harness.errors import DataError
from harness.io.atomic import read_json, write_json
from harness.io.faults import fault_point


def save(
    store: CheckpointStore, engine: Any, processes: Processes, *, step: int, state: dict[str, Any]
) -> Checkpoint | None:
    """Write and commit a checkpoint; a collective. Rank 0 gets it back, the others None."""
    if processes.is_first:
        store.begin(step)
    processes.barrier()
    fault_point("checkpoint.before_shard")
    records = _write_rank(store.temporary(step), engine, processes)
    fault_point("checkpoint.after_shard")
    everyone: list[list[FileRecord]] = processes.gather(records)
    checkpoint = None
    if processes.is_first:
        state = {**state, "optimizer_step": fragments.applied_steps(engine), "world_size": processes.world_size}
        checkpoint = store.commit(step, [record for records in everyone for record in records], state)
    processes.barrier()
    return checkpoint


def load(checkpoint: Checkpoint, engine: Any) -> None:
    """Put masters and moments back into the optimizer of every rank, and the weights that follow from them."""
    tensors = CheckpointTensors(checkpoint.directory)
    optimizer = fragments.base_optimizer(engine)
    for holder in fragments.holders(engine):
        with holder.resident(True):
            _load_holder(holder, tensors, optimizer, checkpoint.state["optimizer_step"])
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
        self._entries: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
        for path in sorted(directory.glob("rank-*.json")):
            for item in read_json(path):
                self.shapes[item["name"], item["kind"]] = tuple(item["shape"])
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
        covered = 0
        for entry in self._entries.get((name, kind), []):
            low, high = max(start, entry.start), min(start + numel, entry.start + entry.numel)
            if low < high:
                piece = self._open(entry.file).get_slice(entry.key)[low - entry.start : high - entry.start]
                result[low - start : high - start] = piece
                covered += high - low
        if covered != numel:
            raise DataError(
                f"{covered} of {numel} elements of {name} ({kind}) are stored", where=str(self.directory)
            )
        return result

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.directory / file, framework="pt")
        return self._files[file]


def _write_rank(directory: Path, engine: Any, processes: Processes) -> list[FileRecord]:
    optimizer = fragments.base_optimizer(engine)
    holders = fragments.holders(engine)
    if fragments.is_replicated(engine):
        holders = holders[processes.rank :: processes.world_size]
    index: list[dict[str, Any]] = []
    records: list[FileRecord] = []
    for number, batch in enumerate(_batched(holders)):
        file = directory / f"rank-{processes.rank:05d}-{number:04d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for holder in batch:
            with holder.resident(False):
                _collect(holder, optimizer, file.name, tensors, index)
        save_file(tensors, file)
        records.append(record_file(file))
    index_file = directory / f"rank-{processes.rank:05d}.json"
    write_json(index_file, index)
    return [*records, record_file(index_file)]


def _batched(holders: list[Holder], max_numel: int = 1 << 28) -> list[list[Holder]]:
    """Holders grouped into files of about a GiB of masters."""
    batches: list[list[Holder]] = []
    room = 0
    for holder in holders:
        if holder.tensor.numel() > room:
            batches.append([])
            room = max_numel
        batches[-1].append(holder)
        room -= holder.tensor.numel()
    return batches


def _collect(
    holder: Holder, optimizer: torch.optim.Optimizer, file: str, tensors: dict[str, Tensor], index: list[dict[str, Any]]
) -> None:
    parts = {MASTER: holder.tensor, **holder.moments(optimizer)}
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
            })  # fmt: skip


def _load_holder(
    holder: Holder, tensors: CheckpointTensors, optimizer: torch.optim.Optimizer, optimizer_step: int
) -> None:
    for piece in holder.pieces:
        stored = tensors.shapes.get((piece.name, MASTER))
        if stored != piece.shape:
            what = f"{piece.name} has shape {stored} in the checkpoint and {piece.shape} in the model"
            raise DataError(what, where=str(tensors.directory))
    _fill(holder.tensor, MASTER, holder, tensors)
    if not optimizer_step or not holder.pieces:
        return
    state = optimizer.state[holder.tensor]
    state["step"] = _step_counter(optimizer, holder.tensor, optimizer_step)
    for kind in tensors.moments(holder.pieces[0].name):
        shape = tensors.shapes[holder.pieces[0].name, kind]
        if shape != holder.pieces[0].shape:
            state[kind] = tensors.whole(holder.pieces[0].name, kind).to(holder.tensor.device)
            continue
        if kind not in state:
            state[kind] = torch.zeros_like(holder.tensor)
        _fill(state[kind], kind, holder, tensors)


def _fill(target: Tensor, kind: str, holder: Holder, tensors: CheckpointTensors) -> None:
    with torch.no_grad():
        flat = target.view(-1)
        for piece in holder.pieces:
            flat[piece.offset : piece.offset + piece.numel] = tensors.read(piece.name, kind, piece.start, piece.numel)


def _step_counter(optimizer: torch.optim.Optimizer, parameter: Tensor, step: int) -> Tensor | int:
    """The step count in the form the optimizer keeps it: a float tensor in torch, an int in DeepSpeed's CPU Adam."""
    if not type(optimizer).__module__.startswith("torch."):
        return step
    fused = optimizer.defaults.get("fused")
    return torch.tensor(float(step), device=parameter.device if fused else "cpu")
