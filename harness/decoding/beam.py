"""Beam search behind our own interface; Hugging Face `generate` does the search for now.

Nothing of the model's own generation_config.json reaches the search: every setting is given here.

Shapes: B rows, N hypotheses a row, S source positions, T target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.io import heartbeat

SCORE_FORMULA = "sum log p / T^length_penalty; T counts every output token: forced language tag and </s> included"


EXTRA_LENGTH = 10  # tokens that `max_length_ratio` allows beyond the multiple of the source


@dataclass(frozen=True)
class BeamSettings:
    """How to search. `max_length` is the longest output in tokens (forced tag and </s> counted, decoder start not).

    With `max_length_ratio` a row's output is also no longer than ratio x its own source + 10, whoever shares its batch:
    </s> is forced there. `beam_size` 1 is greedy. The score of a hypothesis is SCORE_FORMULA; the `num_hypotheses` best
    are returned.
    """

    beam_size: int
    length_penalty: float
    max_length: int
    max_length_ratio: float | None = None
    num_hypotheses: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_hypotheses <= self.beam_size:
            raise ValueError(f"num_hypotheses={self.num_hypotheses} must lie between 1 and beam_size={self.beam_size}")


@dataclass(frozen=True)
class Hypothesis:
    """An output without decoder start, forced first token, </s> and padding; `score` as in SCORE_FORMULA."""

    token_ids: list[int]
    score: float


class Turn(NamedTuple):
    """One batch of one rank; if `counts` is false it only keeps the rank in step and its output is thrown away."""

    rows: list[int]
    counts: bool


def decoding_batches(source_sizes: Sequence[int], *, beam_size: int, max_tokens: int) -> list[list[int]]:
    """Row ids in batches, longest sources first: rows x beams x longest source <= `max_tokens`.

    A pure function of its arguments, so hypotheses do not depend on the number of ranks. Each row stands in exactly
    one batch; a row that is too large by itself is a batch of its own.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(source_sizes)), key=lambda row: (-source_sizes[row], row)):
        if room == 0:
            batches.append([])
            room = max(1, max_tokens // (beam_size * max(1, source_sizes[row])))
        batches[-1].append(row)
        room -= 1
    return batches


def deal(batches: Sequence[list[int]], rank: int, world_size: int) -> list[Turn]:
    """This rank's batches, dealt round robin. All ranks get equally many: the last batch, the cheapest, fills up."""
    num_turns = -(-len(batches) // world_size)
    mine = [rank + turn * world_size for turn in range(num_turns)]
    return [Turn(batches[index], True) if index < len(batches) else Turn(batches[-1], False) for index in mine]


def beam_search(
    model: Any,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    *,
    decoder_start_B: Tensor | None = None,
    forced_first: int | Sequence[int] | None = None,
    pad: int | None = None,
    ends: Sequence[int] = (),
    settings: BeamSettings,
    synced: bool,
) -> list[list[Hypothesis]]:
    """The `settings.num_hypotheses` best outputs of each of B rows, best first.

    `model` is a Hugging Face model (`engine.module` under DeepSpeed), perhaps with an adapter. Without
    `decoder_start_B` it is a decoder that goes on with the prompts `input_ids_BS`, padded at their start.
    `forced_first` is the token that every output, or each row's output, must begin with; `pad` and `ends` are the
    padding and the tokens that end an output (default: those of config.json). `synced`: parameters are shared between
    ranks (ZeRO-3), so every rank must make the same number of calls and goes on with the others until the last one has
    finished.
    """
    pad = model.config.pad_token_id if pad is None else pad
    ends = list(ends) or _as_list(model.config.eos_token_id)
    num_before = 1 if decoder_start_B is not None else input_ids_BS.shape[1]
    limits_B = None
    if settings.max_length_ratio is not None:
        limits_B = (attention_mask_BS.sum(dim=1) * settings.max_length_ratio).long() + EXTRA_LENGTH
    constraints = _Constraints(pad, ends, forced_first, limits_B, settings.beam_size, num_before)
    greedy = _GreedyScores(constraints, ends, settings.length_penalty) if settings.beam_size == 1 else None
    generation = _generation_settings(decoder_start_B, pad, ends, settings)
    with _prepared(model, generation), _finished_beams(_without_adapter(model)) as scores:
        sequences = model.generate(
            input_ids=input_ids_BS,
            attention_mask=attention_mask_BS,
            logits_processor=[greedy or constraints],
            synced_gpus=synced,
        )
    num_prefix = num_before + (forced_first is not None)
    outputs = [_cut(tokens[num_prefix:], {pad, *ends}) for tokens in sequences.tolist()]
    best_BN = greedy.scores().unsqueeze(1) if greedy else scores[-1][:, : settings.num_hypotheses]
    flat = [Hypothesis(*pair) for pair in zip(outputs, best_BN.flatten().tolist(), strict=True)]
    return [flat[start : start + settings.num_hypotheses] for start in range(0, len(flat), settings.num_hypotheses)]


def _generation_settings(
    decoder_start_B: Tensor | None, pad: int, ends: Sequence[int], settings: BeamSettings
) -> dict[str, Any]:
    """Everything `generate` is told besides `_Constraints`."""
    start = {} if decoder_start_B is None else {"decoder_start_token_id": decoder_start_B.tolist()}
    return start | {
        "num_beams": settings.beam_size,
        "num_return_sequences": settings.num_hypotheses,
        "length_penalty": settings.length_penalty if settings.beam_size > 1 else None,
        "max_new_tokens": settings.max_length,
        "early_stopping": False,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": pad,
        "eos_token_id": list(ends),
    }


def _without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _prepared(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    """The model in evaluation mode with a generation config of nothing but `settings`; both put back afterwards."""
    base = _without_adapter(model)
    own_config, was_training = base.generation_config, model.training
    base.generation_config = model.generation_config = type(own_config)(**settings)
    model.eval()
    try:
        yield
    finally:
        base.generation_config = model.generation_config = own_config
        model.train(was_training)


class _Constraints:
    """Logits processor: each row's first output token may be given (log p = 0), a row that has reached its own length
    limit ends (log p of </s> = 0), and padding is never an output, unless it is what ends one.

    Marian needs the last: its padding embedding is also the decoder start and may win. `num_before` tokens stand
    before the first output.
    """

    def __init__(
        self,
        pad: int,
        ends: Sequence[int],
        forced_first: int | Sequence[int] | None,
        limits_B: Tensor | None,
        beam_size: int,
        num_before: int,
    ) -> None:
        self.never = torch.tensor([] if pad in ends else [pad], dtype=torch.long)
        self.eos, self.limits_B, self.beam_size, self.num_before = ends[0], limits_B, beam_size, num_before
        self.forced_first = None if forced_first is None else torch.as_tensor(forced_first)

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        heartbeat.beat("evaluation")
        if self.forced_first is None or not self.is_first(tokens):
            allowed = scores.index_fill(1, self.never.to(scores.device), -torch.inf)
            is_last = self.is_last(tokens)
            allowed[is_last] = -torch.inf
            allowed[is_last, self.eos] = 0.0
            return allowed
        rows = self.forced_first.to(scores.device).expand(len(scores) // self.beam_size)
        first = rows.repeat_interleave(self.beam_size).unsqueeze(1)
        return torch.full_like(scores, -torch.inf).scatter_(1, first, 0.0)

    def is_first(self, tokens: Tensor) -> bool:
        """Whether the outputs are still empty."""
        return tokens.shape[1] == self.num_before

    def is_last(self, tokens: Tensor) -> Tensor:
        """Which of the B x beams running outputs must end now."""
        if self.limits_B is None:
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        num_outputs = tokens.shape[1] - self.num_before + 1
        return (num_outputs >= self.limits_B).repeat_interleave(self.beam_size)


class _GreedyScores:
    """Logits processor around `_Constraints`: adds up log p of the tokens that greedy search takes."""

    def __init__(self, constraints: _Constraints, ends: Sequence[int], length_penalty: float) -> None:
        self.constraints, self.ends, self.length_penalty = constraints, torch.tensor(ends), length_penalty

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        allowed = self.constraints(tokens, scores)
        is_first = self.constraints.is_first(tokens)
        log_p_B = allowed.amax(-1) - scores.logsumexp(-1)
        if is_first and self.constraints.forced_first is not None:
            log_p_B = torch.zeros_like(log_p_B)
        log_p_B = log_p_B.masked_fill(self.constraints.is_last(tokens), 0.0)
        if is_first:
            self.sum_B, self.length_B, self.open_B = log_p_B, torch.ones_like(log_p_B), torch.ones_like(log_p_B)
        else:
            self.open_B *= ~torch.isin(tokens[:, -1], self.ends.to(tokens.device))
            self.sum_B += self.open_B * log_p_B
            self.length_B += self.open_B
        return allowed

    def __deepcopy__(self, memo: object) -> _GreedyScores:
        return self  # PEFT copies what it gets when it puts virtual tokens in front

    def scores(self) -> Tensor:
        return self.sum_B / self.length_B**self.length_penalty


@contextmanager
def _finished_beams(model: Any) -> Iterator[list[Tensor]]:
    """Gets the scores of the finished beams [B, beams] where `generate` computes them; the last entry is the final one.

    Its own `output_scores` would keep log p of the whole vocabulary for every beam and step (tens of GB at V = 250k).
    """
    scores: list[Tensor] = []
    update = model._update_finished_beams

    def update_and_keep(**state: Any) -> Any:
        result = update(**state)
        scores[:] = [result[1]]
        return result

    model._update_finished_beams = update_and_keep
    try:
        yield scores
    finally:
        del model._update_finished_beams


def _cut(tokens: list[int], ends: set[int]) -> list[int]:
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
