"""Beam search without a neural network: against all sequences of a toy model, and against plain top-k.

Shapes: R sentences, N running outputs, V vocabulary.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.decoding.search import Beams, BeamSearch, best_continuations

VOCABULARY, END, LONGEST = 6, 0, 5


class Toy:
    """log p of the next token follows from the two tokens before it, at random."""

    def __init__(self, seed: int) -> None:
        logits = torch.randn(VOCABULARY + 1, VOCABULARY + 1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.log_p = (1.5 * logits).log_softmax(-1)

    def after(self, tokens: list[int]) -> Tensor:
        before = [VOCABULARY, VOCABULARY, *tokens]
        return self.log_p[before[-2], before[-1]]


def search(toy: Toy, num_outputs: int, rule: BeamSearch, num_sentences: int = 1) -> Beams:
    none = torch.zeros(num_sentences, 0, dtype=torch.long)
    beams = Beams.begin(none, torch.full((num_sentences,), LONGEST), num_outputs, LONGEST)
    while bool(beams.is_open_R.any()):
        outputs = beams.tokens_RNL.tolist()
        lengths = beams.length_R.tolist()
        rows = [[toy.after(one[:length]) for one in row] for row, length in zip(outputs, lengths, strict=True)]
        rule.advance(beams, torch.stack([torch.stack(row) for row in rows]))
    return beams


def all_outputs(toy: Toy, length_penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every output that ends by itself or at LONGEST, best first."""
    found = []
    inner = [token for token in range(VOCABULARY) if token != END]
    for length in range(1, LONGEST + 1):
        last = range(VOCABULARY) if length == LONGEST else [END]
        for tokens in itertools.product(*[inner] * (length - 1), last):
            total = sum(float(toy.after(list(tokens[:place]))[token]) for place, token in enumerate(tokens))
            found.append((total / length**length_penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_with_beams_for_everything_the_best_of_all_sequences_is_found(seed: int, length_penalty: float) -> None:
    toy = Toy(seed)
    num_outputs = 5 ** (LONGEST - 1)  # as many as there are open outputs at any length
    rule = BeamSearch((END,), length_penalty, "never")
    beams = search(toy, num_outputs, rule)
    expected = all_outputs(toy, length_penalty)[:20]
    found = [
        (score, tuple(tokens[:length]))
        for score, tokens, length in zip(
            beams.best_score_RN[0].tolist(), beams.best_RNL[0].tolist(), beams.best_length_RN[0].tolist(), strict=True
        )
    ]
    assert [tokens for _, tokens in found[:20]] == [tokens for _, tokens in expected]
    assert [score for score, _ in found[:20]] == pytest.approx([score for score, _ in expected], abs=1e-5)


def reference(toy: Toy, num_outputs: int, length_penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """The textbook: N running outputs, 2 N candidates, of which the best N may end; in plain Python."""
    running, finished = [(0.0, ())], []
    for length in range(1, LONGEST + 1):
        candidates = sorted(
            ((total + float(log_p), (*tokens, token)) for total, tokens in running
             for token, log_p in enumerate(toy.after(list(tokens)))), reverse=True,
        )[: 2 * num_outputs]  # fmt: skip
        ended = [one for one in candidates[:num_outputs] if one[1][-1] == END or length == LONGEST]
        finished += [(total / length**length_penalty, tokens) for total, tokens in ended]
        finished = sorted(finished, reverse=True)[:num_outputs]
        running = [one for one in candidates if one[1][-1] != END][:num_outputs]
        if len(finished) == num_outputs and running[0][0] / length**length_penalty <= finished[-1][0]:
            break
    return finished


@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([0.0, 0.7, 1.0, 2.0]))
def test_equals_the_textbook_in_plain_python(seed: int, num_outputs: int, length_penalty: float) -> None:
    toy = Toy(seed)
    expected = reference(toy, num_outputs, length_penalty)
    beams = search(toy, num_outputs, BeamSearch((END,), length_penalty), num_sentences=2)
    for row in range(2):
        lengths = beams.best_length_RN[row].tolist()
        found = [tuple(tokens[:length]) for tokens, length in zip(beams.best_RNL[row].tolist(), lengths, strict=True)]
        assert found == [tokens for _, tokens in expected]
        assert beams.best_score_RN[row].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(20, 3000), st.integers(0, 10**6))
def test_blocks_find_what_one_selection_over_all_finds(rows: int, beams: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_p_RNV = torch.randn(rows, beams, vocabulary, generator=generator).log_softmax(-1)
    log_p_RNV[:, :, 3] = -math.inf
    log_p_RN = torch.randn(rows, beams, generator=generator)
    values, parents, tokens = best_continuations(log_p_RNV, log_p_RN, 2 * beams)
    expected = (log_p_RNV + log_p_RN.unsqueeze(2)).flatten(1).topk(2 * beams)
    assert torch.equal(values, expected.values)
    assert torch.equal(parents * vocabulary + tokens, expected.indices)
