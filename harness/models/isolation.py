"""Shown on the loaded model itself: rows packed into one sequence neither see each other nor each other's positions.

transformers (5.23, masking_utils.find_packed_sequence_indices) hides rows from each other when there is no attention
mask and `position_ids` start again at 0. Not every model goes by that: state-space and linear attention layers carry
their state on, and OPT, Falcon, BLOOM and MPT have masks or positions of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import ConfigError

ROW_TOKENS, NEIGHBOUR_TOKENS = 9, 7
# As parts of the largest logit. With another neighbour of the same length nothing but hidden values changes, and these
# are multiplied by exactly 0: sound models of up to 32 layers, in any dtype, give 0.0, leaking ones 1e-3 and more.
# Alone, a row takes other kernels: 32 random layers give up to 5e-6 in float32 and 5e-2 in bfloat16, SmolLM2-135M 1e-6
# and 2e-2.
MAX_NEIGHBOUR_CHANGE = 1e-5
MAX_CHANGE_ALONE, MAX_CHANGE_ALONE_16_BIT = 1e-4, 1e-1


def check_isolation(model: nn.Module, *, in_one_row: bool = False) -> None:
    """Raises ConfigError if the logits of a row depend on its neighbour in the pack, or are others than alone.

    `in_one_row`: the packs of a batch are one row, as flash attention wants them. Under ZeRO-3 a collective: all ranks
    run the same two batches.
    """
    was_training = model.training
    model.eval()
    try:
        neighbour_change, change = _changes(model, in_one_row)
    finally:
        model.train(was_training)
    hint = "data.packing=false, or another model.attention"
    if not neighbour_change <= MAX_NEIGHBOUR_CHANGE:
        what = f"packed rows see each other in this model: a neighbour changes logits by {neighbour_change:.1e}"
        raise ConfigError(f"{what} of the largest", where="data.packing", hint=hint)
    is_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    if not change <= (MAX_CHANGE_ALONE if is_float32 else MAX_CHANGE_ALONE_16_BIT):
        what = f"a packed row is another row to this model than the same row alone: logits differ by {change:.1e}"
        raise ConfigError(f"{what} of the largest", where="data.packing", hint=hint)


@torch.no_grad()
def _changes(model: Any, in_one_row: bool) -> tuple[float, float]:
    """How far a row's logits move with another neighbour, and from those of the row alone."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    row, *neighbours = (
        torch.randint(vocab_size, (size,), generator=generator).to(device)
        for size in (ROW_TOKENS, NEIGHBOUR_TOKENS, NEIGHBOUR_TOKENS)
    )
    packs = torch.stack([torch.cat([neighbour, row]) for neighbour in neighbours])
    positions = torch.cat([torch.arange(NEIGHBOUR_TOKENS), torch.arange(ROW_TOKENS)]).to(device).expand_as(packs)
    shape = (1, -1) if in_one_row else packs.shape
    logits = model(input_ids=packs.reshape(shape), position_ids=positions.reshape(shape), use_cache=False).logits
    alone = model(input_ids=row[None], use_cache=False).logits[0].float()
    first, second = logits.reshape(*packs.shape, -1)[:, NEIGHBOUR_TOKENS:].float()

    def distance(other: Tensor) -> float:
        return float((first - other).abs().max() / alone.abs().max())

    return distance(second), distance(alone)
