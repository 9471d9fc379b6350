"""Beam search behind one interface: settings, batches, and rows in, hypotheses out.

Nothing of the model's own generation_config.json reaches the search: every setting is given here.

Shapes: B rows, S source positions, P positions of the decoder's prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from harness.config.evaluation_schema import PresetName
from harness.decoding.constraints import Constraints
from harness.decoding.decode import Decoder, Hypothesis, Search, Source
from harness.decoding.presets import PRESETS, Preset, Stop
from harness.decoding.sampling import Sampling
from harness.decoding.search import BeamSearch, Chain

EXTRA_LENGTH = 10  # tokens that `max_length_ratio` allows beyond the multiple of the source


@dataclass(frozen=True)
class BeamSettings:
    """How to search. `max_length` is the longest output in tokens (forced tag and </s> counted, decoder start not).

    With `max_length_ratio` a row's output is also no longer than ratio x its own source + 10, whoever shares its batch:
    </s> is forced there. `beam_size` 1 is greedy. `preset` says how a hypothesis is scored and when the
    search stops; `early_stopping` is Hugging Face's and changes when `hf` does. The `num_hypotheses` best are returned.
    `sampling` draws one output instead of searching.
    """

    beam_size: int
    length_penalty: float
    max_length: int
    max_length_ratio: float | None = None
    num_hypotheses: int = 1
    preset: PresetName = "hf"
    early_stopping: bool | Literal["never"] = False
    constraints: Constraints | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_hypotheses <= self.beam_size:
            raise ValueError(f"num_hypotheses={self.num_hypotheses} must lie between 1 and beam_size={self.beam_size}")
        if self.early_stopping and self.preset != "hf":
            raise ValueError(f"early_stopping={self.early_stopping} is of hf; {self.preset} has a rule of its own")
        if self.sampling and self.beam_size > 1:
            raise ValueError(f"sampling draws one output: beam_size={self.beam_size} must be 1")

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
) -> dict[int, list[Hypothesis]] | None:
    """The best outputs of `rows` (default: all), best first; None on every rank if one wants to stop.

    `model` is a Hugging Face model (`engine.module` under DeepSpeed), perhaps with an adapter. `sizes` are source
    tokens by row, `collate` gives what `DecodingTask.collate_sources` does. At any time no more than `max_tokens` are
    decoded, rows x beams x longest source. With several ranks `agree` adds numbers up over them. `synced`: parameters
    are shared between ranks (ZeRO-3), so ranks move in step until the last one has finished.
    """
    if not sizes:
        return {}
    known = collate([0])
    pad, ends = known.get("pad"), known.get("ends") or _as_list(model.config.eos_token_id)
    search = _search(settings, model.config.pad_token_id if pad is None else pad, ends)

    def fetch(wanted: list[int]) -> Source:
        return _source(**collate(wanted))

    decoder = Decoder(model, search, sizes, fetch, max_tokens, synced, agree, stop_wanted)
    return decoder(range(len(sizes)) if rows is None else rows)


def _search(settings: BeamSettings, pad: int, ends: Sequence[int]) -> Search:
    """What the decoder is told of the settings."""
    num_outputs, num_wanted, ratio = settings.beam_size, settings.num_hypotheses, settings.max_length_ratio
    options = (tuple(ends), settings.length_penalty, settings.convention)
    rule = Chain(*options, settings.sampling) if num_outputs == 1 else BeamSearch(*options, num_wanted)
    limits = None if ratio is None else lambda sizes_R: (sizes_R * ratio).long() + EXTRA_LENGTH
    return Search(num_outputs, num_wanted, rule, pad, settings.max_length, limits, settings.constraints)


def _source(
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    decoder_start_B: Tensor | None = None,
    forced_first: Sequence[int] | Tensor | None = None,
    pad: int | None = None,
    ends: Sequence[int] = (),
) -> Source:
    """Sources with what their decoders start with."""
    starts = [] if decoder_start_B is None else [decoder_start_B]
    forced = [] if forced_first is None else [torch.as_tensor(forced_first, device=input_ids_BS.device)]
    prefix_BP = torch.stack([*starts, *forced], dim=1) if starts or forced else input_ids_BS[:, :0]
    return Source(input_ids_BS, attention_mask_BS, prefix_BP, len(forced))


def _as_list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]
