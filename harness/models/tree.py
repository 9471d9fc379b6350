"""Keys and values of many sentences' running outputs, each kept once whichever outputs share it.

The running outputs (beams) of a sentence are a tree: they share their source or prompt, and most of their own
beginnings. All of its keys and values stand in one list of slots, and a mask tells each output which slots are its
ancestors. When the search moves an output to another parent only the mask changes; nothing is copied per beam.

Shapes: R sentences, N running outputs of each, H heads, C slots, S source positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, EncoderDecoderCache

ROOM = 16  # steps between two rebuildings of the slots


class Slots(CacheLayerMixin):
    """The slots of one decoder layer, in buffers [R, H, C + room, D]; attention appends to them through `update`."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        super().__init__()
        self.keys, self.values, self.used, self.is_initialized = keys, values, used, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, start : self.used] = key_states
        self.values[:, :, start : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass
class Tree:
    """What the running outputs of R sentences look back on.

    `bias_RNC` is what attention adds: 0 for an ancestor, the lowest number otherwise. `slot_positions_RC` and
    `positions_R` count the decoder's positions, of the slots and of the next token. `cross_bias_RS` is None for
    decoder-only models.
    """

    slots: list[Slots]
    cross: list[tuple[Tensor, Tensor]]
    bias_RNC: Tensor
    slot_positions_RC: Tensor
    positions_R: Tensor
    cross_bias_RS: Tensor | None
    longest: int  # no position of a next token is beyond it

    @property
    def has_room(self) -> bool:
        """Whether another step fits before `merge` must rebuild the slots."""
        return self.slots[0].used + self.bias_RNC.shape[1] <= self.slots[0].keys.shape[2]

    def cache(self) -> Cache:
        """What transformers' attention layers read and append to."""
        own = Cache(layers=list(self.slots))
        if self.cross_bias_RS is None:
            return own
        cross = Cache(layers=[_filled(*pair) for pair in self.cross])
        return EncoderDecoderCache(own, cross)

    def branch(self, parents_RN: Tensor) -> None:
        """Gives each of the N outputs the ancestors of its parent and N new slots, of which the n-th is its own."""
        num_sentences, num_outputs, num_slots = self.bias_RNC.shape
        inherited_RNC = self.bias_RNC.gather(1, parents_RN.unsqueeze(2).expand(-1, -1, num_slots))
        lowest = torch.finfo(self.bias_RNC.dtype).min
        own_NN = torch.full((num_outputs, num_outputs), lowest, dtype=self.bias_RNC.dtype, device=self.bias_RNC.device)
        own_RNN = own_NN.fill_diagonal_(0.0).expand(num_sentences, -1, -1)
        self.bias_RNC = torch.cat([inherited_RNC, own_RNN], dim=2)
        new_RN = self.positions_R.unsqueeze(1).expand(-1, num_outputs)
        self.slot_positions_RC = torch.cat([self.slot_positions_RC, new_RN], dim=1)

    def forget_last_step(self) -> None:
        """Takes back the slots of the last step."""
        num_outputs = self.bias_RNC.shape[1]
        for layer in self.slots:
            layer.used -= num_outputs
        self.bias_RNC = self.bias_RNC[:, :, :-num_outputs]
        self.slot_positions_RC = self.slot_positions_RC[:, :-num_outputs]


def merge(parts: Sequence[tuple[Tree, Tensor]], num_outputs: int) -> Tree:
    """One tree of the sentences that are named of each tree, without dead slots and with room for the next steps.

    A tree with a mask for one output gets N.
    """
    live = [_live_slots(tree, rows) for tree, rows in parts]
    sizes = [(len(rows), order.shape[1]) for (_, rows), order in zip(parts, live, strict=True)]
    num_slots = max(size for _, size in sizes)
    first = parts[0][0]
    slots = []
    for layer in range(len(first.slots)):
        pairs = [(tree.slots[layer].keys, tree.slots[layer].values) for tree, _ in parts]
        picked = [
            [_pick_slots(side, rows, order) for side in pair]
            for pair, (_, rows), order in zip(pairs, parts, live, strict=True)
        ]
        keys, values = (
            _joined([one[side] for one in picked], 2, num_slots, room=ROOM * num_outputs) for side in (0, 1)
        )
        slots.append(Slots(keys, values, num_slots))
    lowest = torch.finfo(first.bias_RNC.dtype).min
    bias = [
        tree.bias_RNC[rows]
        .gather(2, order.unsqueeze(1).expand(-1, tree.bias_RNC.shape[1], -1))
        .expand(-1, num_outputs, -1)
        for (tree, rows), order in zip(parts, live, strict=True)
    ]
    positions = [tree.slot_positions_RC[rows].gather(1, order) for (tree, rows), order in zip(parts, live, strict=True)]
    positions_R = torch.cat([tree.positions_R[rows] for tree, rows in parts])
    cross, cross_bias = _merge_cross(parts)
    return Tree(
        slots,
        cross,
        _joined(bias, 2, num_slots, lowest),
        _joined(positions, 1, num_slots),
        positions_R,
        cross_bias,
        int(positions_R.max()),
    )


def _merge_cross(parts: Sequence[tuple[Tree, Tensor]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Keys and values of the sources, padding that no row needs left out."""
    if parts[0][0].cross_bias_RS is None:
        return [], None
    biases = [tree.cross_bias_RS[rows] for tree, rows in parts]  # type: ignore[index]
    lengths = [int((bias == 0).any(dim=0).nonzero().max()) + 1 for bias in biases]
    longest, lowest = max(lengths), torch.finfo(biases[0].dtype).min
    cross = []
    for layer in range(len(parts[0][0].cross)):
        sides = []
        for side in (0, 1):
            picked = [
                tree.cross[layer][side][:, :, :length].index_select(0, rows)
                for (tree, rows), length in zip(parts, lengths, strict=True)
            ]
            sides.append(_joined(picked, 2, longest))
        cross.append((sides[0], sides[1]))
    cut = [bias[:, :length] for bias, length in zip(biases, lengths, strict=True)]
    return cross, _joined(cut, 1, longest, lowest)


def _live_slots(tree: Tree, rows: Tensor) -> Tensor:
    """[rows, most live slots]: slots that are an ancestor of some output, in order; then others to fill up."""
    live_RC = (tree.bias_RNC[rows] == 0).any(dim=1)
    most = int(live_RC.sum(dim=1).max())
    return live_RC.int().argsort(dim=1, descending=True, stable=True)[:, :most]


def _pick_slots(buffer: Tensor, rows: Tensor, order_RC: Tensor) -> Tensor:
    """[rows, H, slots, D] of a buffer [R, H, room, D]."""
    _, num_heads, room, width = buffer.shape
    heads_H = torch.arange(num_heads, device=buffer.device)
    index_RHC = (rows.unsqueeze(1) * num_heads + heads_H).unsqueeze(2) * room + order_RC.unsqueeze(1)
    return buffer.reshape(-1, width).index_select(0, index_RHC.flatten()).view(*index_RHC.shape, width)


def _joined(parts: Sequence[Tensor], dim: int, size: int, value: float = 0.0, room: int = 0) -> Tensor:
    """Parts joined on dimension 0, each filled up with `value` to `size` on `dim`, and `room` behind that."""
    shape = list(parts[0].shape)
    shape[0], shape[dim] = sum(len(part) for part in parts), size + room
    whole = parts[0].new_empty(shape)
    start = 0
    for part in parts:
        filled, end = part.shape[dim], start + len(part)
        whole[start:end].narrow(dim, 0, filled).copy_(part)
        whole[start:end].narrow(dim, filled, size - filled).fill_(value)
        start = end
    return whole


def _filled(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer
