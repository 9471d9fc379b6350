"""The training rows as a sequence of optimizer steps that can be entered anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from harness.config.schema import BatchConfig, DataConfig
from harness.data.batches import EpochPlan, IntArray, cut_step, mixture_rows, plan_epoch
from harness.data.encoded import EncodedRows

PACKED_FORMATS = ("text", "prompt", "messages")


def pack_length(data: DataConfig) -> int | None:
    """The longest pack of rows in tokens; None if each row stands alone."""
    is_packed = data.packing and (data.format in PACKED_FORMATS or data.has_prompts)
    return data.max_length if is_packed else None


@dataclass(frozen=True)
class StepRows:
    """One global batch. `micro_batches[micro_step][rank]` are row ids; `step` counts from 1 over the whole run."""

    step: int
    epoch: int
    rows: IntArray
    target_tokens: int
    micro_batches: list[list[IntArray]]

    @property
    def digest(self) -> str:
        """Hash of the sorted row ids: equal for equal global batches, whatever the layout."""
        return hashlib.sha256(np.sort(self.rows).astype("<i8").tobytes()).hexdigest()[:16]


class TrainingSteps:
    """Global batches of the run, epoch after epoch; a pure function of the encoded rows, the seed and the settings."""

    def __init__(self, rows: EncodedRows, *, data: DataConfig, batch: BatchConfig, seed: int, world_size: int) -> None:
        self._rows, self._data, self._batch = rows, data, batch
        self._seed, self._world_size = seed, world_size
        self._sizes, self._pack_length = rows.sizes, pack_length(data)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later ones may differ by a step, since rows are packed anew."""
        return self._epoch(0).num_steps

    def starting_at(self, step: int) -> Iterator[StepRows]:
        """Steps `step`, `step + 1`, ... without end."""
        epoch, first = 0, 1
        while first + self._epoch(epoch).num_steps <= step:
            first += self._epoch(epoch).num_steps
            epoch += 1
        while True:
            plan = self._epoch(epoch)
            for index in range(step - first, plan.num_steps):
                yield self._step(first + index, epoch, plan.rows_of(index))
            first += plan.num_steps
            step, epoch = first, epoch + 1

    def _step(self, step: int, epoch: int, rows: IntArray) -> StepRows:
        micro_batches = cut_step(
            rows,
            self._sizes,
            max_tokens_per_device=self._batch.max_tokens_per_device,
            world_size=self._world_size,
            capacity=self._pack_length,
        )
        return StepRows(step, epoch, rows, int(self._rows.target_sizes[rows].sum()), micro_batches)

    @lru_cache(maxsize=2)  # noqa: B019 - one instance lives as long as the run
    def _epoch(self, epoch: int) -> EpochPlan:
        weights = [source.weight for source in self._data.train]
        rows = None
        if len(weights) > 1 or weights[0] != 1.0:
            rows = mixture_rows(
                self._rows.source_index, weights, temperature=self._data.temperature, seed=self._seed, epoch=epoch
            )
        return plan_epoch(
            self._sizes,
            seed=self._seed,
            epoch=epoch,
            tokens_per_step=self._batch.tokens_per_step,
            rows=rows,
            similar_sizes=self._pack_length is None,
        )
