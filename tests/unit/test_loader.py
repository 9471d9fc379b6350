"""Training steps over several epochs: entered anywhere, cut for any number of ranks, always the same global batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.schema import BatchConfig, DataConfig, DataSource
from harness.data.encoded import EncodedRows
from harness.data.loader import StepRows, TrainingSteps

NUM_ROWS = 60
NUM_EPOCHS = 4


@dataclass
class Sizes:
    """The part of EncodedRows that decides the steps."""

    source_sizes: np.ndarray[Any, Any]
    target_sizes: np.ndarray[Any, Any]
    source_index: np.ndarray[Any, Any]

    @property
    def sizes(self) -> np.ndarray[Any, Any]:
        return np.maximum(self.source_sizes, self.target_sizes)


def random_sizes(num_rows: int = NUM_ROWS) -> Sizes:
    generator = np.random.default_rng(5)
    sides = generator.integers(3, 30, (2, num_rows)).astype(np.int32)
    return Sizes(sides[0], sides[1], (np.arange(num_rows) % 3 == 0).astype(np.int16))


def training_steps(
    sizes: Sizes, *, weights: tuple[float, ...] = (1.0,), seed: int = 17, world_size: int = 1, limit: int = 60
) -> TrainingSteps:
    sources = [DataSource(path="x.tsv", weight=weight) for weight in weights]
    batch = BatchConfig(tokens_per_step=150, max_tokens_per_device=limit)
    rows = cast(EncodedRows, sizes)
    return TrainingSteps(rows, data=DataConfig(train=sources), batch=batch, seed=seed, world_size=world_size)


def plain(step: StepRows) -> tuple[Any, ...]:
    micro_batches = [[part.tolist() for part in parts] for parts in step.micro_batches]
    return step.step, step.epoch, step.rows.tolist(), step.target_tokens, micro_batches


def first_steps(steps: TrainingSteps, *, num_epochs: int) -> list[StepRows]:
    found: list[StepRows] = []
    for step in steps.starting_at(1):
        if step.epoch == num_epochs:
            return found
        found.append(step)
    raise AssertionError


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.5), (0.4, 1.0)])
def test_starting_at_a_step_is_skipping_those_before(weights: tuple[float, ...]) -> None:
    sizes = random_sizes()
    unbroken = [plain(step) for step in first_steps(training_steps(sizes, weights=weights), num_epochs=NUM_EPOCHS)]
    assert unbroken[-1][1] == NUM_EPOCHS - 1
    assert [step[0] for step in unbroken] == list(range(1, len(unbroken) + 1))
    for start in range(1, len(unbroken) + 1):
        resumed = training_steps(sizes, weights=weights).starting_at(start)
        assert [plain(step) for step in islice(resumed, len(unbroken) - start + 1)] == unbroken[start - 1 :]


def test_one_object_can_be_entered_several_times() -> None:
    steps = training_steps(random_sizes())
    far = [plain(step) for step in islice(steps.starting_at(30), 3)]
    near = [plain(step) for step in islice(steps.starting_at(2), 31)]
    assert near[-3:] == far


def test_each_epoch_has_every_row_once_and_its_own_order() -> None:
    steps = first_steps(training_steps(random_sizes()), num_epochs=NUM_EPOCHS)
    orders = [[row for step in steps if step.epoch == epoch for row in step.rows] for epoch in range(NUM_EPOCHS)]
    assert all(sorted(order) == list(range(NUM_ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == NUM_EPOCHS


def test_steps_per_epoch_are_those_of_the_first() -> None:
    steps = training_steps(random_sizes())
    assert steps.steps_per_epoch == len(first_steps(steps, num_epochs=1))


def test_weights_decide_how_often_rows_come() -> None:
    sizes = random_sizes()
    steps = first_steps(training_steps(sizes, weights=(1.0, 2.5)), num_epochs=1)
    drawn = np.bincount(sizes.source_index[np.concatenate([step.rows for step in steps])])
    assert drawn.tolist() == [40, 50]


def test_weights_of_one_source_count_too() -> None:
    sizes = random_sizes()
    sizes.source_index[:] = 0
    steps = first_steps(training_steps(sizes, weights=(2.0,)), num_epochs=1)
    assert sorted(row for step in steps for row in step.rows) == sorted([*range(NUM_ROWS)] * 2)


@given(st.integers(1, 7), st.integers(30, 200), st.integers(0, 99))
def test_global_batches_do_not_depend_on_ranks_and_micro_batches(world_size: int, limit: int, seed: int) -> None:
    sizes = random_sizes()
    alone = first_steps(training_steps(sizes, seed=seed), num_epochs=2)
    together = first_steps(training_steps(sizes, seed=seed, world_size=world_size, limit=limit), num_epochs=2)
    assert [plain(step)[:4] for step in together] == [plain(step)[:4] for step in alone]
    assert [step.digest for step in together] == [step.digest for step in alone]
    for step in together:
        parts = [part for parts in step.micro_batches for part in parts]
        assert sorted(np.concatenate(parts).tolist()) == sorted(step.rows.tolist())
        assert [len(parts) for parts in step.micro_batches] == [world_size] * len(step.micro_batches)


def test_a_step_counts_its_target_tokens_and_is_as_large_as_its_longer_sides() -> None:
    sizes = random_sizes()
    for step in first_steps(training_steps(sizes), num_epochs=2):
        assert step.target_tokens == sum(int(sizes.target_sizes[row]) for row in step.rows)
        assert sum(max(sizes.source_sizes[row], sizes.target_sizes[row]) for row in step.rows) <= 150


def test_the_digest_is_that_of_the_sorted_row_ids() -> None:
    step = StepRows(1, 0, np.array([7, 2, 300]), 10, [])
    expected = hashlib.sha256(b"".join(row.to_bytes(8, "little") for row in (2, 7, 300))).hexdigest()[:16]
    assert step.digest == expected == StepRows(9, 3, np.array([300, 7, 2]), 99, []).digest


def test_rows_of_language_models_are_packed() -> None:
    """Packs of at most `max_length` tokens, of rows of all sizes; the steps' rows do not depend on the layout."""
    sizes = random_sizes(600)
    batch = BatchConfig(tokens_per_step=600, max_tokens_per_device=160)
    base = {"train": [DataSource(path="x.jsonl")], "format": "messages", "max_length": 80}

    def steps(world_size: int, **changes: Any) -> list[StepRows]:
        data = DataConfig.model_validate(base | changes)
        loader = TrainingSteps(cast(EncodedRows, sizes), data=data, batch=batch, seed=17, world_size=world_size)
        return first_steps(loader, num_epochs=1)

    packed, other, alone = steps(1), steps(3), steps(1, packing=False)
    assert [step.digest for step in packed] == [step.digest for step in other]
    assert sorted(np.concatenate([step.rows for step in packed])) == list(range(600))
    costs = [int(sizes.sizes[part].sum()) for step in packed for parts in step.micro_batches for part in parts]
    assert max(costs) <= 160
    assert np.mean(costs) > 130, "two packs of 80, nearly full"
    spread, without = (np.mean([np.ptp(sizes.sizes[step.rows]) for step in one]) for one in (packed, alone))
    assert spread > 20 > 5 > without
