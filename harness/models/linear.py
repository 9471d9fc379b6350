"""The linear layers of a model, apart from the heads on top of it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def head_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What has weights and stands on top of the base model: output embeddings, classifiers, BERT's pooler."""
    output, base = model.get_output_embeddings(), model.base_model
    pooler = getattr(base, "pooler", None)
    beside = [] if base is model else [child for child in model.children() if child is not base]
    tops = {id(module) for module in [output, pooler, *beside] if module is not None}
    named = {name: module for name, module in model.named_modules() if id(module) in tops}
    return {name: module for name, module in named.items() if any(True for _ in module.parameters())}


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers below the heads by name: nn.Linear (quantised or not) and GPT-2's Conv1D."""
    above = tuple(f"{name}." for name in head_modules(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not f"{name}.".startswith(above)
    }
