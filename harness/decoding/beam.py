"""Beam search behind one interface: settings, batches, and rows in, hypotheses out.

Nothing of the model's own generation_config.json reaches the search: every setting is given here.

Shapes: B rows, S source positions, P positions of the decoder's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from harness.config.evaluation_schema import PresetName
from harness.decoding.constraints import Constraints
from harness.decoding.decode import Decoder, Hypothesis, Search, Source
from harness.decoding.diverse import DiverseBeamSearch
from harness.decoding.lexical import ConstrainedBeamSearch, Phrase
from harness.decoding.presets import PRESETS, Preset, Stop
from harness.decoding.sampling import Sampling
from harness.decoding.search import BeamSearch, Chain, Rule
from harness.models.stops import StopStrings

EXTRA_LENGTH = 10  # tokens that `max_length_ratio` allows beyond the multiple of the source


@dataclass(frozen=True)
class MinimumRisk:
    """Minimum Bayes risk decoding: of `samples` draws, those with the greatest expected `utility`."""

    utility: Literal["chrf", "bleu"]
    samples: int


@dataclass(frozen=True)
class BeamSettings:
    """How to search. `max_length` is the longest output in tokens (forced tag and </s> counted, decoder start not).

    With `max_length_ratio` a row's output is also no longer than ratio x its own source + 10, whoever shares its batch:
    </s> is forced there. `beam_size` 1 is greedy. `preset` says how a hypothesis is scored and when the
    search stops; `early_stopping` is Hugging Face's and changes when `hf` does. `beam_groups` and `diversity_penalty`
    are those of `DiverseBeamSearch`. The `num_hypotheses` best are returned.

    `sampling` draws as many outputs instead of searching, in the order of their numbers; with `minimum_risk` as many as
    that wants, of which the caller takes the best.
    """

    beam_size: int
    length_penalty: float
    max_length: int
    max_length_ratio: float | None = None
    num_hypotheses: int = 1
    preset: PresetName = "hf"
    early_stopping: bool | Literal["never"] = False
    beam_groups: int = 1
    diversity_penalty: float = 0.0
    constraints: Constraints | None = None
    sampling: Sampling | None = None
    minimum_risk: MinimumRisk | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_hypotheses <= self.num_outputs:
            raise ValueError(f"num_hypotheses={self.num_hypotheses} must lie between 1 and {self.num_outputs} outputs")
        if self.preset != "hf" and (self.early_stopping or self.beam_groups > 1):
            raise ValueError(f"early_stopping and beam_groups are of hf; {self.preset} has rules of its own")
        if self.beam_size % self.beam_groups:
            raise ValueError(f"beam_groups={self.beam_groups} must divide beam_size={self.beam_size}")
        if self.sampling and self.beam_size > 1:
            raise ValueError(f"draws have no beams: beam_size={self.beam_size} must be 1")
        if self.minimum_risk and not self.sampling:
            raise ValueError("minimum_risk chooses among samples: it needs sampling")

    @property
    def formula(self) -> str:
        """The score of an output in words."""
        if self.minimum_risk:
            return (
                f"expected sentence {self.minimum_risk.utility} against {self.minimum_risk.samples} samples, 0 to 100"
            )
        return self.convention.formula

    @property
    def num_outputs(self) -> int:
        """Outputs of a row that are decoded at once."""
        if self.minimum_risk:
            return self.minimum_risk.samples
        return self.num_hypotheses if self.sampling else self.beam_size

    @property
    def convention(self) -> Preset:
        """The preset, as `early_stopping` changes it."""
        stop: Stop = "impossible" if self.early_stopping == "never" else "full" if self.early_stopping else "unlikely"
        return replace(PRESETS["hf"], stop=stop) if self.preset == "hf" else PRESETS[self.preset]


def decode(
    model: Any,
    sizes: Sequence[int],
    collate: Callable[[list[int]], dict[str, Any]],
    *,
    settings: BeamSettings,
    max_tokens: float,
    rows: Sequence[int] | None = None,
    synced: bool = False,
    agree: Callable[[list[float]], list[float]] = list,
    stop_wanted: Callable[[], bool] = lambda: False,
    first_row: int = 0,
    phrases: Mapping[int, Sequence[Phrase]] | None = None,
    found: dict[int, list[Hypothesis]] | None = None,
) -> dict[int, list[Hypothesis]] | None:
    """The best outputs of `rows` (default: all), best first; None on every rank if one wants to stop. Meanwhile `found`
    fills up with those of rows that have ended.

    `model` is a Hugging Face model (`engine.module` under DeepSpeed), perhaps with an adapter. `sizes` are source
    tokens by row, `collate` gives what `DecodingTask.collate_sources` does. At any time no more than `max_tokens` are
    decoded, rows x beams x longest source. With several ranks `agree` adds numbers up over them. `synced`: parameters
    are shared between ranks (ZeRO-3), so ranks move in step until the last one has finished. Draws follow from a row's
    number, counted from `first_row`. `phrases` are what the outputs of rows must have.
    """
    if not sizes:
        return {}
    known = collate([0])
    pad, ends = known.get("pad"), known.get("ends") or _as_list(model.config.eos_token_id)
    pad = model.config.pad_token_id if pad is None else pad
    numbered = {first_row + row: tokens for row, tokens in (phrases or {}).items()}
    rule = replace(_rule(settings, tuple(ends), numbered), stops=known.get("stops"))
    search = _search(settings, pad, rule)

    def fetch(wanted: list[int]) -> Source:
        return _source(**collate(wanted))

    found = {} if found is None else found
    decoder = Decoder(model, search, sizes, fetch, max_tokens, synced, agree, stop_wanted, first_row, found)
    return decoder(range(len(sizes)) if rows is None else rows)


def _search(settings: BeamSettings, pad: int, rule: Rule) -> Search:
    """What the decoder is told of the settings."""
    num_outputs, ratio = settings.num_outputs, settings.max_length_ratio
    num_wanted = num_outputs if settings.sampling else settings.num_hypotheses
    limits = None if ratio is None else lambda sizes_R: (sizes_R * ratio).long() + EXTRA_LENGTH
    return Search(num_outputs, num_wanted, rule, pad, settings.max_length, limits, settings.constraints)


def _rule(settings: BeamSettings, ends: tuple[int, ...], phrases: Mapping[int, Sequence[Phrase]]) -> Rule:
    options = (ends, settings.length_penalty, settings.convention)
    if settings.sampling or settings.beam_size == 1:
        return Chain(*options, settings.num_outputs, settings.sampling)
    if phrases:
        return ConstrainedBeamSearch(*options, settings.num_hypotheses, phrases=phrases)
    if settings.beam_groups == 1:
        return BeamSearch(*options, settings.num_hypotheses)
    return DiverseBeamSearch(*options, settings.num_hypotheses, settings.beam_groups, settings.diversity_penalty)


def _source(
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    decoder_start_B: Tensor | None = None,
    forced_first: Sequence[int] | Tensor | None = None,
    pad: int | None = None,
    ends: Sequence[int] = (),
    stops: StopStrings | None = None,
) -> Source:
    """Sources with what their decoders start with."""
    starts = [] if decoder_start_B is None else [decoder_start_B]
    forced = [] if forced_first is None else [torch.as_tensor(forced_first, device=input_ids_BS.device)]
    prefix_BP = torch.stack([*starts, *forced], dim=1) if starts or forced else input_ids_BS[:, :0]
    return Source(input_ids_BS, attention_mask_BS, prefix_BP, len(forced))


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
