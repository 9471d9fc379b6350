"""Weights laid out for the small matrix products of decoding on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 128  # oneDNN lays a weight out for products with about so many rows


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within, float32 linear layers on a CPU multiply by copies of their weights in the layout of oneDNN.

    A plain product lays its weight out anew each time, which costs as much as the product itself where a few running
    outputs meet a large vocabulary. Weights that are not here, such as a ZeRO-3 rank's, are left alone.
    """
    layers: list[Any] = []
    if torch.backends.mkldnn.is_available():
        layers = [layer for layer in model.modules() if _can_be_packed(layer)]
    for layer in layers:
        layer.forward = _product(layer.weight.detach(), layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_be_packed(layer: nn.Module) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() > 0


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    ops: Any = torch.ops.mkldnn
    laid_out = ops._reorder_linear_weight(weight, TYPICAL_ROWS)
    return lambda inputs: ops._linear_pointwise.default(inputs, laid_out, bias, "none", [], "")
