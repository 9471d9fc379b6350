"""Outputs that must have phrases: against all sequences of a toy model, and what small beams must not lose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.decoding.lexical import Candidate, ConstrainedBeamSearch, dealt, num_met, wants
from harness.decoding.presets import HF, Preset
from harness.decoding.search import BeamSearch
from tests.toy import END, LONGEST, VOCABULARY, Toy, search
from tests.unit.test_search import all_outputs, assert_same, beam_sizes, penalties, seeds

tokens = st.integers(1, VOCABULARY - 1)
phrases = st.lists(st.lists(st.lists(tokens, min_size=1, max_size=2), min_size=1, max_size=2), min_size=1, max_size=2)


def has(output: tuple[int, ...], phrase: list[list[int]]) -> bool:
    return any(output[place : place + len(way)] == tuple(way) for way in phrase for place in range(len(output)))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize(
    ("seed", "wanted"),
    [
        (0, [[[3]]]),
        (1, [[[2, 4]]]),
        (2, [[[1]], [[5, 5]]]),
        (3, [[[2, 2, 3]]]),
        (4, [[[1, 2]], [[2, 3]]]),
        (5, [[[1, 1], [4]], [[2, 3], [3, 3, 2]]]),
    ],
)
def test_with_beams_for_everything_the_best_sequences_with_the_phrases_are_found(
    seed: int, wanted: list[list[list[int]]], length_penalty: float
) -> None:
    toy, num_outputs = Toy(seed), (VOCABULARY - 1) ** (LONGEST - 1)
    rule = ConstrainedBeamSearch((END,), length_penalty, Preset("impossible"), phrases={0: wanted})
    [found] = search(toy, num_outputs, rule)
    expected = [one for one in all_outputs(toy, length_penalty) if all(has(one[1], phrase) for phrase in wanted)]
    assert_same(found[:10], expected[:10])


@given(seeds, beam_sizes, penalties, phrases)
def test_small_beams_meet_their_phrases_and_leave_other_rows_alone(
    seed: int, beams: int, length_penalty: float, wanted: list[list[list[int]]]
) -> None:
    toy = Toy(seed)
    rule = ConstrainedBeamSearch((END,), length_penalty, HF, phrases={1: wanted})
    free, bound, last = search(toy, beams, rule, num_sentences=3)
    [expected] = search(toy, beams, BeamSearch((END,), length_penalty))
    assert free == last == expected
    assert bound
    assert all(has(output, phrase) for _, output in bound for phrase in wanted)


def test_phrases_longer_than_an_output_are_met_as_far_as_they_can_be() -> None:
    wanted = [[[1, 2, 3, 4, 5, 1, 2]]]
    [found] = search(Toy(0), 3, ConstrainedBeamSearch((END,), 1.0, HF, phrases={0: wanted}))
    assert [output for _, output in found] == [(1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("said", "wanted", "met", "following"),
    [
        ([], [[[1, 2]], [[3]]], 0, {1, 3}),
        ([1], [[[1, 2]], [[3]]], 1, {1, 2, 3}),
        ([1, 2], [[[1, 2]], [[3]]], 2, {3}),
        ([1, 2, 5], [[[1, 2]], [[3]]], 2, {3}),
        ([1, 5], [[[1, 2]], [[3]]], 0, {1, 3}),
        ([1, 1], [[[1, 1, 2]]], 2, {1, 2}),
        ([1, 2, 3], [[[1, 2]], [[2, 3]]], 4, set()),
        ([4], [[[1, 2], [4, 2, 3]]], 1, {1, 4, 2}),
        ([1, 2], [[[1, 2], [4, 2, 3]], [[2, 5]]], 4, {2, 5}),
    ],
)
def test_what_is_met_and_what_comes_next(
    said: list[int], wanted: list[list[list[int]]], met: int, following: set[int]
) -> None:
    assert (num_met(said, wanted), wants(said, wanted)) == (met, following)


def test_places_are_dealt_to_the_banks_in_turn() -> None:
    banks = [0, 0, 0, 1, 0, 2, 1]
    candidates = [Candidate(-place, 0, 0, bank, is_complete=False, is_over=False) for place, bank in enumerate(banks)]
    assert [-one.log_p for one in dealt(candidates, 3)] == [0, 3, 5]
    assert [-one.log_p for one in dealt(candidates, 5)] == [0, 1, 3, 5, 6]
    assert [-one.log_p for one in dealt(candidates, 9)] == [*range(7)]
