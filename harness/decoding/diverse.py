"""Diverse beam search: groups of beams one after the other, each kept from what the earlier ones have just said.

Vijayakumar et al. 2016, "Diverse Beam Search", algorithm 1 with Hamming diversity, as transformers 4 had it: the
penalty stays in the scores. Each group is a beam search of its own, with its own stop.

Shapes: R sentences, N running outputs of each in G groups, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.decoding.beams import Beams
from harness.decoding.search import BeamSearch


@dataclass(frozen=True)
class DiverseBeamSearch(BeamSearch):
    """`diversity_penalty` is taken from log p of a token for every beam of an earlier group that goes on with it."""

    groups: int = 2
    diversity_penalty: float = 0.5

    @property
    def num_groups(self) -> int:
        return self.groups

    def advance(self, beams: Beams, log_p_RNV: Tensor, choice_RNV: Tensor | None = None) -> Tensor:
        size = log_p_RNV.shape[1] // self.groups
        penalty_RV = torch.zeros_like(log_p_RNV[:, 0])
        parts, parents = [], []
        for group in range(self.groups):
            part = beams.group(group)
            log_p = log_p_RNV[:, group * size : (group + 1) * size] - penalty_RV.unsqueeze(1)
            is_open_R1 = part.is_open_RG
            parents.append(super().advance(part, log_p) + group * size)
            said = self.diversity_penalty * is_open_R1.to(log_p.dtype).expand(-1, size)
            penalty_RV = penalty_RV.scatter_add(1, part.last_tokens, said)
            parts.append(part)
        beams.join(parts)
        _rank(beams)
        return torch.cat(parents, dim=1)


def _rank(beams: Beams) -> None:
    """The finished outputs of all groups, best first, where every group is done."""
    order_RN = beams.best_score_RN.argsort(dim=1, descending=True, stable=True)
    own_RN = torch.arange(order_RN.shape[1], device=order_RN.device).expand_as(order_RN)
    order_RN = torch.where(beams.is_open.unsqueeze(1), own_RN, order_RN)
    beams.best_RNL = beams.best_RNL.gather(1, order_RN.unsqueeze(2).expand_as(beams.best_RNL))
    beams.best_length_RN = beams.best_length_RN.gather(1, order_RN)
    beams.best_score_RN = beams.best_score_RN.gather(1, order_RN)
    beams.is_full_RN = beams.is_full_RN.gather(1, order_RN)
