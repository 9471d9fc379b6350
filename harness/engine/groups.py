"""Parameter groups: what decays, what learns more slowly, and what has been trained for how long."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn

from harness.config.schema import OptimizerConfig
from harness.models.layers import embedding_names, stack_sizes, table_names
from harness.plan.layers import layer_places

ParamGroups = list[dict[str, Any]]
LR_SCALE, IS_HIDDEN_MATRIX = "lr_scale", "is_hidden_matrix"


class _Kind(NamedTuple):
    """What the parameters of one group have in common."""

    start: int
    lr_scale: float
    is_vector: bool
    is_hidden_matrix: bool


def parameter_groups(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    new_heads: Collection[str] = (),
    starts: Mapping[str, int] | None = None,
) -> ParamGroups:
    """Groups of the trainable parameters, in an order that depends on the model and the run file only.

    Matrices decay; vectors and scalars (norms, biases) do not. Each group's learning rate is the schedule's times its
    `lr_scale`: that of the layer (see `learning_rate_scales`), or `head_lr` / `lr` for parameters in `new_heads`.
    `starts`: the step after which a parameter is trained, if not from the first: those of different starts have
    different step counts in the optimizer, so they never share a group.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = learning_rate_scales(model, config.layer_decay)
    if config.head_lr is not None:
        scales |= dict.fromkeys(new_heads, config.head_lr / config.lr)
    hidden = layer_places(trainable).keys() - table_names(model) if config.name == "muon" else set()
    kinds: dict[_Kind, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        # A parameter partitioned by ZeRO-3 is empty here and keeps its shape in `ds_shape`.
        num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        is_hidden = name in hidden and num_dimensions == 2
        kind = _Kind((starts or {}).get(name, 0), scales[name], num_dimensions < 2, is_hidden)
        kinds.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr * kind.lr_scale,
            "weight_decay": 0.0 if kind.is_vector else config.weight_decay,
            LR_SCALE: kind.lr_scale,
            IS_HIDDEN_MATRIX: kind.is_hidden_matrix,
        }
        for kind, parameters in sorted(kinds.items())
    ]


def learning_rate_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """`layer_decay` to the power of a parameter's distance from the output, by name.

    As in BEiT (Bao et al. 2022): what comes after the last layer (final norm, head) has 1, the top layer `layer_decay`,
    each layer below once more of it, embeddings and their norms the least. In an encoder-decoder each side counts its
    own layers from its own top; embeddings take the power of the deeper side.
    """
    names = [name for name, _ in model.named_parameters()]
    places = layer_places(names)
    sizes = stack_sizes(places.values())
    embeddings = embedding_names(model)
    scales = dict.fromkeys(names, 1.0)
    for name in names:
        if name in places:
            stack, number = places[name]
            scales[name] = layer_decay ** (sizes[stack] - number)
        elif name in embeddings or "embed" in name:
            scales[name] = layer_decay ** (max(sizes.values(), default=0) + 1)
    return scales
