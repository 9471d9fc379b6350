"""Global batches and their cuts: properties for any rows, slow plain versions of the same, and golden values."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.batches import POOL_STEPS, EpochPlan, IntArray, cut_step, mixture_rows, pack, plan_epoch
from harness.errors import DataError

some_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=300)
seeds = st.integers(0, 2**32)


def batches_of(plan: EpochPlan) -> list[list[int]]:
    return [plan.rows_of(step).tolist() for step in range(plan.num_steps)]


def random_stream(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, stream))))


def slow_plan(sizes: list[int], rows: list[int], *, seed: int, epoch: int, tokens_per_step: int) -> list[list[int]]:
    """The epoch as `plan_epoch` promises it, one row at a time."""
    shuffled = [rows[i] for i in random_stream(seed, epoch, 0).permutation(len(rows))]
    pools: dict[int, list[int]] = {}
    seen = 0
    for row in shuffled:
        seen += sizes[row]
        pools.setdefault(seen // (tokens_per_step * POOL_STEPS), []).append(row)
    batches: list[list[int]] = [[]]
    for number in sorted(pools):
        for row in sorted(pools[number], key=lambda row: sizes[row] if number % 2 == 0 else -sizes[row]):
            if sum(sizes[r] for r in batches[-1]) + sizes[row] > tokens_per_step:
                batches.append([])
            batches[-1].append(row)
    return [batches[i] for i in random_stream(seed, epoch, 1).permutation(len(batches))]


@given(some_sizes, seeds, st.integers(0, 5), st.integers(40, 500), st.booleans())
def test_an_epoch_is_the_slow_plan(sizes: list[int], seed: int, epoch: int, tokens_per_step: int, twice: bool) -> None:
    rows = list(range(len(sizes))) * (2 if twice else 1)
    plan = plan_epoch(
        np.array(sizes), seed=seed, epoch=epoch, tokens_per_step=tokens_per_step, rows=np.array(rows) if twice else None
    )
    assert batches_of(plan) == slow_plan(sizes, rows, seed=seed, epoch=epoch, tokens_per_step=tokens_per_step)


def test_an_epoch_of_many_pools_is_the_slow_plan() -> None:
    """Long enough for several pools of rows sorted together, upwards and downwards in turn."""
    sizes = np.random.default_rng(3).integers(1, 60, 5000)
    assert sizes.sum() > 4 * POOL_STEPS * 200
    plan = plan_epoch(sizes, seed=17, epoch=2, tokens_per_step=200)
    assert batches_of(plan) == slow_plan(sizes.tolist(), list(range(5000)), seed=17, epoch=2, tokens_per_step=200)


@given(some_sizes, seeds, st.integers(40, 500), st.sampled_from([np.int32, np.int64]))
def test_every_row_comes_once_in_batches_within_the_limit(
    sizes: list[int], seed: int, tokens_per_step: int, dtype: type
) -> None:
    plan = plan_epoch(np.array(sizes, dtype=dtype), seed=seed, epoch=1, tokens_per_step=tokens_per_step)
    batches = batches_of(plan)
    assert sorted(row for batch in batches for row in batch) == list(range(len(sizes)))
    assert all(0 < sum(sizes[row] for row in batch) <= tokens_per_step for batch in batches)


def test_batches_are_full_and_of_rows_of_similar_size() -> None:
    sizes = np.random.default_rng(0).integers(5, 100, 20_000)
    plan = plan_epoch(sizes, seed=17, epoch=0, tokens_per_step=2000)
    batches = [sizes[plan.rows_of(step)] for step in range(plan.num_steps)]
    assert plan.num_steps <= 1.03 * sizes.sum() / 2000
    assert np.median([batch.max() - batch.min() for batch in batches]) <= 3
    means = np.array([batch.mean() for batch in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1, "short and long batches come in random order"


def test_no_sum_overflows_int32_sizes() -> None:
    sizes = np.full(30, 2**27, dtype=np.int32)
    plan = plan_epoch(sizes, seed=0, epoch=0, tokens_per_step=2**30)
    assert sorted(map(len, batches_of(plan))) == [6, 8, 8, 8]


def test_epochs_and_seeds_give_other_orders_and_the_same_call_the_same() -> None:
    sizes = np.random.default_rng(0).integers(1, 40, 500)
    first, again, other_epoch, other_seed = (
        plan_epoch(sizes, seed=seed, epoch=epoch, tokens_per_step=200).order.tolist()
        for seed, epoch in ((17, 0), (17, 0), (17, 1), (18, 0))
    )
    assert first == again
    assert first != other_epoch
    assert first != other_seed


def test_golden_plan() -> None:
    """A change here changes the order of training of every run that goes on from an older checkpoint."""
    sizes = np.arange(1000) * 7919 % 97 + 1
    plan = plan_epoch(sizes, seed=17, epoch=3, tokens_per_step=512)
    assert plan.num_steps == 103
    assert plan.rows_of(0)[:9].tolist() == [246, 343, 185, 961, 767, 476, 573, 864, 670]
    digests = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16] for part in (plan.order, plan.offsets)]
    assert digests == ["91b9e74870b77d2c", "e1b01b6fcdd86f0c"]


def test_a_row_larger_than_a_step_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"50 tokens is larger than batch.tokens_per_step=49.*\n.*at least 50"):
        plan_epoch(np.array([1, 50]), seed=0, epoch=0, tokens_per_step=49)
    with pytest.raises(DataError, match="no rows"):
        plan_epoch(np.array([], dtype=int), seed=0, epoch=0, tokens_per_step=49)


@given(some_sizes, seeds, st.integers(40, 500))
def test_without_similar_sizes_rows_stay_in_random_order(sizes: list[int], seed: int, tokens_per_step: int) -> None:
    plan = plan_epoch(np.array(sizes), seed=seed, epoch=0, tokens_per_step=tokens_per_step, similar_sizes=False)
    batches: list[list[int]] = [[]]
    for row in random_stream(seed, 0, 0).permutation(len(sizes)).tolist():
        if sum(sizes[r] for r in batches[-1]) + sizes[row] > tokens_per_step:
            batches.append([])
        batches[-1].append(row)
    assert batches_of(plan) == [batches[i] for i in random_stream(seed, 0, 1).permutation(len(batches))]


# --- mixtures


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 5.0)), min_size=1, max_size=4),
    st.floats(1.0, 10.0),
    seeds,
)
def test_a_mixture_gives_each_source_its_share(sources: list[tuple[int, float]], temperature: float, seed: int) -> None:
    counts, weights = [count for count, _ in sources], [weight for _, weight in sources]
    source_of_row = np.repeat(np.arange(len(counts)), counts)
    rows = mixture_rows(source_of_row, weights, temperature=temperature, seed=seed, epoch=0)
    total = sum(weight * count for count, weight in sources)
    shares = [weight * count ** (1 / temperature) for count, weight in sources]
    drawn = np.bincount(source_of_row[rows], minlength=len(counts))
    times = Counter(rows.tolist())
    for source, share in enumerate(shares):
        assert drawn[source] == pytest.approx(total * share / sum(shares), abs=0.5 + 1e-9)
        of_source = [times[row] for row in np.flatnonzero(source_of_row == source).tolist()]
        assert max(of_source) - min(of_source) <= 1, "no row comes again while another is left behind"


def test_shares_of_a_mixture_by_hand() -> None:
    source_of_row = np.repeat([0, 1], [900, 100])

    def drawn(weights: list[float], temperature: float) -> list[int]:
        rows = mixture_rows(source_of_row, weights, temperature=temperature, seed=17, epoch=0)
        return list(np.bincount(source_of_row[rows]))

    assert drawn([1.0, 1.0], 1.0) == [900, 100]
    assert drawn([1.0, 3.0], 1.0) == [900, 300]
    assert drawn([0.5, 1.0], 1.0) == [450, 100]
    assert drawn([1.0, 1.0], 2.0) == [750, 250]  # 30 : 10
    assert drawn([1.0, 1.0], 1e9) == [500, 500]


def test_a_mixture_draws_other_rows_each_epoch() -> None:
    source_of_row = np.zeros(100, dtype=np.int16)
    first, again, second = (
        mixture_rows(source_of_row, [0.5], temperature=1.0, seed=17, epoch=epoch).tolist() for epoch in (0, 0, 1)
    )
    assert first == again
    assert len(set(first)) == 50
    assert set(first) != set(second)


# --- micro-batches


def least_largest_cost(lengths: list[int], num_parts: int) -> float:
    """The smallest possible largest rows x longest over all ways to cut ascending lengths into at most num_parts."""
    best = [0.0] + [inf] * len(lengths)
    for _ in range(num_parts):
        best = [0.0] + [
            min(max(best[start], (end - start) * lengths[end - 1]) for start in range(end))
            for end in range(1, len(lengths) + 1)
        ]
    return best[-1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=14), st.integers(30, 120), st.integers(1, 4))
def test_a_step_is_cut_as_well_as_can_be(lengths: list[int], limit: int, world_size: int) -> None:
    sizes = np.array(lengths)
    micro_steps = cut_step(np.arange(len(sizes)), sizes, max_tokens_per_device=limit, world_size=world_size)
    assert all(len(parts) == world_size for parts in micro_steps)
    parts = [part for parts in micro_steps for part in parts]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(sizes))), "the union is the global batch"
    costs = [len(part) * int(sizes[part].max()) for part in parts if len(part)]
    assert max(costs) <= limit
    ascending = sorted(lengths)
    fewest = next(n for n in range(1, 99) if least_largest_cost(ascending, n * world_size) <= limit)
    assert len(micro_steps) == fewest
    assert max(costs) == least_largest_cost(ascending, fewest * world_size)


@given(some_sizes, seeds, st.integers(40, 200), st.integers(1, 9))
def test_a_cut_covers_any_subset_of_rows(sizes: list[int], seed: int, limit: int, world_size: int) -> None:
    all_sizes = np.array(sizes)
    row_ids = np.random.default_rng(seed).permutation(len(sizes))[: 1 + len(sizes) // 2]
    micro_steps = cut_step(row_ids, all_sizes, max_tokens_per_device=limit, world_size=world_size)
    parts = [part for parts in micro_steps for part in parts]
    assert sorted(np.concatenate(parts).tolist()) == sorted(row_ids.tolist())
    assert all(len(part) * all_sizes[part].max(initial=0) <= limit for part in parts)
    assert [len(parts) for parts in micro_steps] == [world_size] * len(micro_steps)
    assert sum(len(parts[0]) == 0 for parts in micro_steps) == 0, "rank 0 always has rows"


def test_a_cut_does_not_depend_on_the_order_of_the_rows_of_a_size() -> None:
    sizes: IntArray = np.array([9, 3, 5, 7, 1, 8])
    shuffled = np.array([3, 0, 5, 2, 4, 1])
    cuts = [cut_step(rows, sizes, max_tokens_per_device=12, world_size=2) for rows in (np.arange(6), shuffled)]
    plain = [[[part.tolist() for part in parts] for parts in cut] for cut in cuts]
    assert plain[0] == plain[1]


def test_ranks_short_of_rows_get_empty_micro_batches() -> None:
    micro_steps = cut_step(np.array([4]), np.array([1, 1, 1, 1, 6]), max_tokens_per_device=6, world_size=3)
    assert [[part.tolist() for part in parts] for parts in micro_steps] == [[[4], [], []]]


def test_a_row_larger_than_a_micro_batch_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"batch.max_tokens_per_device=9.*\n.*raise batch.max_tokens_per_device"):
        cut_step(np.array([0]), np.array([10]), max_tokens_per_device=9, world_size=1)


# --- packs


def slow_first_fit(rows: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for row in sorted(rows, key=lambda row: -sizes[row]):
        place = next((one for one in packs if sum(sizes[r] for r in one) + sizes[row] <= capacity), None)
        if place is None:
            packs.append([row])
        else:
            place.append(row)
    return packs


def next_fit(rows: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    packs: list[list[int]] = []
    for row in rows:
        if not packs or sum(sizes[r] for r in packs[-1]) + sizes[row] > capacity:
            packs.append([])
        packs[-1].append(row)
    return packs


@given(some_sizes, seeds, st.integers(40, 120))
def test_packs_are_those_of_first_fit_decreasing(sizes: list[int], seed: int, capacity: int) -> None:
    rows = np.random.default_rng(seed).permutation(len(sizes))[: 1 + len(sizes) // 2]
    packs = [rows.tolist() for rows in pack(rows, np.array(sizes, dtype=np.int32), capacity)]
    assert packs == slow_first_fit(rows.tolist(), sizes, capacity)


@given(some_sizes, seeds, st.integers(40, 120), st.integers(1, 4), st.integers(1, 5))
def test_a_step_of_packs(sizes: list[int], seed: int, capacity: int, num_packs: int, world_size: int) -> None:
    """Every row once, no pack over its capacity, no micro-batch over the limit, and next-fit finds the packs again."""
    limit = capacity * num_packs
    rows = np.random.default_rng(seed).permutation(len(sizes))[: 1 + len(sizes) // 2]
    micro_steps = cut_step(rows, np.array(sizes), max_tokens_per_device=limit, world_size=world_size, capacity=capacity)
    assert [len(parts) for parts in micro_steps] == [world_size] * len(micro_steps)
    parts = [part.tolist() for parts in micro_steps for part in parts]
    assert sorted(row for part in parts for row in part) == sorted(rows.tolist())
    found = [next_fit(part, sizes, capacity) for part in parts]
    assert sorted(one for packs in found for one in packs) == sorted(slow_first_fit(rows.tolist(), sizes, capacity))
    for packs in found:
        costs = [sum(sizes[row] for row in one) for one in packs]
        assert max(costs, default=0) <= capacity
        assert len(costs) * max(costs, default=0) <= limit
    as_rows = np.array([sum(sizes[row] for row in one) for packs in found for one in packs])
    best = cut_step(np.arange(len(as_rows)), as_rows, max_tokens_per_device=limit, world_size=world_size)
    assert len(micro_steps) == len(best), "as few micro-steps as for rows of the packs' sizes"


def test_packs_of_rows_of_all_sizes_are_nearly_full() -> None:
    sizes = np.random.default_rng(0).integers(5, 1024, 10_000)
    packs = pack(np.arange(len(sizes)), sizes, 1024)
    assert len(packs) <= 1.01 * sizes.sum() / 1024


def test_a_pack_larger_than_a_micro_batch_is_an_error_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"a pack of 12 tokens .*batch.max_tokens_per_device=9.*\n.*data.max_"):
        cut_step(np.array([0, 1]), np.array([6, 6]), max_tokens_per_device=9, world_size=1, capacity=12)
