"""Named tensors: what a model's parameters are called and how large they are, without torch."""

from __future__ import annotations

from math import prod
from typing import Any, Literal, NamedTuple

ModelJson = dict[str, Any]
Kind = Literal["linear", "embedding", "head", "other"]


class Tensor(NamedTuple):
    """``kind``: "linear" is the weight matrix of a linear layer inside the model, what adapters and quantisation work
    on; "head" is all of an output layer; "embedding" a table of tokens or positions; "other" norms and biases."""

    shape: tuple[int, ...]
    kind: Kind = "other"

    @property
    def size(self) -> int:
        return prod(self.shape)


Tensors = dict[str, Tensor]


def num_parameters(tensors: Tensors) -> int:
    """Values in all of ``tensors``."""
    return sum(tensor.size for tensor in tensors.values())


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Tensors:
    """Weight (outputs, inputs) and bias of a linear layer."""
    weight = {f"{name}.weight": Tensor((outputs, inputs), "linear")}
    return weight | {f"{name}.bias": Tensor((outputs,))} if bias else weight


def norm(name: str, width: int, *, bias: bool = True) -> Tensors:
    """LayerNorm, or RMSNorm without a bias."""
    return {f"{name}.{part}": Tensor((width,)) for part in (("weight", "bias") if bias else ("weight",))}


def table(name: str, rows: int, width: int) -> Tensors:
    """An embedding table."""
    return {f"{name}.weight": Tensor((rows, width), "embedding")}


def head(tensors: Tensors) -> Tensors:
    """The same tensors as parts of an output layer."""
    return {name: Tensor(tensor.shape, "head") for name, tensor in tensors.items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The same tensors inside the module ``prefix``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def stack(name: str, count: int, layer: Tensors) -> Tensors:
    """``count`` equal layers: ``<name>.0`` and so on."""
    return {f"{name}.{index}.{key}": tensor for index in range(count) for key, tensor in layer.items()}
