"""Where a rank keeps its share of the float32 master weights and optimizer moments, whatever the ZeRO stage.

DeepSpeed lays them out in five ways: whole parameters (stage 0, float32), float32 copies of whole parameters (stage 0,
mixed precision), a flat float32 copy of each parameter group (the same with its own fused Adam), a slice of such a
buffer (stages 1, 2; under two names), and this rank's shard of every parameter in flat sub-groups (stage 3, perhaps
swapped to NVMe). Here each becomes a list of `Holder`s: one tensor that the optimizer updates, and the pieces of
parameters that lie in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.moments import num_updates

MASTER = "master"


@dataclass(frozen=True)
class Piece:
    """`numel` elements of the flattened parameter `name`, from `start`, at `offset` in the holder."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Holder:
    """A float32 tensor that the base optimizer updates, with its moments, and what lies in it."""

    tensor: Tensor
    pieces: list[Piece]
    resident: Callable[[bool], AbstractContextManager[None]] = lambda write: nullcontext()
    counted_with: tuple[Tensor, ...] = ()  # DeepSpeed's fused Adam counts its updates at the last tensor of a group

    @property
    def numel(self) -> int:
        """Elements of parameters in it, whether it is in memory or not."""
        return sum(piece.numel for piece in self.pieces)

    def num_updates(self, optimizer: torch.optim.Optimizer) -> int | None:
        """Updates so far, for bias correction; None if the optimizer does not count them, or has done none."""
        counts = [num_updates(optimizer, tensor) for tensor in (self.tensor, *self.counted_with)]
        return max((count for count in counts if count is not None), default=None)


def holders(engine: Any) -> list[Holder]:
    """All holders of this rank, in the same order at every start of the same run."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _sharded(zero, names)
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return _partitioned(zero.bit16_groups, zero.single_partition_of_fp32_groups, names)
    if hasattr(zero, "fp32_groups_flat_partition"):  # stage 1, bfloat16, gradients added up in float32
        return _partitioned(zero.bf16_groups, zero.fp32_groups_flat_partition, names)
    if hasattr(zero, "fp32_groups"):
        pairs = [pair for ours, theirs in zip(zero.fp16_groups, zero.fp32_groups, strict=True)
                 for pair in zip(ours, theirs, strict=True)]  # fmt: skip
        return [_whole(names[id(parameter)], master) for parameter, master in pairs]
    if hasattr(zero, "fp32_groups_flat"):
        return [
            _flattened(group, flat, names) for group, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True)
        ]
    return [
        _whole(names[id(p)], p, counted_with=tuple(group["params"]))
        for group in zero.param_groups
        for p in group["params"]
    ]


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that holds the moments, below DeepSpeed's wrappers."""
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def is_replicated(engine: Any) -> bool:
    """True when every rank holds everything (ZeRO stage 0)."""
    return int(engine.zero_optimization_stage()) == 0


def start_from(engine: Any, weights: dict[str, Tensor]) -> None:
    """Make a new engine's masters the float32 `weights` (whole, by name), and its optimizer one that has done no step.

    In mixed precision DeepSpeed makes the masters from weights that it has rounded before. At stage 0 it also applies
    a step of zero gradients to set up the moments, which spoils Adam's bias correction and decays the weights once.
    """
    for holder in holders(engine):
        with holder.resident(True), torch.no_grad():
            flat = holder.tensor.view(-1)
            for piece in holder.pieces:
                part = weights[piece.name].reshape(-1)[piece.start : piece.start + piece.numel]
                flat[piece.offset : piece.offset + piece.numel] = part
    if is_replicated(engine):
        base_optimizer(engine).state.clear()


def publish_masters(engine: Any) -> None:
    """After masters were overwritten: copy them to the weights that the forward pass uses, on all ranks."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        for group in range(len(zero.fp16_groups)):
            with _swapped_in(zero, group)(False):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._post_step(set())
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        zero.update_lp_params()
        for group in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(group)
    elif hasattr(zero, "fp32_groups_flat_partition"):
        zero.update_lp_params()
    elif hasattr(zero, "fp32_groups"):
        for ours, theirs in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
            for parameter, master in zip(ours, theirs, strict=True):
                parameter.data.copy_(master.data)
    elif hasattr(zero, "fp32_groups_flat"):
        for parameters, flat in zip(zero.fp16_groups, zero.fp32_groups_flat, strict=True):
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.data.copy_(part.data.view_as(parameter))


def _whole(name: str, tensor: Tensor, counted_with: tuple[Tensor, ...] = ()) -> Holder:
    pieces = [Piece(name, tuple(tensor.shape), 0, tensor.numel(), 0)]
    return Holder(tensor, pieces, counted_with=counted_with)


def _flattened(parameters: list[Any], flat: Tensor, names: dict[int, str]) -> Holder:
    pieces, offset = [], 0
    for parameter in parameters:
        pieces.append(Piece(names[id(parameter)], tuple(parameter.shape), 0, parameter.numel(), offset))
        offset += parameter.numel()
    return Holder(flat, pieces)


def _partitioned(groups: list[Any], flats: list[Tensor], names: dict[int, str]) -> list[Holder]:
    found = []
    for group, flat in zip(groups, flats, strict=True):
        pieces = []
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                inside, held = mapping.lp_fragment_address, mapping.hp_fragment_address
                name, shape = names[id(parameter)], tuple(parameter.shape)
                pieces.append(Piece(name, shape, inside.start, inside.numel, held.start))
        found.append(Holder(flat, pieces))
    return found


def _sharded(zero: Any, names: dict[int, str]) -> list[Holder]:
    found = []
    for index, (group, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        pieces = []
        for parameter in group:
            _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            start = length * torch.distributed.get_rank(zero._get_param_partition_group(parameter))
            numel = min(length, parameter.ds_numel - start)  # the last shard may end in padding
            if numel > 0:
                pieces.append(Piece(names[id(parameter)], tuple(parameter.ds_shape), start, numel, offset))
        found.append(Holder(flat, pieces, _swapped_in(zero, index)))
    return found


def _swapped_in(zero: Any, group: int) -> Callable[[bool], AbstractContextManager[None]]:
    """A context in which a sub-group that lives on NVMe is in memory; `write` puts changes back."""
    if not zero._swappable_optimizer_subgroup(group):
        return lambda write: nullcontext()

    @contextmanager
    def resident(write: bool) -> Iterator[None]:
        zero._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            if write:
                zero._optimizer_states_and_gradient_swap_out(group)
            else:
                zero._release_swap_buffers(group)

    return resident
