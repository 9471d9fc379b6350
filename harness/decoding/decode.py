"""Rows through a model: sentences that have ended leave the batch and waiting ones take their place.

Shapes: R sentences, N running outputs of each, S source positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.decoding.beams import NEVER, NOTHING, Beams
from harness.decoding.constraints import Constraints
from harness.decoding.search import Chain, Rule
from harness.errors import DataError
from harness.io import heartbeat
from harness.models.ensemble import Trees, stepper_of
from harness.models.tree import Tree

AGREE_EVERY = 16  # steps between two agreements of ranks that do not move in step
LOOK_EVERY = 4  # steps between two looks at what has ended, on a device that would have to wait for each
LEAVING = 8  # the batch is packed anew when one of so many sentences has ended


class Hypothesis(NamedTuple):
    """An output without decoder start, forced first token, </s> and padding, and its score.

    `is_at_limit`: it is as long as an output of its row may be, so that it may have been cut off.
    """

    token_ids: list[int]
    score: float
    is_at_limit: bool = False


@dataclass(frozen=True)
class Source:
    """Sources of R sentences; `prefix_RP` is what the decoder starts with, of which `num_forced` are output tokens."""

    input_ids_RS: Tensor
    mask_RS: Tensor
    prefix_RP: Tensor
    num_forced: int

    @property
    def before(self) -> Tensor:
        """[R, any]: the decoder's start, or the prompt of a model that has no other decoder."""
        start_RP = self.prefix_RP[:, : self.prefix_RP.shape[1] - self.num_forced]
        return start_RP if start_RP.shape[1] else self.input_ids_RS.masked_fill(self.mask_RS == 0, NOTHING)


@dataclass(frozen=True)
class Search:
    """What is the same for every sentence. `limits` gives the longest outputs of R sources."""

    num_outputs: int
    num_hypotheses: int
    rule: Rule
    pad: int
    max_length: int
    limits: Callable[[Tensor], Tensor] | None = None
    constraints: Constraints | None = None


@dataclass
class _Running:
    rows: list[int]
    tree: Tree | Trees
    beams: Beams
    parents_RN: Tensor
    num_forced: int


@dataclass
class Decoder:
    """Decodes rows of `sizes` source tokens, which `fetch` reads, in batches of rows x beams x longest <= `max_tokens`.
    Draws follow from a row's number, counted from `first_row`.

    With several ranks `agree` adds numbers up over them. `synced`: parameters are shared between ranks (ZeRO-3), which
    then move in step until the last one has finished. `found` fills up with the outputs of rows that have ended.
    """

    model: Any
    search: Search
    sizes: Sequence[int]
    fetch: Callable[[list[int]], Source]
    max_tokens: float
    synced: bool = False
    agree: Callable[[list[float]], list[float]] = list
    stop_wanted: Callable[[], bool] = lambda: False
    first_row: int = 0
    found: dict[int, list[Hypothesis]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stepper = stepper_of(self.model, self.search.num_outputs)
        self.running: _Running | None = None
        self.idle: _Running | None = None

    def __call__(self, rows: Sequence[int]) -> dict[int, list[Hypothesis]] | None:
        """The best hypotheses of each of `rows`; None if some rank wants to stop."""
        self.waiting = sorted(rows, key=lambda row: (self.sizes[row], -row))
        with self.stepper.ready():
            return self.found if self._decode() else None

    def _decode(self) -> bool:
        turn = 0
        while True:
            heartbeat.beat("evaluation")
            self._collect(turn)
            new = self._next_rows()
            is_busy = bool(new or self.running)
            anyone_reads = bool(new)
            if self.synced or not is_busy or turn % AGREE_EVERY == 0:
                reads, busy, stops = self.agree([bool(new), is_busy, self.stop_wanted()])
                if stops:
                    return False
                if not busy:
                    return True
                anyone_reads = bool(reads) if self.synced else bool(new)
            if anyone_reads:
                self._read(new)
            if self.running or self.synced:
                self._step()
            turn += 1

    def _collect(self, turn: int) -> None:
        """Takes the results of ended sentences once they are enough, and packs the others together."""
        if self.running is None:
            return
        is_cpu = self.running.parents_RN.device.type == "cpu"
        has_room = self.running.tree.has_room
        if has_room and not is_cpu and turn % LOOK_EVERY:
            return
        is_open = self.running.beams.is_open.tolist()
        num_closed = is_open.count(False)
        if has_room and num_closed * LEAVING < len(is_open):
            return
        for place, row in enumerate(self.running.rows):
            if not is_open[place]:
                self.found[row] = self._hypotheses(self.running, place)
        kept = [place for place, is_still in enumerate(is_open) if is_still]
        if kept:
            self.running = self._merged([(self.running, kept)])
        else:
            self.idle = self._merged([(self.running, [0])]) if self.synced else None
            self.running = None

    def _next_rows(self) -> list[int]:
        """Waiting rows, longest first, that fit beside the running ones; none if it is not worth reading them yet."""
        present = self.running.rows if self.running else []
        if not self.waiting:
            return []
        longest = max(1, self.sizes[self.waiting[-1]], *(self.sizes[row] for row in present))
        room = int(min(self.max_tokens / (self.search.num_outputs * longest), len(present) + len(self.waiting)))
        num_new = max(room, 1) - len(present)
        if num_new <= 0 or (present and num_new * LEAVING < len(present) and num_new < len(self.waiting)):
            return []
        if self.synced and self.stepper.reads_alone:
            num_new = 1  # every rank makes as many forward passes
        new = self.waiting[: -num_new - 1 : -1]
        del self.waiting[-num_new:]
        return new

    def _read(self, new: list[int]) -> None:
        """Reads new sources and takes their first step; a rank that has none reads along."""
        begun = self._begin(new or [min(range(len(self.sizes)), key=self.sizes.__getitem__)])
        present = [(self.running, range(len(self.running.rows)))] if self.running else []
        if new:
            self.running = self._merged([*present, (begun, range(len(new)))])
        elif not present:
            self.idle = self._merged([(begun, [0])])

    def _begin(self, rows: list[int]) -> _Running:
        source = self.fetch(rows)
        logits_RV, tree = self.stepper.read(source.input_ids_RS, source.mask_RS, source.prefix_RP)
        forced_RP = source.prefix_RP[:, source.prefix_RP.shape[1] - source.num_forced :]
        constraints, sizes_R = self.search.constraints, source.mask_RS.sum(dim=1)
        limit_R = torch.full_like(sizes_R, self.search.max_length)
        if self.search.limits is not None:
            limit_R = torch.minimum(limit_R, self.search.limits(sizes_R))
        if self.stepper.num_positions is not None:
            limit_R = torch.minimum(limit_R, self._room(sizes_R))
        beams = Beams.begin(
            forced_RP, limit_R, self.search.num_outputs, source.num_forced + 1,
            rows_R=torch.tensor(rows, device=logits_RV.device) + self.first_row,
            before_RC=source.before if constraints else source.prefix_RP[:, :0],
            shortest_R=torch.minimum(constraints.shortest(sizes_R), limit_R - 1) if constraints else None,
            num_groups=self.search.rule.num_groups,
        )  # fmt: skip
        parents_RN = self._advance(beams, logits_RV.unsqueeze(1).expand(-1, self.search.num_outputs, -1))
        return _Running(rows, tree, beams, parents_RN, source.num_forced)

    def _room(self, sizes_R: Tensor) -> Tensor:
        """Tokens that fit behind prompts in the model's table of positions. Raises DataError if none does."""
        room_R: Tensor = self.stepper.num_positions - sizes_R
        if room_R.min() < 1:
            what = f"a prompt of {int(sizes_R.max())} tokens leaves no room for an answer"
            positions = f"the model has {self.stepper.num_positions} positions"
            raise DataError(f"{what}: {positions}", where="data.max_length", hint="shorten the prompt")
        return room_R

    def _step(self) -> None:
        """One token more for every running output, or along with the other ranks for none."""
        running = self.running or self.idle
        assert running is not None, "a rank that steps along has read along"
        beams = running.beams
        is_open_R = beams.is_open & (self.running is not None)
        logits_RNV = self.stepper.step(running.tree, beams.last_tokens, running.parents_RN, is_open_R)
        if self.running is None:
            running.tree.forget_last_step()
        else:
            running.parents_RN = self._advance(beams, logits_RNV)

    def _advance(self, beams: Beams, logits_RNV: Tensor) -> Tensor:
        """The step that the rule takes: beams by constrained log p, chains by constrained logits, both as transformers
        does it."""
        rule, constraints = self.search.rule, self.search.constraints
        log_p_RNV = logits_RNV.log_softmax(dim=2)
        if not isinstance(rule, Chain) or not constraints:
            log_p_RNV = constraints(log_p_RNV, beams, rule.ends) if constraints else log_p_RNV
            return rule.advance(beams, self._limited(log_p_RNV, beams))
        choice_RNV = constraints(logits_RNV.contiguous(), beams, rule.ends)
        log_p_RNV = log_p_RNV.masked_fill(choice_RNV == -torch.inf, -torch.inf)
        return rule.advance(beams, self._limited(log_p_RNV, beams), self._limited(choice_RNV, beams))

    def _limited(self, scores_RNV: Tensor, beams: Beams) -> Tensor:
        """In place: never padding, unless it ends an output; only an end at a row's own limit.

        Marian needs the first: its padding embedding is also the decoder start and may win.
        """
        rule, end = self.search.rule, self.search.rule.ends[0]
        if self.search.pad not in rule.ends:
            scores_RNV[:, :, self.search.pad] = -torch.inf
        if rule.preset.forces_end:
            is_last_R1 = (beams.length_R + 1 >= beams.limit_R).unsqueeze(1)
            must_end_RN = is_last_R1 & scores_RNV[:, :, end].isfinite()  # else it is cut
            end_I = scores_RNV[must_end_RN, end]
            scores_RNV[must_end_RN] = -torch.inf
            scores_RNV[must_end_RN, end] = end_I
        elif self.search.limits is not None:
            is_last_R = (beams.length_R + 1 >= beams.limit_R) & (beams.limit_R < self.search.max_length)
            scores_RNV[is_last_R] = -torch.inf
            scores_RNV[is_last_R, :, end] = 0.0
        return scores_RNV

    def _merged(self, parts: Sequence[tuple[_Running, Sequence[int]]]) -> _Running:
        device = parts[0][0].parents_RN.device
        chosen = [(one, torch.tensor(list(places), device=device)) for one, places in parts]
        tree = self.stepper.merge(*((one.tree, places) for one, places in chosen))
        beams = Beams.merge([(one.beams, places) for one, places in chosen])
        rows = [one.rows[place] for one, places in parts for place in places]
        parents_RN = torch.cat([one.parents_RN[places] for one, places in chosen])
        return _Running(rows, tree, beams, parents_RN, parts[0][0].num_forced)

    def _hypotheses(self, running: _Running, place: int) -> list[Hypothesis]:
        """The best outputs of a sentence, cut to what the caller wants to read."""
        beams, num = running.beams, self.search.num_hypotheses
        sequences = zip(
            beams.best_RNL[place, :num].tolist(), beams.best_length_RN[place, :num].tolist(),
            beams.best_score_RN[place, :num].tolist(), strict=True,
        )  # fmt: skip
        ends, limit = {self.search.pad, *self.search.rule.ends}, int(beams.limit_R[place])
        found = []
        for tokens, length, score in (one for one in sequences if one[2] > NEVER / 2):
            output = tokens[running.num_forced : length]
            end = next((index for index, token in enumerate(output) if token in ends), len(output))
            found.append(Hypothesis(output[:end], score, length >= limit))
        return found
