"""The stacks of layers and the embeddings of a model that is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from harness.plan.layers import Place, layer_places


def stack_sizes(places: Iterable[Place]) -> dict[str, int]:
    """Number of layers of each stack."""
    sizes: dict[str, int] = {}
    for place in places:
        sizes[place.stack] = max(sizes.get(place.stack, 0), place.number + 1)
    return sizes


def embedding_names(model: nn.Module) -> set[str]:
    """Parameters of token, position and segment embeddings; one shared with the head is there once, by its first name.

    T5's relative position bias is a table too, but lies in a layer.
    """
    names = table_names(model)
    return names - layer_places(names).keys()


def table_names(model: nn.Module) -> set[str]:
    """Parameters whose rows are looked up."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in tables}
