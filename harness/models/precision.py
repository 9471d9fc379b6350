"""A model in other numbers, to decode with: bfloat16, or int8 in its linear layers on a CPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.config.evaluation_schema import Precision
from harness.errors import ConfigError
from harness.models.bottleneck import Bottleneck
from harness.models.load import PACKED

KEY = "evaluation.precision"
SMALLEST = torch.finfo(torch.float32).tiny
LEVELS = 63  # of an input on either side of 0: more would overflow the 16-bit sums of x86 processors without VNNI
# We know; there is no other way to torch's int8 products of a float input.
warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, torch.quantize_per_channel")


class Int8Linear(nn.Module):
    """x W^T + b with W in 8 bits, a scale for each of O outputs, and x rounded to 7 bits, a scale for each of its rows.

    `torch.ao.quantization.quantize_dynamic` has one scale for all of x: then outputs depend on who shares the batch.
    """

    weight = None  # T5 looks at its type

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        weight_OI = weight_OI.detach().float()
        scale_O = (weight_OI.abs().amax(dim=1) / 127).clamp(min=SMALLEST)
        zeros_O = torch.zeros(len(weight_OI), dtype=torch.int64)
        rounded_OI = torch.quantize_per_channel(weight_OI, scale_O, zeros_O, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded_OI, None)
        self.bias_O = torch.zeros(len(weight_OI)) if bias_O is None else bias_O.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=SMALLEST)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        output: Tensor = product(rows / largest, 1.0 / LEVELS, LEVELS + 1, self.packed)
        return output.mul_(largest).add_(self.bias_O).to(x.dtype)


def in_precision(model: Any, precision: Precision, *, is_whole: bool = True) -> Any:
    """`model` itself for "model", else a copy that shares with it what is not converted. `model` stays as it is.

    bfloat16: all weights that are not packed. int8: every linear layer, output embeddings too; layers that an adapter
    adds stay as they are. Raises ConfigError if that cannot be; `is_whole` is false if a rank has only its share of the
    weights (ZeRO-3).
    """
    if precision == "model":
        return model
    if not is_whole:
        what = f"{precision} needs all weights on every rank, and under ZeRO-3 they do not fit"
        raise ConfigError(what, where=KEY, hint="set it to model, or use deepspeed.preset zero2")
    if precision == "bfloat16":
        return _twin(model, {id(tensor): _in_bfloat16(name, tensor) for name, tensor in _tensors(model)})
    if next(model.parameters()).device.type != "cpu":
        raise ConfigError("int8 is for CPUs", where=KEY, hint="set it to bfloat16")
    if any(type(parameter).__name__ in PACKED for parameter in model.parameters()):
        raise ConfigError("the weights are in 4 or 8 bits already", where=KEY, hint="set it to model")
    twin = _twin(model, {id(tensor): tensor for _, tensor in _tensors(model)})
    _convert_linear_layers(twin)
    return twin


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _twin(model: nn.Module, tensors: dict[int, Tensor]) -> nn.Module:
    """A copy of the modules with other weights and buffers, named by the `id` of those in whose place they are.

    What bitsandbytes keeps beside packed weights is shared: the first forward pass of a layer moves it from one place
    to another.
    """
    states = [vars(module).get(name) for module in model.modules() for name in ("state", "quant_state")]
    return copy.deepcopy(model, {**tensors, **{id(state): state for state in states if state is not None}})


def _in_bfloat16(name: str, tensor: Tensor) -> Tensor:
    """Frequencies of rotary positions stay, as in transformers: rounded, they would move far positions."""
    if not tensor.is_floating_point() or type(tensor).__name__ in PACKED or name.endswith("inv_freq"):
        return tensor
    converted = tensor.detach().to(torch.bfloat16)
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _convert_linear_layers(parent: nn.Module) -> None:
    """In place, all below `parent` but what an adapter has put beside the base."""
    child: Any
    is_adapted = hasattr(parent, "base_layer")
    if is_adapted and len(getattr(parent, "lora_magnitude_vector", ())):
        raise ConfigError("dora computes with the base's own weights", where=KEY, hint="set it to bfloat16 or model")
    for name, child in parent.named_children():
        if isinstance(child, Bottleneck) or name == "prompt_encoder" or (is_adapted and name != "base_layer"):
            continue
        if type(child) is nn.Linear:
            setattr(parent, name, Int8Linear(child.weight, child.bias))
        elif type(child) is Conv1D:
            setattr(parent, name, Int8Linear(child.weight.T, child.bias))
        else:
            _convert_linear_layers(child)
