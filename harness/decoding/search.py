"""Beam search without a model: what becomes of the running outputs of many sentences when a step's log p are known.

The arithmetic and its order are those of transformers 5.23 `GenerationMixin._beam_search`, for each sentence by itself,
so that nothing depends on who shares the batch.

Shapes: R sentences, N running outputs (beams) of each, K candidates, L output tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from harness.models.tree import ROOM

NEVER = -1.0e9  # log p of what cannot be chosen
BLOCK = 64  # log p are searched for the best in blocks of the vocabulary


@dataclass
class Beams:
    """R searches between two steps.

    `tokens_RNL` are the running outputs, of which `length_R` tokens are there, with log p `log_p_RN`. `best_RNL` are
    the N best finished ones with `best_length_RN` tokens, </s> included, and `best_score_RN`; `is_full_RN` tells which
    places are taken. `limit_R` is the longest output. `can_improve_R`: a running output might still enter the best.
    """

    tokens_RNL: Tensor
    log_p_RN: Tensor
    best_RNL: Tensor
    best_length_RN: Tensor
    best_score_RN: Tensor
    is_full_RN: Tensor
    length_R: Tensor
    limit_R: Tensor
    can_improve_R: Tensor
    is_open_R: Tensor

    @classmethod
    def begin(cls, prefix_RP: Tensor, limit_R: Tensor, num_outputs: int, room: int) -> Beams:
        """One running output per sentence, `prefix_RP`, and N - 1 that lose against any other."""
        num_sentences, length = prefix_RP.shape
        shape = (num_sentences, num_outputs)
        tokens_RNL = prefix_RP.new_zeros((*shape, room))
        tokens_RNL[:, :, :length] = prefix_RP.unsqueeze(1)
        log_p_RN = torch.zeros(shape, device=prefix_RP.device)
        log_p_RN[:, 1:] = NEVER
        is_open_R = torch.ones(num_sentences, dtype=torch.bool, device=prefix_RP.device)
        return cls(
            tokens_RNL=tokens_RNL,
            log_p_RN=log_p_RN,
            best_RNL=tokens_RNL.clone(),
            best_length_RN=torch.zeros_like(tokens_RNL[:, :, 0]),
            best_score_RN=torch.full_like(log_p_RN, NEVER),
            is_full_RN=torch.zeros(shape, dtype=torch.bool, device=prefix_RP.device),
            length_R=torch.full_like(limit_R, length),
            limit_R=limit_R,
            can_improve_R=is_open_R.clone(),
            is_open_R=is_open_R,
        )

    @property
    def last_tokens(self) -> Tensor:
        """[R, N]"""
        num_outputs = self.tokens_RNL.shape[1]
        return self.tokens_RNL.gather(2, (self.length_R - 1)[:, None, None].expand(-1, num_outputs, 1)).squeeze(2)

    @staticmethod
    def merge(parts: list[tuple[Beams, Tensor]]) -> Beams:
        """The named sentences of each, with room for ROOM more tokens."""
        joined: dict[str, Tensor] = {}
        room = ROOM + max(int(beams.length_R.max()) for beams, _ in parts)
        for name in (field.name for field in fields(Beams)):
            picked = [getattr(beams, name)[rows] for beams, rows in parts]
            if name.endswith("L"):
                picked = [functional.pad(one, (0, max(0, room - one.shape[2])))[:, :, :room] for one in picked]
            joined[name] = torch.cat(picked)
        return Beams(**joined)


@dataclass(frozen=True)
class Rule(ABC):
    """How a search goes on: `ends` are the tokens that end an output."""

    ends: tuple[int, ...]

    @abstractmethod
    def advance(self, beams: Beams, log_p_RNV: Tensor) -> Tensor:
        """Takes the next step of every open search in place; returns which output [R, N] each running one goes on
        from."""

    def has_ended(self, tokens: Tensor, length_R: Tensor, limit_R: Tensor) -> Tensor:
        """Which outputs end with one of the `tokens` [R, ...] as their `length_R`-th token."""
        return torch.isin(tokens, torch.tensor(self.ends, device=tokens.device)) | (length_R >= limit_R).unsqueeze(1)


@dataclass(frozen=True)
class BeamSearch(Rule):
    """How outputs are ranked and when a search stops.

    A score is log p / T ** `length_penalty`, where T counts every output token and the one that ends it.
    `early_stopping`: False stops when the best running output, were it finished now, would not enter the N best; True
    as soon as N are finished; "never" when none can enter whatever its length.
    """

    length_penalty: float
    early_stopping: bool | Literal["never"] = False

    def advance(self, beams: Beams, log_p_RNV: Tensor) -> Tensor:
        num_sentences, num_outputs, _ = log_p_RNV.shape
        num_candidates = max(2, 1 + len(self.ends)) * num_outputs
        log_p_RK, parents_RK, tokens_RK = best_continuations(log_p_RNV, beams.log_p_RN, num_candidates)
        length_R = beams.length_R + 1
        ended_RK = self.has_ended(tokens_RK, length_R, beams.limit_R)
        candidates_RKL = _take(beams.tokens_RNL, parents_RK)
        at_end = (length_R - 1).clamp(max=candidates_RKL.shape[2] - 1)[:, None, None].expand(-1, num_candidates, 1)
        candidates_RKL.scatter_(2, at_end, tokens_RK.unsqueeze(2))

        self._finish(beams, log_p_RK, ended_RK, candidates_RKL, length_R)
        running_RK = log_p_RK + ended_RK * NEVER
        chosen_RN = running_RK.topk(num_outputs).indices
        is_open_R1 = beams.is_open_R.unsqueeze(1)
        beams.tokens_RNL = torch.where(is_open_R1.unsqueeze(2), _take(candidates_RKL, chosen_RN), beams.tokens_RNL)
        beams.log_p_RN = torch.where(is_open_R1, running_RK.gather(1, chosen_RN), beams.log_p_RN)
        beams.length_R = torch.where(beams.is_open_R, length_R, beams.length_R)
        self._stop(beams, ended_RK)
        own_RN = torch.arange(num_outputs, device=parents_RK.device).expand(num_sentences, -1)
        return torch.where(is_open_R1, parents_RK.gather(1, chosen_RN), own_RN)

    def _finish(
        self, beams: Beams, log_p_RK: Tensor, ended_RK: Tensor, candidates_RKL: Tensor, length_R: Tensor
    ) -> None:
        """Puts the ended ones of the best N candidates among the finished, where they are better."""
        num_outputs = beams.log_p_RN.shape[1]
        is_new_RK = ended_RK.clone()
        is_new_RK[:, num_outputs:] = False
        score_RK = log_p_RK / (length_R**self.length_penalty).unsqueeze(1)
        score_RK = score_RK + (~beams.is_open_R).unsqueeze(1) * NEVER
        score_RK = score_RK + ~is_new_RK * NEVER
        merged = torch.cat([beams.best_score_RN, score_RK], dim=1)
        beams.best_score_RN, kept_RN = merged.topk(num_outputs)
        beams.best_RNL = _take(torch.cat([beams.best_RNL, candidates_RKL], dim=1), kept_RN)
        length_RK = length_R.unsqueeze(1).expand_as(is_new_RK)
        beams.best_length_RN = torch.cat([beams.best_length_RN, length_RK], dim=1).gather(1, kept_RN)
        beams.is_full_RN = torch.cat([beams.is_full_RN, is_new_RK], dim=1).gather(1, kept_RN)

    def _stop(self, beams: Beams, ended_RK: Tensor) -> None:
        """Closes the searches that cannot improve, are full, or have nothing left to go on with."""
        bounded = self.early_stopping == "never" and self.length_penalty > 0.0
        length_R = beams.limit_R if bounded else beams.length_R
        best_R = beams.log_p_RN[:, 0] / length_R**self.length_penalty
        worst_R = torch.where(beams.is_full_RN.all(dim=1), beams.best_score_RN.min(dim=1).values, NEVER)
        beams.can_improve_R = beams.can_improve_R & (best_R > worst_R)
        goes_on_R = beams.can_improve_R & ~ended_RK.all(dim=1)
        if self.early_stopping is True:
            goes_on_R &= ~beams.is_full_RN.all(dim=1)
        beams.is_open_R = beams.is_open_R & goes_on_R


@dataclass(frozen=True)
class Greedy(Rule):
    """Takes the likeliest token at each position, for searches with one running output; the score only describes it."""

    length_penalty: float

    def advance(self, beams: Beams, log_p_RNV: Tensor) -> Tensor:
        log_p_RN, tokens_RN = log_p_RNV.max(dim=2)
        beams.length_R = beams.length_R + beams.is_open_R
        at_end_RNL = (beams.length_R - 1)[:, None, None]
        is_open_R1 = beams.is_open_R.unsqueeze(1)
        tokens_RN = torch.where(is_open_R1, tokens_RN, beams.tokens_RNL.gather(2, at_end_RNL).squeeze(2))
        beams.tokens_RNL.scatter_(2, at_end_RNL, tokens_RN.unsqueeze(2))
        beams.log_p_RN = beams.log_p_RN + log_p_RN.masked_fill(~is_open_R1, 0.0)
        beams.best_RNL, beams.best_length_RN = beams.tokens_RNL, beams.length_R.unsqueeze(1)
        beams.best_score_RN = beams.log_p_RN / (beams.length_R**self.length_penalty).unsqueeze(1)
        beams.is_open_R = beams.is_open_R & ~self.has_ended(tokens_RN, beams.length_R, beams.limit_R).squeeze(1)
        return torch.zeros_like(tokens_RN)


def best_continuations(log_p_RNV: Tensor, log_p_RN: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log p, parent and token of the `num` best continuations of each sentence, best first.

    The best of a vocabulary lie in the blocks whose largest element is among the best: two small selections instead of
    one over N x V.
    """
    _, num_outputs, vocabulary = log_p_RNV.shape
    num_blocks = vocabulary // BLOCK
    if num_outputs * num_blocks <= 4 * num:
        log_p_RK, index_RK = (log_p_RNV + log_p_RN.unsqueeze(2)).flatten(1).topk(num)
        return log_p_RK, index_RK // vocabulary, index_RK % vocabulary
    whole = num_blocks * BLOCK
    largest = [log_p_RNV[:, :, :whole].unflatten(2, (num_blocks, BLOCK)).amax(dim=3)]
    if whole < vocabulary:
        largest.append(log_p_RNV[:, :, whole:].amax(dim=2, keepdim=True))
    largest_RNB = torch.cat(largest, dim=2) + log_p_RN.unsqueeze(2)
    blocks_RK = largest_RNB.flatten(1).topk(num).indices
    parents_RK, block_RK = blocks_RK // largest_RNB.shape[2], blocks_RK % largest_RNB.shape[2]
    tokens = block_RK.unsqueeze(2) * BLOCK + torch.arange(BLOCK, device=block_RK.device)
    index = (parents_RK.unsqueeze(2) * vocabulary + tokens.clamp(max=vocabulary - 1)).flatten(1)
    values = log_p_RNV.flatten(1).gather(1, index) + log_p_RN.gather(1, parents_RK).repeat_interleave(BLOCK, dim=1)
    values = values.masked_fill((tokens >= vocabulary).flatten(1), -torch.inf)
    log_p_RK, place_RK = values.topk(num)
    return log_p_RK, parents_RK.gather(1, place_RK // BLOCK), tokens.flatten(1).gather(1, place_RK)


def _take(sequences: Tensor, index: Tensor) -> Tensor:
    """Sequences [R, M, L] in another order [R, K]."""
    return sequences.gather(1, index.unsqueeze(2).expand(-1, -1, sequences.shape[2]))
