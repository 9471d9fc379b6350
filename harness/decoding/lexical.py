"""Beam search for outputs that must have given phrases: dynamic beam allocation (Post and Vilar 2018).

Outputs stand in banks by how many tokens of their phrases they have. The places of the beam are dealt to the banks in
turn, so that outputs which have met much are not pushed out by likelier ones which have met little.

Shapes: Q sentences with phrases, N running outputs of each, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from harness.decoding.beams import NEVER, Beams
from harness.decoding.search import BeamSearch, best_continuations, extended

Phrase = Sequence[Sequence[int]]  # the tokens of each way to write it, of which one is enough


class Candidate(NamedTuple):
    """A running output with one more token."""

    log_p: float
    parent: int
    token: int
    bank: int
    is_complete: bool
    is_over: bool


class BoundSearch(NamedTuple):
    """N running outputs of one sentence, the tokens that each `wants`, and whether their next one is the last."""

    outputs: list[list[int]]
    phrases: Sequence[Phrase]
    wanted: list[set[int]]
    is_last: bool


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
        num_outputs, device = log_p_QNV.shape[1], log_p_QNV.device
        has_found, is_open = beams.is_full_RN.any(dim=1).tolist(), beams.is_open.tolist()
        rows = []
        for place, candidates in enumerate(self._candidates(beams, log_p_QNV)):
            running = dealt([one for one in candidates if not one.is_over], num_outputs)
            is_stuck = not running and not has_found[place]
            finished = finishing(candidates, num_outputs, is_stuck=is_stuck) if is_open[place] else []
            rows.append([*_filled(running, num_outputs), *_filled(finished, num_outputs)])

        log_p_QK = torch.tensor([[one.log_p for one in row] for row in rows], device=device)
        is_over_QK = torch.tensor([[one.is_over for one in row] for row in rows], device=device)
        parents_QK = torch.tensor([[one.parent for one in row] for row in rows], device=device)
        tokens_QK = torch.tensor([[one.token for one in row] for row in rows], device=device)
        candidates_QKL, length_Q = extended(beams, parents_QK, tokens_QK), beams.length_R + 1
        score_QK = self.score(log_p_QK, length_Q.unsqueeze(1))
        self._finish(beams, score_QK, is_over_QK & (log_p_QK > NEVER), candidates_QKL, length_Q)
        chosen_QN = torch.arange(num_outputs, device=device).expand(len(rows), -1)
        parents_QN = self._go_on(beams, log_p_QK[:, :num_outputs], candidates_QKL, parents_QK, chosen_QN)
        self._stop(beams, is_over_QK)
        return parents_QN

    def _candidates(self, beams: Beams, log_p_QNV: Tensor) -> list[list[Candidate]]:
        """Of each search, likeliest first: the best continuations of all outputs, the best of each, and those that a
        missing phrase wants."""
        searches, num_outputs = self._searches(beams), log_p_QNV.shape[1]
        goes_on = [[bool(more) and not one.is_last for more in one.wanted] for one in searches]
        log_p_QNV = log_p_QNV.clone()
        log_p_QNV[:, :, list(self.ends)] += NEVER * torch.tensor(goes_on, device=log_p_QNV.device).unsqueeze(2)
        _, parents_QK, tokens_QK = best_continuations(log_p_QNV, beams.log_p_RN, 2 * num_outputs)
        likeliest_QN, places = log_p_QNV.argmax(dim=2).tolist(), []
        for row, (parents, tokens) in enumerate(zip(parents_QK.tolist(), tokens_QK.tolist(), strict=True)):
            found = [*zip(parents, tokens, strict=True), *enumerate(likeliest_QN[row])]
            found += [(parent, token) for parent, more in enumerate(searches[row].wanted) for token in more]
            places += [(row, parent, token) for parent, token in dict.fromkeys(found)]
        row_I, parent_I, token_I = torch.tensor(places, device=log_p_QNV.device).unbind(dim=1)
        total_I = log_p_QNV[row_I, parent_I, token_I] + beams.log_p_RN[row_I, parent_I]
        candidates: list[list[Candidate]] = [[] for _ in searches]
        for total, (row, parent, token) in zip(total_I.tolist(), places, strict=True):
            if total > NEVER / 2:
                candidates[row].append(self._candidate(searches[row], total, parent, token))
        return [sorted(row, key=lambda one: -one.log_p) for row in candidates]

    def _searches(self, beams: Beams) -> list[BoundSearch]:
        """What is known of each sentence, on the host."""
        columns = (beams.rows_R, beams.tokens_RNL, beams.length_R, beams.limit_R)
        searches = []
        for row, outputs, length, limit in zip(*(column.tolist() for column in columns), strict=True):
            cut, phrases = [tokens[:length] for tokens in outputs], self.phrases[row]
            searches.append(BoundSearch(cut, phrases, [wants(one, phrases) for one in cut], length + 1 >= limit))
        return searches

    def _candidate(self, search: BoundSearch, log_p: float, parent: int, token: int) -> Candidate:
        tokens = [*search.outputs[parent], token]
        has_stopped = self.stops is not None and self.stops.has_stopped(tokens)
        is_over = search.is_last or has_stopped or token in self.ends
        bank, is_complete = num_met(tokens, search.phrases), not wants(tokens, search.phrases)
        return Candidate(log_p, parent, token, bank, is_complete, is_over)


def _filled(candidates: list[Candidate], num: int) -> list[Candidate]:
    """Exactly `num`."""
    return [*candidates[:num], *[NOBODY] * (num - len(candidates))]


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
    """How many tokens of the phrases are there: of whole phrases, and of the one that has just begun. A phrase counts
    as its longest way."""
    sizes = [0 if _is_missing(tokens, phrase) else max(map(len, phrase)) for phrase in phrases]
    return sum(sizes) + max((_begun(tokens, way) for way in _missing_ways(tokens, phrases)), default=0)


def wants(tokens: Sequence[int], phrases: Sequence[Phrase]) -> set[int]:
    """The tokens that begin a missing phrase or go on with it; none if no phrase is missing."""
    return {way[place] for way in _missing_ways(tokens, phrases) for place in (0, _begun(tokens, way))}


def _missing_ways(tokens: Sequence[int], phrases: Sequence[Phrase]) -> list[Sequence[int]]:
    return [way for phrase in phrases if _is_missing(tokens, phrase) for way in phrase]


def _is_missing(tokens: Sequence[int], phrase: Phrase) -> bool:
    return not any(_contains(tokens, way) for way in phrase)


def _contains(tokens: Sequence[int], way: Sequence[int]) -> bool:
    size = len(way)
    return any(tuple(tokens[start : start + size]) == tuple(way) for start in range(len(tokens) - size + 1))


def _begun(tokens: Sequence[int], way: Sequence[int]) -> int:
    """The longest beginning of a phrase, less than all of it, that the tokens end with."""
    longest = min(len(tokens), len(way) - 1)
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if tuple(tokens[-size:]) == tuple(way[:size])), 0)
