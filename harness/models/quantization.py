"""4-bit and 8-bit weights of frozen linear layers, through bitsandbytes; heads and embeddings stay whole.

Weights are quantised one by one while they are read, so a rank never holds the model in 16 bits.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from harness.config.schema import QuantizationConfig
from harness.errors import ConfigError, DataError
from harness.models.linear import head_modules, linear_layers

# It warns at every 8-bit product that inputs are rounded, and of an optional package.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class MergeGap(NamedTuple):
    """Largest difference of two logits, and that over the largest logit."""

    largest: float
    relative: float


def quantized_model_options(
    quantization: QuantizationConfig, dtype: torch.dtype, *, skeleton: PreTrainedModel, device: str
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make it quantise; `skeleton` is the model to be, perhaps without weights.

    What is not quantised is read in `dtype`. Raises ConfigError if an engine that works in `dtype` would cast the
    packed weights as if they were numbers.
    """
    storage_dtype = getattr(torch, quantization.storage_dtype)
    if dtype != torch.float32 and storage_dtype not in (torch.uint8, dtype):
        what = f"packed weights stored as {quantization.storage_dtype} would be cast to model.dtype"
        raise ConfigError(what, where="model.quantization.storage_dtype", hint="use uint8, or the same type")
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization.bits == 4:
        compute_dtype = quantization.compute_dtype
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.type,
            "bnb_4bit_use_double_quant": quantization.double,
            "bnb_4bit_compute_dtype": dtype if compute_dtype is None else getattr(torch, compute_dtype),
            "bnb_4bit_quant_storage": storage_dtype,
        }
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=sorted(head_modules(skeleton)))
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}


def is_quantized(model: nn.Module) -> bool:
    """True if a linear layer is stored in 4 or 8 bits."""
    return any(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in model.modules())


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` in place with plain layers of `dtype` that hold the same rounded weights.

    transformers' own turns GPT-2's Conv1D into layers that no GPT-2 checkpoint has.
    """
    for name, module in linear_layers(model).items():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            model.set_submodule(name, _plain_layer(module, dtype))
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    plain: PreTrainedModel = model.to(dtype)
    return plain


def merge_gate(unmerged: Tensor, merged: Tensor, *, tolerance: float) -> MergeGap:
    """How far two models' logits on the same rows lie apart. Raises DataError if relatively more than `tolerance`."""
    largest = float((unmerged.float() - merged.float()).abs().max())
    gap = MergeGap(largest, largest / float(unmerged.float().abs().max()))
    if not gap.relative <= tolerance:
        what = f"merging changed the logits by {gap.relative:.2g} of the largest one (allowed: {tolerance:g})"
        raise DataError(what, hint="export the adapter without merging, or merge in float32")
    return gap


def _plain_layer(module: Any, dtype: torch.dtype) -> nn.Module:
    weight = _whole_weight(module).to(dtype)
    rows, columns = weight.shape
    with torch.device("meta"):
        plain: Any = Conv1D(rows, columns) if module.source_cls is Conv1D else nn.Linear(columns, rows)
    plain.weight = nn.Parameter(weight.T.contiguous() if module.source_cls is Conv1D else weight)
    plain.bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(dtype))
    layer: nn.Module = plain
    return layer


def _whole_weight(module: Any) -> Tensor:
    """Weight [out, in] of a quantised layer."""
    if isinstance(module, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        weight = bnb.functional.int8_vectorwise_dequant(module.weight.data, scales)
    return weight
