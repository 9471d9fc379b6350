"""Beam search without a model: what becomes of the running outputs of many sentences when a step's log p are known.

Under `hf` the arithmetic and its order are those of transformers 5.23 `GenerationMixin._beam_search`, for each sentence
by itself, so that nothing depends on who shares the batch. What differs under the other presets is in `presets.py`.

Shapes: R sentences, N running outputs (beams) of each, K candidates, L output tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.decoding.beams import NEVER, Beams
from harness.decoding.presets import HF, Preset
from harness.decoding.sampling import Sampling
from harness.models.stops import StopStrings

BLOCK = 64  # log p are searched for the best in blocks of the vocabulary


@dataclass(frozen=True)
class Rule(ABC):
    """How a search goes on. `ends` are the tokens that end an output, `stops` the texts; scores are those of `preset`.

    An output that a text ends is scored as one cut at the longest length: with all of its tokens.
    """

    ends: tuple[int, ...]
    length_penalty: float
    preset: Preset = HF
    stops: StopStrings | None = field(default=None, kw_only=True)

    @property
    def num_groups(self) -> int:
        """Into how many groups, each searched by itself, a sentence's running outputs are dealt."""
        return 1

    @abstractmethod
    def advance(self, beams: Beams, log_p_RNV: Tensor, choice_RNV: Tensor | None = None) -> Tensor:
        """Takes the next step of every open search in place; returns which output [R, N] each running one goes on
        from. A chain may take what follows from other numbers than log p, `choice_RNV`."""

    def is_over(self, tokens_RNL: Tensor, length_R: Tensor, last_RN: Tensor) -> Tensor:
        """Which outputs, of `length_R` tokens, have ended by their last token or text."""
        is_end_RN = torch.isin(last_RN, torch.tensor(self.ends, device=last_RN.device))
        return is_end_RN if self.stops is None else is_end_RN | self.stops.reached(tokens_RNL, length_R)

    def score(self, log_p: Tensor, length: Tensor) -> Tensor:
        """Scores of outputs of `length` tokens."""
        return log_p / self.preset.divisor(length, self.length_penalty)


@dataclass(frozen=True)
class BeamSearch(Rule):
    """`num_wanted` outputs of each sentence are wanted, which some presets look at when they stop."""

    num_wanted: int = 1

    def advance(self, beams: Beams, log_p_RNV: Tensor, choice_RNV: Tensor | None = None) -> Tensor:
        num_outputs = log_p_RNV.shape[1]
        num_candidates = num_outputs * (1 if self.preset.has_no_spare else max(2, 1 + len(self.ends)))
        log_p_RK, parents_RK, tokens_RK = best_continuations(log_p_RNV, beams.log_p_RN, num_candidates)
        length_R = beams.length_R + 1
        candidates_RKL = extended(beams, parents_RK, tokens_RK)
        is_over_RK = self.is_over(candidates_RKL, length_R, tokens_RK)
        ended_RK = is_over_RK | (length_R >= beams.limit_R).unsqueeze(1)
        running_RK = log_p_RK + is_over_RK * NEVER
        if self.preset.stop == "narrow":
            running_RK = running_RK + self._is_beyond(beams, ended_RK) * NEVER

        is_new_RK = self._may_finish(beams, ended_RK, is_over_RK)
        score_RK = self.score(log_p_RK, length_R.unsqueeze(1))
        self._finish(beams, score_RK, is_new_RK, candidates_RKL, length_R)
        chosen_RN = running_RK.topk(num_outputs).indices
        parents_RN = self._go_on(beams, running_RK.gather(1, chosen_RN), candidates_RKL, parents_RK, chosen_RN)
        self._stop(beams, ended_RK)
        return parents_RN

    def _go_on(
        self, beams: Beams, log_p_RN: Tensor, candidates_RKL: Tensor, parents_RK: Tensor, chosen_RN: Tensor
    ) -> Tensor:
        """Makes the chosen candidates the running outputs of open searches; returns their parents."""
        is_open_R1 = beams.is_open.unsqueeze(1)
        chosen_RNL = _take(candidates_RKL, chosen_RN)
        beams.tokens_RNL = torch.where(is_open_R1.unsqueeze(2), chosen_RNL, beams.tokens_RNL)
        beams.log_p_RN = torch.where(is_open_R1, log_p_RN, beams.log_p_RN)
        beams.length_R = beams.length_R + beams.is_open
        own_RN = torch.arange(chosen_RN.shape[1], device=chosen_RN.device).expand_as(chosen_RN)
        return torch.where(is_open_R1, parents_RK.gather(1, chosen_RN), own_RN)

    def _is_beyond(self, beams: Beams, ended_RK: Tensor) -> Tensor:
        """Which candidates there is no place for, where every finished output has taken one for good."""
        rank_K = torch.arange(ended_RK.shape[1], device=ended_RK.device)
        num_places_R = beams.is_full_RN.shape[1] - beams.is_full_RN.sum(dim=1)
        return rank_K >= num_places_R.unsqueeze(1)

    def _may_finish(self, beams: Beams, ended_RK: Tensor, is_over_RK: Tensor) -> Tensor:
        """Which candidates of open searches are finished outputs: as a rule the ended ones of the best N."""
        num_outputs = beams.is_full_RN.shape[1]
        is_new_RK = ended_RK & beams.is_open.unsqueeze(1)
        if self.preset.stop == "bound":  # one cut short only if nothing has ended by itself
            has_ended_R = (is_new_RK & is_over_RK).any(dim=1) | beams.is_full_RN.any(dim=1)
            return is_new_RK & (is_over_RK | ~has_ended_R.unsqueeze(1))
        is_new_RK[:, num_outputs:] = False
        if self.preset.stop == "narrow":
            return is_new_RK & ~self._is_beyond(beams, ended_RK)
        if self.preset.stop == "first":
            num_places_R = num_outputs - beams.is_full_RN.sum(dim=1)
            is_new_RK &= is_new_RK.cumsum(dim=1) <= num_places_R.unsqueeze(1)
        return is_new_RK

    def _finish(
        self, beams: Beams, score_RK: Tensor, is_new_RK: Tensor, candidates_RKL: Tensor, length_R: Tensor
    ) -> None:
        """Keeps the N best of what is finished and what is new."""
        merged = torch.cat([beams.best_score_RN, score_RK + ~is_new_RK * NEVER], dim=1)
        beams.best_score_RN, kept_RN = merged.topk(beams.log_p_RN.shape[1])
        beams.best_RNL = _take(torch.cat([beams.best_RNL, candidates_RKL], dim=1), kept_RN)
        length_RK = length_R.unsqueeze(1).expand_as(is_new_RK)
        beams.best_length_RN = torch.cat([beams.best_length_RN, length_RK], dim=1).gather(1, kept_RN)
        beams.is_full_RN = torch.cat([beams.is_full_RN, is_new_RK], dim=1).gather(1, kept_RN)

    def _stop(self, beams: Beams, ended_RK: Tensor) -> None:
        """Closes the searches that are done, or have nothing left to go on with."""
        is_full_R = beams.is_full_RN.all(dim=1)
        stop = self.preset.stop
        if stop in ("unlikely", "impossible", "full"):
            beams.can_improve_R = beams.can_improve_R & self._can_overtake(beams, -1)
            is_done_R = ~beams.can_improve_R | (is_full_R & (stop == "full"))
        elif stop == "bound":
            is_done_R = ~self._can_overtake(beams, 0 if self.num_wanted == 1 else -1)
        elif stop == "top" or (stop == "filled" and self.length_penalty == 0.0):
            beams.can_improve_R = beams.can_improve_R & ~ended_RK[:, 0]
            is_done_R = ~beams.can_improve_R & (beams.is_full_RN.sum(dim=1) >= self.num_wanted)
        else:
            is_done_R = is_full_R
        beams.is_open_RG = beams.is_open_RG & ~(is_done_R | ended_RK.all(dim=1)).unsqueeze(1)

    def _can_overtake(self, beams: Beams, place: int) -> Tensor:
        """Whether the best running output could still be better than what is finished at a place, or that is free."""
        looks_ahead = self.preset.stop in ("impossible", "bound") and self.length_penalty > 0.0
        length_R = beams.limit_R if looks_ahead else beams.length_R
        best_R = self.score(beams.log_p_RN[:, 0], length_R)
        return best_R > beams.best_score_RN[:, place].clamp(min=NEVER)


@dataclass(frozen=True)
class Chain(Rule):
    """`num_chains` running outputs, each of which takes the likeliest token at each position, or draws it; the score
    only describes it. Of several chains each is a draw of its own, in the order of their numbers."""

    num_chains: int = 1
    sampling: Sampling | None = None

    @property
    def num_groups(self) -> int:
        return self.num_chains

    def advance(self, beams: Beams, log_p_RNV: Tensor, choice_RNV: Tensor | None = None) -> Tensor:
        choice_RNV = log_p_RNV if choice_RNV is None else choice_RNV
        if self.sampling is None:
            tokens_RN = choice_RNV.argmax(dim=2)
        else:
            tokens_RN = self.sampling.draw(choice_RNV, beams.rows_R, beams.length_R)
        log_p_RN = log_p_RNV.gather(2, tokens_RN.unsqueeze(2)).squeeze(2)
        is_open_RN = beams.is_open_RG
        beams.length_R = beams.length_R + beams.is_open
        length_R1 = beams.length_R.unsqueeze(1)
        at_end_RNL = (length_R1 - 1).unsqueeze(2).expand(-1, tokens_RN.shape[1], -1)
        tokens_RN = torch.where(is_open_RN, tokens_RN, beams.tokens_RNL.gather(2, at_end_RNL).squeeze(2))
        beams.tokens_RNL.scatter_(2, at_end_RNL, tokens_RN.unsqueeze(2))
        beams.log_p_RN = beams.log_p_RN + log_p_RN.masked_fill(~is_open_RN, 0.0)
        score_RN = self.score(beams.log_p_RN, length_R1)
        beams.best_RNL = beams.tokens_RNL
        beams.best_length_RN = torch.where(is_open_RN, length_R1, beams.best_length_RN)
        beams.best_score_RN = torch.where(is_open_RN, score_RN, beams.best_score_RN)
        is_over_RN = self.is_over(beams.tokens_RNL, beams.length_R, tokens_RN)
        beams.is_open_RG = is_open_RN & ~is_over_RN & (length_R1 < beams.limit_R.unsqueeze(1))
        return torch.arange(self.num_chains, device=tokens_RN.device).expand_as(tokens_RN)


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


def extended(beams: Beams, parents_RK: Tensor, tokens_RK: Tensor) -> Tensor:
    """The candidates [R, K, L]: running outputs with one more token."""
    candidates_RKL = _take(beams.tokens_RNL, parents_RK)
    at_end_R = beams.length_R.clamp(max=candidates_RKL.shape[2] - 1)
    return candidates_RKL.scatter(2, at_end_R[:, None, None].expand(*tokens_RK.shape, 1), tokens_RK.unsqueeze(2))


def _take(sequences: Tensor, index: Tensor) -> Tensor:
    """Sequences [R, M, L] in another order [R, K]."""
    return sequences.gather(1, index.unsqueeze(2).expand(-1, -1, sequences.shape[2]))
