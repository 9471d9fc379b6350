"""Sampling: the next token of each output, drawn so that neighbours change nothing.

Shapes: R sentences, N outputs drawn of each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """Scores are divided by `temperature`; the `top_k` likeliest stay (0: all), and of these as many of the likeliest
    as have a probability of `top_p` together. A draw follows from `seed`, row, sample and position alone."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"temperature above 0, top_k from 0, top_p above 0 and up to 1: {self}")

    def draw(self, scores_RNV: Tensor, rows_R: Tensor, length_R: Tensor) -> Tensor:
        """A token [R, N] of each output: the one in whose share of the probabilities its own number falls."""
        pairs = zip(rows_R.tolist(), length_R.tolist(), strict=True)
        numbers = [[uniform(self.seed, row, n, length) for n in range(scores_RNV.shape[1])] for row, length in pairs]
        reached_RNV = self.probabilities(scores_RNV).double().cumsum(dim=2)
        number_RN1 = torch.tensor(numbers, dtype=torch.float64, device=scores_RNV.device).unsqueeze(2)
        place_RN1 = torch.searchsorted(reached_RNV, number_RN1 * reached_RNV[..., -1:], right=True)
        return place_RN1.clamp(max=scores_RNV.shape[2] - 1).squeeze(2)

    def probabilities(self, scores: Tensor) -> Tensor:
        """What is drawn from [..., V]; the warpers of transformers 5.23 in their order."""
        scores = scores / self.temperature
        if self.top_k:
            lowest = scores.topk(min(self.top_k, scores.shape[-1])).values[..., -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        if self.top_p < 1.0:
            ascending, tokens = scores.sort(dim=-1)
            is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            is_tail[..., -1] = False
            scores = scores.masked_fill(torch.zeros_like(is_tail).scatter(-1, tokens, is_tail), -torch.inf)
        return scores.softmax(dim=-1)


def uniform(*numbers: int) -> float:
    """A number in [0, 1) that follows from whole numbers (SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
