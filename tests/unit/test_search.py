"""Beam search without a neural network: against all sequences of a toy model, each toolkit's rule in plain Python, and
plain top-k.

Shapes: R sentences, N running outputs, V vocabulary.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.decoding.diverse import DiverseBeamSearch
from harness.decoding.presets import HF, PRESETS, Preset
from harness.decoding.search import BeamSearch, best_continuations
from tests.toy import END, LONGEST, VOCABULARY, Output, Toy, search

seeds = st.integers(0, 10**6)
beam_sizes = st.integers(2, 4)
penalties = st.sampled_from([0.0, 0.6, 1.0, 2.0])


def all_outputs(toy: Toy, length_penalty: float) -> list[Output]:
    """Every output that ends by itself or at LONGEST, best first."""
    found = []
    inner = [token for token in range(VOCABULARY) if token != END]
    for length in range(1, LONGEST + 1):
        last = range(VOCABULARY) if length == LONGEST else [END]
        for tokens in itertools.product(*[inner] * (length - 1), last):
            total = sum(float(toy.after(tokens[:place])[token]) for place, token in enumerate(tokens))
            found.append((total / length**length_penalty, tokens))
    return sorted(found, reverse=True)


def assert_same(found: list[Output], expected: list[Output]) -> None:
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_with_beams_for_everything_the_best_of_all_sequences_are_found(seed: int, length_penalty: float) -> None:
    toy = Toy(seed)
    num_outputs = (VOCABULARY - 1) ** (LONGEST - 1)  # as many as there are open outputs at any length
    [found] = search(toy, num_outputs, BeamSearch((END,), length_penalty, Preset("impossible")))
    assert_same(found[:20], all_outputs(toy, length_penalty)[:20])


@given(seeds, beam_sizes, penalties, st.sampled_from([False, True]))
def test_hf(seed: int, beams: int, length_penalty: float, stops_when_full: bool) -> None:
    toy, running, finished = Toy(seed), [(0.0, ())], []
    for length in range(1, LONGEST + 1):
        candidates = toy.continuations(running, 2 * beams)
        ended = [one for one in candidates[:beams] if one[1][-1] == END or length == LONGEST]
        finished += [(total / length**length_penalty, tokens) for total, tokens in ended]
        finished = sorted(finished, reverse=True)[:beams]
        running = [one for one in candidates if one[1][-1] != END][:beams]
        is_hopeless = running[0][0] / length**length_penalty <= finished[-1][0] if finished else False
        if len(finished) == beams and (is_hopeless or stops_when_full):
            break
    rule = BeamSearch((END,), length_penalty, Preset("full") if stops_when_full else HF)
    for found in search(toy, beams, rule, num_sentences=2):
        assert_same(found, finished)


@given(seeds, beam_sizes, penalties)
def test_fairseq(seed: int, beams: int, length_penalty: float) -> None:
    toy, running, finished = Toy(seed), [(0.0, ())], []
    for length in range(1, LONGEST + 1):
        candidates = toy.continuations(running, 2 * beams, only_end=length == LONGEST)
        for total, tokens in candidates[:beams]:
            if tokens[-1] == END and len(finished) < beams:
                finished.append((total / length**length_penalty, tokens))
        if len(finished) == beams:
            break
        running = [one for one in candidates if one[1][-1] != END][:beams]
    [found] = search(toy, beams, BeamSearch((END,), length_penalty, PRESETS["fairseq"]))
    assert_same(found, sorted(finished, reverse=True))


@given(seeds, beam_sizes, penalties, st.integers(1, 2))
def test_gnmt(seed: int, beams: int, length_penalty: float, wanted: int) -> None:
    toy, running, finished = Toy(seed), [(0.0, ())], []
    for length in range(1, LONGEST + 1):
        candidates = toy.continuations(running, 2 * beams)
        ended = [one for one in candidates if one[1][-1] == END]
        finished += [(total / ((5 + length) / 6) ** length_penalty, tokens) for total, tokens in ended]
        finished = sorted(finished, reverse=True)[:beams]
        running = [one for one in candidates if one[1][-1] != END][:beams]
        has_enough = len(finished) >= (1 if wanted == 1 else beams)
        rival = finished[0 if wanted == 1 else -1][0] if has_enough else -math.inf
        if running[0][0] / ((5 + LONGEST) / 6) ** length_penalty < rival:
            break
    cut = [(total / ((5 + LONGEST) / 6) ** length_penalty, tokens) for total, tokens in running]
    [found] = search(toy, beams, BeamSearch((END,), length_penalty, PRESETS["gnmt"], num_wanted=wanted))
    assert_same(found, finished or sorted(cut, reverse=True)[:beams])


@given(seeds, beam_sizes, penalties)
def test_marian(seed: int, beams: int, length_penalty: float) -> None:
    toy, running, finished = Toy(seed), [(0.0, ())], []
    places = beams
    for length in range(1, LONGEST + 1):
        candidates = toy.continuations(running, places)
        ended = [one for one in candidates if one[1][-1] == END or length == LONGEST]
        finished += [(total / length**length_penalty, tokens) for total, tokens in ended]
        running = [one for one in candidates if one not in ended]
        places = len(running)
        if not running:
            break
    [found] = search(toy, beams, BeamSearch((END,), length_penalty, PRESETS["marian"]))
    assert_same(found, sorted(finished, reverse=True))


@given(seeds, beam_sizes, penalties, st.integers(1, 2))
def test_opennmt(seed: int, beams: int, length_penalty: float, wanted: int) -> None:
    toy, running, finished = Toy(seed), [(0.0, ())], []
    top_has_ended = False
    for length in range(1, LONGEST + 1):
        candidates = toy.continuations(running, beams)
        ended = [one for one in candidates if one[1][-1] == END or length == LONGEST]
        finished += [(total / (length + 1) ** length_penalty, tokens) for total, tokens in ended]
        running = [one for one in candidates if one not in ended]
        top_has_ended |= candidates[0] in ended
        if not running or (top_has_ended and len(finished) >= wanted):
            break
    rule = BeamSearch((END,), length_penalty, PRESETS["opennmt"], num_wanted=wanted)
    [found] = search(toy, beams, rule)
    assert_same(found[:wanted], sorted(finished, reverse=True)[:wanted])


@given(seeds, beam_sizes, penalties, st.integers(1, 2))
def test_ctranslate2(seed: int, beams: int, length_penalty: float, wanted: int) -> None:
    toy, running, finished = Toy(seed), [(0.0, ())], []
    top_has_ended = False
    for length in range(1, LONGEST + 1):
        candidates = toy.continuations(running, 2 * beams)
        ended = [one for one in candidates[:beams] if one[1][-1] == END or length == LONGEST]
        finished += [(total / length**length_penalty, tokens) for total, tokens in ended]
        top_has_ended |= candidates[0] in ended
        enough = top_has_ended and len(finished) >= wanted if length_penalty == 0 else len(finished) >= beams
        if enough:
            break
        running = [one for one in candidates if one[1][-1] != END][:beams]
    rule = BeamSearch((END,), length_penalty, PRESETS["ctranslate2"], num_wanted=wanted)
    [found] = search(toy, beams, rule)
    assert_same(found[:wanted], sorted(finished, reverse=True)[:wanted])


@given(seeds, st.integers(1, 3), st.integers(1, 3), penalties, st.sampled_from([0.0, 0.3, 2.0]))
def test_diverse_groups(seed: int, groups: int, beams: int, length_penalty: float, penalty: float) -> None:
    """Algorithm 1 of the paper, with Hamming diversity: in a step each group in its turn, with the stop rule of hf."""
    toy = Toy(seed)
    running: list[list[Output]] = [[(0.0, ())] for _ in range(groups)]
    finished: list[list[Output]] = [[] for _ in range(groups)]
    is_open = [True] * groups
    for length in range(1, LONGEST + 1):
        said = [0] * VOCABULARY
        for group in (group for group in range(groups) if is_open[group]):
            longer = toy.continuations(running[group], beams * VOCABULARY)
            candidates = sorted(((total - penalty * said[one[-1]], one) for total, one in longer), reverse=True)
            candidates = candidates[: 2 * beams]
            ended = [one for one in candidates[:beams] if one[1][-1] == END or length == LONGEST]
            scored = [(total / length**length_penalty, tokens) for total, tokens in ended]
            finished[group] = sorted(finished[group] + scored, reverse=True)[:beams]
            running[group] = [one for one in candidates if one[1][-1] != END][:beams]
            for _, tokens in running[group]:
                said[tokens[-1]] += 1
            is_full = len(finished[group]) == beams
            is_open[group] = not (is_full and running[group][0][0] / length**length_penalty <= finished[group][-1][0])
    rule = DiverseBeamSearch((END,), length_penalty, groups=groups, diversity_penalty=penalty)
    for found in search(toy, groups * beams, rule, num_sentences=2):
        assert [score for score, _ in found] == sorted((score for score, _ in found), reverse=True)
        expected = sorted((one for group in finished for one in group), reverse=True)
        assert_same(sorted(found, reverse=True), expected)
    if groups == 1:
        assert_same(found, search(toy, beams, BeamSearch((END,), length_penalty))[0])


@pytest.mark.parametrize(
    ("name", "length_penalty", "score"),
    [
        ("hf", 1.0, -6.0 / 4),
        ("fairseq", 0.5, -6.0 / 2),
        ("gnmt", 0.6, -6.0 / 1.5**0.6),
        ("marian", 0.0, -6.0),
        ("opennmt", 1.0, -6.0 / 5),
        ("ctranslate2", 1.0, -6.0 / 4),
    ],
)
def test_scores_by_hand(name: str, length_penalty: float, score: float) -> None:
    """Four tokens, the last one </s>, of log p -6."""
    rule = BeamSearch((END,), length_penalty, PRESETS[name])
    found = rule.score(torch.tensor([-6.0]), torch.tensor([4]))
    assert found.tolist() == pytest.approx([score])
    assert "T^length_penalty" in rule.preset.formula or "(5 + T)" in rule.preset.formula


@given(st.integers(1, 3), st.integers(1, 6), st.integers(20, 3000), seeds)
def test_blocks_find_what_one_selection_over_all_finds(rows: int, beams: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p_RNV = torch.randn(rows, beams, vocabulary, generator=generator).log_softmax(-1)
    log_p_RNV[:, :, 3] = -math.inf
    log_p_RN = torch.randn(rows, beams, generator=generator)
    values, parents, tokens = best_continuations(log_p_RNV, log_p_RN, 2 * beams)
    expected = (log_p_RNV + log_p_RN.unsqueeze(2)).flatten(1).topk(2 * beams)
    assert torch.equal(values, expected.values)
    assert torch.equal(parents * vocabulary + tokens, expected.indices)
