"""Sampling: one token of each sentence, drawn so that neighbours change nothing.

Shapes: R sentences, one running output of each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """Scores are divided by `temperature`; the `top_k` likeliest stay (0: all), and of these as many of the likeliest
    as have a probability of `top_p` together. Rows draw from `seed`, their own number and the position alone."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"temperature above 0, top_k from 0, top_p above 0 and up to 1: {self}")

    def draw(self, scores_RV: Tensor, rows_R: Tensor, length_R: Tensor) -> Tensor:
        """A token [R] of each row: the one in whose share of the sorted probabilities the row's number falls."""
        p_RV, tokens_RV = self.probabilities(scores_RV).sort(dim=1, descending=True, stable=True)
        pairs = zip(rows_R.tolist(), length_R.tolist(), strict=True)
        number_R = torch.tensor([uniform(self.seed, row, length) for row, length in pairs], device=p_RV.device)
        reached_RV = p_RV.double().cumsum(dim=1)
        place_R = (reached_RV <= (number_R * reached_RV[:, -1]).unsqueeze(1)).sum(dim=1, keepdim=True)
        return tokens_RV.gather(1, place_R.clamp(max=p_RV.shape[1] - 1)).squeeze(1)

    def probabilities(self, scores_RV: Tensor) -> Tensor:
        """What is drawn from; the warpers of transformers 5.23 in their order."""
        scores_RV = scores_RV / self.temperature
        if self.top_k:
            lowest_R1 = scores_RV.topk(min(self.top_k, scores_RV.shape[1])).values[:, -1:]
            scores_RV = scores_RV.masked_fill(scores_RV < lowest_R1, -torch.inf)
        if self.top_p < 1.0:
            sorted_RV, tokens_RV = scores_RV.sort(dim=1)
            is_tail_RV = sorted_RV.softmax(dim=1).cumsum(dim=1) <= 1 - self.top_p
            is_tail_RV[:, -1] = False
            scores_RV = scores_RV.masked_fill(is_tail_RV.scatter(1, tokens_RV, is_tail_RV), -torch.inf)
        return scores_RV.softmax(dim=1)


def uniform(*numbers: int) -> float:
    """A number in [0, 1) that follows from whole numbers (SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
