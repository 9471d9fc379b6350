"""From row lengths to the rows of every optimizer step, and from a step to each rank's micro-batches.

A global batch is a pure function of (row sizes, seed, epoch, tokens_per_step). World size and micro-batch size only
decide how it is cut, so the order of training is the same on 1 or 1,024 ranks and resume is a seek.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.errors import DataError

IntArray = NDArray[np.integer]

POOL_STEPS = 128  # rows of this many steps are shuffled together, then sorted by length inside the pool
_ROW_STREAM, _STEP_STREAM, _MIXTURE_STREAM = range(3)


@dataclass(frozen=True)
class EpochPlan:
    """Rows of one epoch in training order; step `i` holds `order[offsets[i]:offsets[i + 1]]`."""

    order: IntArray
    offsets: IntArray

    @property
    def num_steps(self) -> int:
        return len(self.offsets) - 1

    def rows_of(self, step_in_epoch: int) -> IntArray:
        return self.order[self.offsets[step_in_epoch] : self.offsets[step_in_epoch + 1]]


def plan_epoch(
    sizes: IntArray,
    *,
    seed: int,
    epoch: int,
    tokens_per_step: int,
    rows: IntArray | None = None,
    similar_sizes: bool = True,
) -> EpochPlan:
    """Cut an epoch into global batches of rows of similar size, in random order.

    `sizes` [num_rows] is each row's longer side in tokens; `rows` are the row ids of this epoch (default: each once,
    see `mixture_rows`). The sizes of a batch sum to at most `tokens_per_step`. Without `similar_sizes` a batch has rows
    of all sizes: in packs, short rows fill what long ones leave.
    """
    rows = np.arange(len(sizes)) if rows is None else rows
    if len(rows) == 0:
        raise DataError("no rows to train on")
    if (longest := int(sizes[rows].max())) > tokens_per_step:
        raise DataError(
            f"a row of {longest} tokens is larger than batch.tokens_per_step={tokens_per_step}",
            hint=f"raise batch.tokens_per_step to at least {longest} or lower data.max_*_length",
        )
    rows = rows[_generator(seed, epoch, _ROW_STREAM).permutation(len(rows))]
    if similar_sizes:
        pool = np.cumsum(sizes[rows], dtype=np.int64) // (tokens_per_step * POOL_STEPS)
        # Odd pools run from long to short, so that lengths do not jump inside a batch that spans two pools.
        key = np.where(pool % 2 == 0, sizes[rows], -sizes[rows].astype(np.int64))
        rows = rows[np.lexsort((key, pool))]
    starts = _cut_greedily(np.cumsum(sizes[rows], dtype=np.int64), tokens_per_step)
    return _shuffle_batches(rows, starts, _generator(seed, epoch, _STEP_STREAM))


def mixture_rows(
    source_of_row: IntArray, weights: Sequence[float], *, temperature: float, seed: int, epoch: int
) -> IntArray:
    """Row ids of one epoch of a mixture: source s gives a share proportional to weight_s * size_s^(1/temperature).

    The epoch has as many rows as the sources together, weighted; a source drawn more than once repeats whole copies
    before a random part, so that no row is left behind while another comes again.
    """
    sizes = np.bincount(source_of_row, minlength=len(weights)).astype(np.float64)
    shares = np.asarray(weights) * sizes ** (1.0 / temperature)
    counts = np.rint(shares / shares.sum() * (np.asarray(weights) * sizes).sum()).astype(np.int64)
    if (counts == sizes).all():
        return np.arange(len(source_of_row))
    generator = _generator(seed, epoch, _MIXTURE_STREAM)
    drawn = []
    for source, count in enumerate(counts):
        members = np.flatnonzero(source_of_row == source)
        if len(members):
            copies, rest = divmod(int(count), len(members))
            drawn += [members] * copies + [generator.permutation(members)[:rest]]
    return np.concatenate(drawn)


def pack(row_ids: IntArray, sizes: IntArray, capacity: int) -> list[IntArray]:
    """Row ids in packs whose sizes sum to at most `capacity`: first-fit decreasing. Needs sizes[row_ids] <= capacity.

    No row fits in a pack before its own, so next-fit over the rows of some of the packs, in this order, finds the same
    packs again: a micro-batch need not say where its packs end.
    """
    rows = row_ids[np.argsort(-sizes[row_ids].astype(np.int64), kind="stable")]
    values, counts = np.unique(sizes[rows], return_counts=True)
    room = np.full(len(rows), capacity, dtype=np.int64)  # of every pack, those not yet begun included
    pack_of_row = []
    for size, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # First-fit of `count` equal rows: each pack in turn takes as many as it has room for.
        with_room = np.flatnonzero(room >= size)[:count]
        taken = np.diff(np.minimum(np.cumsum(room[with_room] // size), count), prepend=0)
        room[with_room] -= taken * size
        pack_of_row.append(np.repeat(with_room, taken))
    packs = np.concatenate(pack_of_row)
    order = np.argsort(packs, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(packs[order])) + 1)


def cut_step(
    row_ids: IntArray,
    sizes: IntArray,
    *,
    max_tokens_per_device: int,
    world_size: int,
    capacity: int | None = None,
) -> list[list[IntArray]]:
    """Cut a global batch into micro-batches: result[micro_step][rank] holds row ids, empty for a rank short of rows.

    A micro-batch costs rows x longest row and stays within `max_tokens_per_device`; every rank gets the same number of
    micro-steps, as few as possible, and the limit is then lowered as far as it goes so that ranks share evenly.
    With a `capacity` the same is done with packs of rows (see `pack`) in place of rows.
    """
    packs = None if capacity is None else pack(row_ids, sizes, capacity)
    lengths = sizes[row_ids] if packs is None else np.array([sizes[rows].sum() for rows in packs])
    by_length = np.argsort(lengths, kind="stable")
    if (longest := int(lengths[by_length[-1]])) > max_tokens_per_device:
        what = "row" if packs is None else "pack"
        raise DataError(
            f"a {what} of {longest} tokens does not fit batch.max_tokens_per_device={max_tokens_per_device}",
            hint="raise batch.max_tokens_per_device or lower data.max_*length",
        )
    cuts = _cut_evenly(lengths[by_length], max_tokens_per_device, world_size)
    parts: list[IntArray] = []
    for units in np.split(by_length, cuts[1:]):
        parts.append(row_ids[units] if packs is None else np.concatenate([packs[unit] for unit in np.sort(units)]))
    parts += [row_ids[:0]] * (-len(parts) % world_size)
    return [parts[i : i + world_size] for i in range(0, len(parts), world_size)]


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, stream))))


def _cut_greedily(cumulative: IntArray, limit: int) -> IntArray:
    """Starts of the longest runs whose sizes sum to at most `limit`."""
    starts = [0]
    while True:
        taken = cumulative[starts[-1] - 1] if starts[-1] else 0
        end = int(np.searchsorted(cumulative, taken + limit, side="right"))
        if end == len(cumulative):
            return np.array(starts)
        starts.append(end)


def _cut_padded(ascending_lengths: IntArray, limit: int) -> list[int]:
    """Starts of the longest runs with rows x longest <= limit."""
    starts = [0]
    for position, length in enumerate(ascending_lengths.tolist()):
        if (position - starts[-1] + 1) * length > limit:
            starts.append(position)
    return starts


def _cut_evenly(ascending_lengths: IntArray, limit: int, world_size: int) -> list[int]:
    """Starts of runs within `limit`, for as few micro-steps as possible; then the lowest limit with no more of them."""
    cuts = _cut_padded(ascending_lengths, limit)
    num_parts = -(-len(cuts) // world_size) * world_size
    low, high = int(ascending_lengths[-1]), limit
    while low < high:
        middle = (low + high) // 2
        trial = _cut_padded(ascending_lengths, middle)
        if len(trial) <= num_parts:
            high, cuts = middle, trial
        else:
            low = middle + 1
    return cuts


def _shuffle_batches(rows: IntArray, starts: IntArray, generator: np.random.Generator) -> EpochPlan:
    counts = np.diff(np.append(starts, len(rows)))
    shuffled = generator.permutation(len(starts))
    offsets = np.concatenate(([0], np.cumsum(counts[shuffled])))
    # Position p of the new order comes from the old start of its batch plus its place in the batch.
    old_starts = np.repeat(starts[shuffled] - offsets[:-1], counts[shuffled])
    return EpochPlan(rows[old_starts + np.arange(len(rows))], offsets)
