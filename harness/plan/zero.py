"""Model states per rank under ZeRO.

After Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 3 and
figure 1, and Ren et al., "ZeRO-Offload" (2021): with P parameters and N ranks, stage 1 divides the optimizer states by
N, stage 2 the gradients too, stage 3 the weights too. Activations, communication buffers and the parameters that
stage 3 gathers for the layer at work come on top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil, prod
from typing import Any, Literal

from harness.config.deepspeed import OffloadDevice, offload_device, zero_stage

__all__ = ["Memory", "Shapes", "model_states", "num_parameters", "num_state_values", "offload_device", "zero_stage"]

Shapes = Counter[tuple[int, ...]]
Place = Literal["device", "host", "nvme"]
Memory = dict[Place, dict[str, int]]

_FLOAT32_BYTES = 4
_PLACES: dict[OffloadDevice, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}
WEIGHT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def num_parameters(shapes: Shapes) -> int:
    """Parameters of a model given how often each tensor shape occurs."""
    return sum(prod(shape) * count for shape, count in shapes.items())


def model_states(shapes: Shapes, *, deepspeed: dict[str, Any], dtype: str, optimizer: str, world_size: int) -> Memory:
    """Bytes per rank by place and kind (weights, gradients, master_weights, optimizer_states).

    ``deepspeed``: the final configuration. DeepSpeed's ZeRO optimizers keep a float32 master copy even if the weights
    are float32; without ZeRO a float32 model is its own master.
    """
    stage, parameters = zero_stage(deepspeed), num_parameters(shapes)
    share = ceil(parameters / world_size)
    width = WEIGHT_BYTES[dtype]
    optimizer_place = _PLACES[offload_device(deepspeed, "optimizer")]
    weights_place = _PLACES[offload_device(deepspeed, "param")]
    memory: Memory = {"device": {}, "host": {}, "nvme": {}}

    memory[weights_place]["weights"] = width * (share if stage == 3 else parameters)
    gradients = width * (share if stage >= 2 else parameters)
    if _sums_in_float32(deepspeed):  # stage 1: beside those of the micro-batch
        gradients = _FLOAT32_BYTES * share if stage >= 2 else gradients + _FLOAT32_BYTES * parameters
    if optimizer_place == "device" or stage == 1:
        memory["device"]["gradients"] = gradients
    if optimizer_place != "device":  # ZeRO-Offload: the owned part is collected in float32 beside the optimizer
        memory["host"]["gradients"] = _FLOAT32_BYTES * share
    if stage > 0 or width < _FLOAT32_BYTES:
        memory[optimizer_place]["master_weights"] = _FLOAT32_BYTES * (share if stage else parameters)
    states = _FLOAT32_BYTES * num_state_values(shapes, optimizer)
    memory[optimizer_place]["optimizer_states"] = ceil(states / world_size) if stage else states
    return memory


def _sums_in_float32(deepspeed: dict[str, Any]) -> bool:
    return bool(deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32")


def num_state_values(shapes: Shapes, optimizer: str) -> int:
    """AdamW: two moments per parameter. Adafactor: a row and a column per matrix, one moment per element of vectors."""
    if optimizer == "adamw":
        return 2 * num_parameters(shapes)
    return sum(
        count * (prod(shape) if len(shape) < 2 else prod(shape[:-1]) + prod((*shape[:-2], shape[-1])))
        for shape, count in shapes.items()
    )
