"""The base optimizer's state of one tensor as float32 moments and a count of updates, and back.

torch keeps float32 tensors and its count as a tensor, DeepSpeed and bitsandbytes as an int. bitsandbytes calls Adam's
moments `state1` and `state2` and in 8 bits keeps codes: each block of 256 values is a scale (`absmax`) times levels of
a fixed table (`qmap`), after Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
_CHUNK = 1 << 24  # values encoded or decoded at a time: the rest of the work space stays small
_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}
_QUANTISATION = ("qmap", "absmax")


def moment_sizes(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, int]:
    """Number of values of each moment of `tensor`; empty before the first update."""
    return {_NAMES.get(key, key): value.numel() for key, value in _stored(optimizer, tensor)}


def read_moments(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """The moments of `tensor` in float32; those kept in 8 bits are decoded, in host memory."""
    state = optimizer.state.get(tensor, {})
    return {
        _NAMES.get(key, key): value if value.is_floating_point() else _decoded(state, key)
        for key, value in _stored(optimizer, tensor)
    }


@torch.no_grad()
def write_moment(optimizer: torch.optim.Optimizer, tensor: Tensor, name: str, moment: Tensor) -> None:
    """Make `moment` (float32) that of `tensor`, in the form in which the optimizer keeps it."""
    if not optimizer.state.get(tensor):
        _make_state(optimizer, tensor)
    state = optimizer.state[tensor]
    key = next((own for own in state if _NAMES.get(own, own) == name), None)
    if key is None:
        state[name] = moment.to(tensor.device, copy=True)
    elif state[key].is_floating_point():
        state[key].copy_(moment.view_as(state[key]))
    else:
        codes, scales = encode(moment.reshape(-1), state[_beside("qmap", key)].cpu())
        state[key].view(-1).copy_(codes)
        state[_beside("absmax", key)].copy_(scales)


def num_updates(optimizer: torch.optim.Optimizer, tensor: Tensor) -> int | None:
    """Updates of `tensor` as the optimizer counts them for its bias correction; None if it does not count."""
    count = optimizer.state.get(tensor, {}).get("step")
    return None if count is None else int(count)


def set_num_updates(optimizer: torch.optim.Optimizer, tensor: Tensor, count: int) -> None:
    """Set what `num_updates` returns."""
    is_int = type(optimizer).__module__.startswith(("deepspeed.", "bitsandbytes."))
    device = tensor.device if optimizer.defaults.get("fused") else "cpu"
    optimizer.state[tensor]["step"] = count if is_int else torch.tensor(float(count), device=device)


def encode(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, one per value) and scales (one per block of 256) of float32 `values`; `levels` ascend to 1.

    As bitsandbytes does, a block's scale is its largest value. But where values were decoded from such codes, they are
    encoded to what decodes to the same bits: levels need not go down to -1, so the scale may have been one that made
    the lowest level the largest value, and rounding leaves one step up or down open. Of these scales the one is taken
    that gives back most values of the block.
    """
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    parts = [_encode_blocks(part, levels) for part in blocks.split(_CHUNK // BLOCK)]
    codes, scales = (torch.cat(one) for one in zip(*parts, strict=True))
    return codes.view(-1)[: values.numel()], scales.view(-1)


def _encode_blocks(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    largest = blocks.abs().amax(1, keepdim=True)
    guesses = [largest, largest / -levels[0]] if levels[0] < 0 else [largest]
    codes, scales = torch.empty_like(blocks, dtype=torch.uint8), largest
    fewest_wrong = torch.full_like(largest, BLOCK + 1)
    for guess in guesses:
        for scale in (guess, torch.nextafter(guess, 2 * guess), torch.nextafter(guess, 0 * guess)):
            found = _nearest(blocks / torch.where(scale > 0, scale, 1), levels)
            num_wrong = (levels[found.int()] * scale != blocks).sum(1, keepdim=True)
            is_better = num_wrong < fewest_wrong
            codes, scales = torch.where(is_better, found, codes), torch.where(is_better, scale, scales)
            fewest_wrong = torch.minimum(num_wrong, fewest_wrong)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The float32 values of `codes` (flat)."""
    values = torch.empty(codes.shape)
    parts = (tensor.split(size) for tensor, size in ((values, _CHUNK), (codes, _CHUNK), (scales, _CHUNK // BLOCK)))
    for values_part, codes_part, scales_part in zip(*parts, strict=True):
        values_part[:] = levels[codes_part.int()] * scales_part.repeat_interleave(BLOCK)[: codes_part.numel()]
    return values


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


def _stored(optimizer: torch.optim.Optimizer, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for key, value in optimizer.state.get(tensor, {}).items():
        if torch.is_tensor(value) and key != "step" and not key.startswith(_QUANTISATION):
            yield key, value


def _decoded(state: Mapping[str, Any], key: str) -> Tensor:
    parts = state[key], state[_beside("absmax", key)], state[_beside("qmap", key)]
    return decode(*(part.detach().reshape(-1).cpu() for part in parts))


def _beside(prefix: str, key: str) -> str:
    """`state1` -> `qmap1`, `absmax1`."""
    return prefix + key[-1]


def _make_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> None:
    """What bitsandbytes makes at its first step; the others are content with the moments."""
    if not hasattr(optimizer, "init_state"):
        return
    groups = optimizer.param_groups
    optimizer.param_groups = [{**optimizer.defaults, "params": [tensor]}]  # it looks settings up by position
    optimizer.init_state(optimizer.param_groups[0], tensor, 0, 0)
    optimizer.param_groups = groups
