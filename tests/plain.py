"""Batches for references in plain PyTorch: padded here, by none of harness's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def padded_batch(examples: Sequence[tuple[Any, Any, int]], pad: int) -> tuple[dict[str, Tensor], Tensor]:
    """(input_ids, labels, decoder_start) rows as keyword arguments of a transformers model, and labels with -100."""
    sources = [torch.tensor(source.tolist()) for source, _, _ in examples]
    targets = [torch.tensor(target.tolist()) for _, target, _ in examples]
    starts = [torch.tensor([start, *target.tolist()[:-1]]) for _, target, start in examples]
    mask = pad_sequence([torch.ones_like(source) for source in sources], batch_first=True)
    inputs = {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad),
        "attention_mask": mask,
        "decoder_input_ids": pad_sequence(starts, batch_first=True, padding_value=pad),
    }
    return inputs, pad_sequence(targets, batch_first=True, padding_value=-100)
