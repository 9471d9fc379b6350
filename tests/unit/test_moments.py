"""Optimizer states to float32 moments and back, 8-bit codes bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim import AdamW8bit, Lion
from torch import Tensor

from harness.engine import moments
from harness.engine.moments import decode, encode, num_updates, read_moments, set_num_updates, write_moment

SIZE = 5000  # from 4096 values on bitsandbytes quantises; the last block is not full


def stepped(make: Any, *, steps: int = 4, size: int = SIZE) -> tuple[Any, Tensor]:
    """An optimizer after some steps of gradients whose scale varies by blocks over ten orders, with zeros."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(size))
    optimizer = make([weight])
    scale = 10 ** -torch.linspace(0, 10, size)
    for _ in range(steps):
        weight.grad = torch.randn(size, generator=generator) * scale
        weight.grad[:300] = 0.0
        optimizer.step()
    return optimizer, weight


def restored(make: Any, old: Any, weight: Tensor) -> tuple[Any, Tensor]:
    again = torch.nn.Parameter(weight.detach().clone())
    optimizer = make([again])
    for name, moment in read_moments(old, weight).items():
        write_moment(optimizer, again, name, moment)
    count = num_updates(old, weight)
    if count is not None:
        set_num_updates(optimizer, again, count)
    return optimizer, again


@pytest.mark.parametrize("make", [AdamW8bit, Lion, torch.optim.AdamW], ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("size", [SIZE, 100])
def test_a_restored_state_goes_on_bit_for_bit(make: Any, size: int) -> None:
    old, weight = stepped(make, size=size)
    new, again = restored(make, old, weight)
    assert set(read_moments(new, again)) == ({"exp_avg"} if make is Lion else {"exp_avg", "exp_avg_sq"})
    for name, moment in read_moments(old, weight).items():
        assert torch.equal(moment, read_moments(new, again)[name])
    weight.grad = again.grad = torch.linspace(-1, 1, size)
    old.step()
    new.step()
    assert torch.equal(weight, again)
    assert num_updates(old, weight) == num_updates(new, again) == 5


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_codes_survive_decoding_and_encoding(signed: bool, seed: int) -> None:
    """Any codes whose largest value was a block's scale: with the level 1, or the lowest."""
    generator = torch.Generator().manual_seed(seed)
    levels = create_dynamic_map(signed=signed)
    codes = torch.randint(0, 256, (SIZE,), generator=generator).to(torch.uint8)
    starts = torch.arange(0, SIZE, 256)
    if signed:
        codes[codes == 255] = 254
    codes[starts] = torch.tensor([255, 0 if signed else 255], dtype=torch.uint8).repeat(len(starts))[: len(starts)]
    scales = 10 ** (20 * torch.rand(len(starts), generator=generator) - 15)
    values = decode(codes, scales, levels)
    again, new_scales = encode(values, levels)
    assert torch.equal(decode(again, new_scales, levels), values)
    assert torch.equal(again, codes)


def test_chunks_are_cut_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, values = create_dynamic_map(signed=True), torch.linspace(-1, 3, SIZE)
    codes, scales = encode(values, levels)
    decoded = decode(codes, scales, levels)
    monkeypatch.setattr(moments, "_CHUNK", 512)
    assert all(torch.equal(a, b) for a, b in zip(encode(values, levels), (codes, scales), strict=True))
    assert torch.equal(decode(codes, scales, levels), decoded)


@pytest.mark.parametrize("signed", [True, False])
def test_other_values_are_encoded_to_the_nearest_level(signed: bool) -> None:
    """As bitsandbytes does: half the widest gap between levels is 0.7 % of the largest value of the block."""
    levels = create_dynamic_map(signed=signed)
    values = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.square()
    error = (decode(*encode(values, levels), levels) - values).abs()
    largest = torch.stack([block.abs().max() for block in values.split(256)]).repeat_interleave(256)[:SIZE]
    assert (error / largest).max() < 0.0075
