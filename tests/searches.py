"""Beam search of one batch of tensors, for comparisons with `generate`.

Shapes: B rows, S source positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from harness.decoding.beam import BeamSettings, decode
from harness.decoding.decode import Hypothesis


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
    """The `settings.num_hypotheses` best outputs of each of B rows, best first, all decoded at once.

    Without `decoder_start_B` the model is a decoder that goes on with the prompts `input_ids_BS`, padded at their
    start. `forced_first` is the token that every output, or each row's output, must begin with; `pad` and `ends` are
    the padding and the tokens that end an output (default: those of config.json). The rest is as in `decode`.
    """
    sizes = attention_mask_BS.sum(dim=1).tolist()
    width = input_ids_BS.shape[1]
    forced_B = None if forced_first is None else torch.as_tensor(forced_first).expand(len(sizes))

    def collate(rows: list[int]) -> dict[str, Any]:
        longest = max(sizes[row] for row in rows)
        used = slice(width - longest, None) if decoder_start_B is None else slice(None, longest)
        return {
            "input_ids_BS": input_ids_BS[rows, used],
            "attention_mask_BS": attention_mask_BS[rows, used],
            "decoder_start_B": None if decoder_start_B is None else decoder_start_B[rows],
            "forced_first": None if forced_B is None else forced_B[rows],
            "pad": pad,
            "ends": ends,
        }

    def agree(values: list[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=input_ids_BS.device)
        dist.all_reduce(total)
        return list(total.tolist())

    together = agree if synced and dist.is_initialized() else list
    found = decode(model, sizes, collate, settings=settings, max_tokens=torch.inf, synced=synced, agree=together)
    assert found is not None, "nobody asked to stop"
    return [found[row] for row in range(len(sizes))]
