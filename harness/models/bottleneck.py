"""Bottleneck adapters (Houlsby et al. 2019): a small residual network behind every transformer layer.

One per layer, with a layer norm in front, as Bapna and Firat (2019) put them for domains of translation. A forward hook
of the layer applies it, so any model whose layers are transformers' GradientCheckpointingLayer can have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from harness.errors import ConfigError

BOTTLENECK = "bottleneck"
BOTTLENECK_TYPE = "BOTTLENECK"  # in place of PEFT's `peft_type`; PEFT has no such adapters


class Bottleneck(nn.Module):
    """h + up(relu(down(norm(h)))) on the last dimension; `up` starts at zero, so that h comes out unchanged."""

    def __init__(self, width: int, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, size)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        inner_BTW = self.down(self.norm(hidden.to(self.down.weight.dtype)))
        change_BTH: Tensor = self.up(self.dropout(torch.relu(inner_BTW)))
        return hidden + change_BTH.to(hidden.dtype)


def transformer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a transformers model by name, the encoder's before the decoder's."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}


def add_bottlenecks(model: PreTrainedModel, *, size: int, dropout: float, saved: list[str]) -> PreTrainedModel:
    """Puts a bottleneck of width `size` behind every layer; the modules `saved` are trained whole.

    Raises ConfigError if the model shows no layers.
    """
    layers = transformer_layers(model)
    if not layers:
        what = f"{model.config.model_type} has no layers that a bottleneck can follow"
        raise ConfigError(what, where="adapter.method", hint="use lora")
    for layer in layers.values():
        layer.add_module(BOTTLENECK, Bottleneck(model.config.hidden_size, size, dropout))
        layer.register_forward_hook(_through_bottleneck)
    model.bottleneck_config = {"peft_type": BOTTLENECK_TYPE, "size": size, "dropout": dropout, "saved": saved}
    for parameter in bottleneck_tensors(model).values():
        parameter.requires_grad_(True)
    return model


def bottleneck_tensors(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters of the bottlenecks and of the modules that are trained whole, by name."""
    parts = [BOTTLENECK, *model.bottleneck_config["saved"]]
    return {name: p for name, p in model.named_parameters() if any(f".{part}." in f".{name}" for part in parts)}


def _through_bottleneck(layer: nn.Module, inputs: Any, output: Any) -> Any:
    bottleneck = layer.get_submodule(BOTTLENECK)
    if isinstance(output, tuple):
        return (bottleneck(output[0]), *output[1:])
    return bottleneck(output)
