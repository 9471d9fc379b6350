"""How the weights of a run are held: trained, frozen, or frozen in 4 or 8 bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from harness.config.layers import layer_numbers
from harness.config.schema import FreezeRule, QuantizationConfig, RunConfig
from harness.plan.adapters import adapter_tensors
from harness.plan.layers import layer_places
from harness.plan.tensors import ModelJson, Tensor, Tensors, num_parameters

WEIGHT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32_BYTES = 4

# bitsandbytes: a scale for each 64 values; with double quantisation it has 8 bits, and one float32 for 256 of them.
_BLOCK, _DOUBLE_BLOCK = 64, 256


class Held(NamedTuple):
    """``trained``: tensors with gradients and optimizer states. ``frozen``, ``quantized``: bytes of the others' weights
    in the compute type and in 4 or 8 bits, before ZeRO divides them."""

    trained: Tensors
    frozen: int = 0
    quantized: int = 0


def held_weights(config: RunConfig, model: ModelJson, tensors: Tensors) -> Held:
    """What is trained of ``tensors``, or beside them (an adapter), and the bytes of all that is not."""
    if config.adapter is not None:
        trained = adapter_tensors(config.adapter, config.task, model, tensors)
        rest = tensors
    else:
        frozen = frozen_names(_rules(config), tensors)
        trained = {name: tensor for name, tensor in tensors.items() if name not in frozen}
        rest = {name: tensors[name] for name in frozen}
    quantization = config.model.quantization
    quantized = {} if quantization is None else {name: t for name, t in rest.items() if _is_quantizable(name, t)}
    whole = num_parameters(rest) - num_parameters(quantized)
    return Held(
        trained,
        frozen=WEIGHT_BYTES[config.model.dtype] * whole,
        quantized=sum(_quantized_bytes(tensor, quantization) for tensor in quantized.values()) if quantization else 0,
    )


def frozen_names(rules: list[FreezeRule], tensors: Tensors) -> set[str]:
    """Names of the tensors that some rule freezes for the whole run."""
    places = layer_places(tensors)
    frozen: set[str] = set()
    for rule in rules:
        if rule.until_step is not None:
            continue
        for stack in ("encoder", "decoder", "layers"):
            if (text := getattr(rule, stack)) is not None:
                numbers = layer_numbers(text)
                frozen |= {
                    name
                    for name, place in places.items()
                    if place.stack == stack and (numbers is None or place.number in numbers)
                }
        if rule.embeddings:
            frozen |= {name for name, tensor in tensors.items() if tensor.kind == "embedding"}
        frozen |= {name for name in tensors for pattern in rule.patterns if re.search(pattern, name)}
    return frozen


def _rules(config: RunConfig) -> list[FreezeRule]:
    return [config.freeze] if isinstance(config.freeze, FreezeRule) else config.freeze


def _is_quantizable(name: str, tensor: Tensor) -> bool:
    """transformers keeps T5's second feed-forward matrix whole."""
    return tensor.kind == "linear" and not name.endswith("DenseReluDense.wo.weight")


def _quantized_bytes(weight: Tensor, quantization: QuantizationConfig) -> int:
    """The packed values and their scales: 4 bits 0.516 bytes a value (0.5625 without double quantisation)."""
    if quantization.bits == 8:
        return weight.size + FLOAT32_BYTES * weight.shape[0]
    blocks = ceil(weight.size / _BLOCK)
    scales = blocks + FLOAT32_BYTES * ceil(blocks / _DOUBLE_BLOCK) if quantization.double else FLOAT32_BYTES * blocks
    return ceil(weight.size / 2) + scales
