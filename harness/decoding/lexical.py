"""Beam search for outputs that must have given phrases: dynamic beam allocation (Post and Vilar 2018).

Outputs stand in banks by how many tokens of their phrases they have. The places of the beam are dealt to the banks in
turn, so that outputs which have met much are not pushed out by likelier ones which have met little.

Shapes: Q sentences with phrases, N running outputs of each, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from harness.decoding.beams import NEVER, Beams
from harness.decoding.search import BeamSearch, best_continuations, extended

Phrase = Sequence[int]  # tokens


class Candidate(NamedTuple):
    """A running output with one more token."""

    log_p: float
    parent: int
    token: int
    bank: int
    is_complete: bool
    is_over: bool


NOBODY = Candidate(NEVER, 0, 0, 0, is_complete=False, is_over=True)


@dataclass(frozen=True)
class ConstrainedBeamSearch(BeamSearch):
    """`phrases` by row; a row without any is searched as by `BeamSearch`. An output ends when it has all of its
    phrases, or at its longest length; one that lacks some counts only if no other output is there."""

    phrases: Mapping[int, Sequence[Phrase]] = field(kw_only=True)

    def advance(self, beams: Beams, log_p_RNV: Tensor, choice_RNV: Tensor | None = None) -> Tensor:
        has_phrases = [row in self.phrases for row in beams.rows_R.tolist()]
        if not any(has_phrases):
            return super().advance(beams, log_p_RNV)
        parents_RN = torch.empty_like(beams.tokens_RNL[:, :, 0])
        for advance, is_bound in ((super().advance, False), (self._advance_bound, True)):
            if is_bound in has_phrases:
                places = [place for place, bound in enumerate(has_phrases) if bound is is_bound]
                index = torch.tensor(places, device=parents_RN.device)
                part = beams.take(index)
                parents_RN[index] = advance(part, log_p_RNV[index])
                beams.put(index, part)
        return parents_RN

    def _advance_bound(self, beams: Beams, log_p_QNV: Tensor) -> Tensor:
        rows = self._candidates(beams, log_p_QNV)
        num_outputs, is_open = log_p_QNV.shape[1], beams.is_open.tolist()
        num_best = beams.is_full_RN.sum(dim=1).tolist()
        running = [dealt([one for one in row if not one.is_over], num_outputs) for row in rows]
        finished = [
            finishing(row, num_outputs, is_stuck=not going and not best) if still else []
            for row, going, best, still in zip(rows, running, num_best, is_open, strict=True)
        ]
        padded = [
            (go + [NOBODY] * num_outputs)[:num_outputs] + (done + [NOBODY] * num_outputs)[:num_outputs]
            for go, done in zip(running, finished, strict=True)
        ]
        table = torch.tensor([[one[1:3] for one in row] for row in padded], device=log_p_QNV.device)
        log_p_QK = log_p_QNV.new_tensor([[one.log_p for one in row] for row in padded])
        is_over_QK = torch.tensor([[one.is_over for one in row] for row in padded], device=log_p_QNV.device)
        parents_QK, tokens_QK = table.unbind(dim=2)
        candidates_QKL, length_Q = extended(beams, parents_QK, tokens_QK), beams.length_R + 1
        score_QK = self.score(log_p_QK, length_Q.unsqueeze(1), self.is_end(tokens_QK))
        is_new_QK = is_over_QK & (log_p_QK > NEVER / 2)
        self._finish(beams, score_QK, is_new_QK, candidates_QKL, length_Q)
        chosen_QN = torch.arange(num_outputs, device=length_Q.device).expand(len(rows), -1)
        parents_QN = self._go_on(beams, log_p_QK[:, :num_outputs], candidates_QKL, parents_QK, chosen_QN)
        self._stop(beams, is_over_QK)
        return parents_QN

    def _candidates(self, beams: Beams, log_p_QNV: Tensor) -> list[list[Candidate]]:
        """Of each search the likeliest continuations of all, those of each output, and those that a phrase wants."""
        lengths, limits = beams.length_R.tolist(), beams.limit_R.tolist()
        outputs = [
            [tokens[:length] for tokens in row] for row, length in zip(beams.tokens_RNL.tolist(), lengths, strict=True)
        ]
        phrases = [self.phrases[row] for row in beams.rows_R.tolist()]
        wanted = [[wants(tokens, mine) for tokens in row] for row, mine in zip(outputs, phrases, strict=True)]
        is_last = [length + 1 >= limit for length, limit in zip(lengths, limits, strict=True)]
        goes_on = [[bool(more) and not last for more in row] for row, last in zip(wanted, is_last, strict=True)]
        log_p_QNV = log_p_QNV.clone()
        log_p_QNV[:, :, list(self.ends)] += NEVER * torch.tensor(goes_on, device=log_p_QNV.device).unsqueeze(2)
        _, parents_QK, tokens_QK = best_continuations(log_p_QNV, beams.log_p_RN, 2 * log_p_QNV.shape[1])
        likeliest = log_p_QNV.argmax(dim=2).tolist()
        places = [
            dict.fromkeys([
                *zip(parents, tokens, strict=True),
                *enumerate(best),
                *((parent, token) for parent, more in enumerate(row) for token in more),
            ])
            for parents, tokens, best, row in zip(
                parents_QK.tolist(), tokens_QK.tolist(), likeliest, wanted, strict=True
            )
        ]  # fmt: skip
        index = torch.tensor([(row, *place) for row, found in enumerate(places) for place in found]).T
        row_I, parent_I, token_I = index.to(log_p_QNV.device)
        total_I = log_p_QNV[row_I, parent_I, token_I] + beams.log_p_RN[row_I, parent_I]
        totals = iter(total_I.tolist())
        return [
            self._ranked(((next(totals), *place) for place in found), tokens, mine, last)
            for found, tokens, mine, last in zip(places, outputs, phrases, is_last, strict=True)
        ]

    def _ranked(
        self,
        places: Iterable[tuple[float, int, int]],
        outputs: Sequence[list[int]],
        phrases: Sequence[Phrase],
        is_last: bool,
    ) -> list[Candidate]:
        """The candidates of one search that can be, likeliest first."""
        found = []
        for log_p, parent, token in places:
            if log_p > NEVER / 2:
                tokens = [*outputs[parent], token]
                is_complete = not wants(tokens, phrases)
                has_stopped = self.stops is not None and self.stops.has_stopped(tokens)
                is_over = is_last or has_stopped or token in self.ends
                found.append(Candidate(log_p, parent, token, num_met(tokens, phrases), is_complete, is_over))
        return sorted(found, key=lambda one: -one.log_p)


def dealt(candidates: Sequence[Candidate], num: int) -> list[Candidate]:
    """`num` candidates, likeliest first: the best of each bank, the fullest bank first, then the second best of each,
    as fairseq deals them."""
    by_bank = sorted(candidates, key=lambda one: -one.bank)
    turns = [
        (turn, -bank, one)
        for bank, inside in groupby(by_bank, key=lambda one: one.bank)
        for turn, one in enumerate(inside)
    ]
    chosen = [one for *_, one in sorted(turns, key=lambda turn: turn[:2])[:num]]
    return sorted(chosen, key=lambda one: -one.log_p)


def finishing(candidates: Sequence[Candidate], num: int, *, is_stuck: bool) -> list[Candidate]:
    """Those that have come to an end with all of their phrases, if they are among the `num` best with all of them.

    If nothing can go on (`is_stuck`) and none has all, those that have most.
    """
    found = [one for one in [one for one in candidates if one.is_complete][:num] if one.is_over]
    if found or not is_stuck:
        return found
    most = max((one.bank for one in candidates), default=0)
    return [one for one in candidates if one.bank == most][:num]


def num_met(tokens: Sequence[int], phrases: Sequence[Phrase]) -> int:
    """How many tokens of the phrases are there: of whole phrases, and of the one that has just begun."""
    missing = [phrase for phrase in phrases if not _contains(tokens, phrase)]
    begun = max((_begun(tokens, phrase) for phrase in missing), default=0)
    return sum(map(len, phrases)) - sum(map(len, missing)) + begun


def wants(tokens: Sequence[int], phrases: Sequence[Phrase]) -> set[int]:
    """The tokens that begin a missing phrase or go on with it; none if no phrase is missing."""
    missing = [phrase for phrase in phrases if not _contains(tokens, phrase)]
    return {phrase[place] for phrase in missing for place in (0, _begun(tokens, phrase))}


def _contains(tokens: Sequence[int], phrase: Phrase) -> bool:
    size = len(phrase)
    return any(tuple(tokens[start : start + size]) == tuple(phrase) for start in range(len(tokens) - size + 1))


def _begun(tokens: Sequence[int], phrase: Phrase) -> int:
    """The longest beginning of a phrase, less than all of it, that the tokens end with."""
    longest = min(len(tokens), len(phrase) - 1)
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if tuple(tokens[-size:]) == tuple(phrase[:size])), 0)
