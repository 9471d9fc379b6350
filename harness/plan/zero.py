"""Model states per rank under ZeRO.

After Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020), section 3 and
figure 1, and Ren et al., "ZeRO-Offload" (2021): with P parameters and N ranks, stage 1 divides the optimizer states by
N, stage 2 the gradients too, stage 3 the weights too. What is not trained has weights only. Activations, communication
buffers and the parameters that stage 3 gathers for the layer at work come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod
from typing import Any, Literal

from harness.config.deepspeed import OffloadDevice, offload_device, zero_stage
from harness.plan.held import FLOAT32_BYTES, WEIGHT_BYTES, Held
from harness.plan.tensors import Tensors, num_parameters

__all__ = ["Memory", "model_states", "offload_device", "state_bytes", "zero_stage"]

Place = Literal["device", "host", "nvme"]
Memory = dict[Place, dict[str, int]]

_PLACES: dict[OffloadDevice, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}

# Optimizer states in bytes per trained parameter. 8 bits: two moments, and a float32 scale for each 256 values.
_STATE_BYTES: Mapping[str, float] = {
    "adamw": 8.0,
    "paged_adamw": 8.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "lion": 4.0,
}


def model_states(held: Held, *, deepspeed: dict[str, Any], dtype: str, optimizer: str, world_size: int) -> Memory:
    """Bytes per rank by place and kind (weights, frozen_weights, quantized_weights, gradients, master_weights,
    optimizer_states).

    ``deepspeed``: the final configuration. DeepSpeed's ZeRO optimizers keep a float32 master copy even if the weights
    are float32; without ZeRO a float32 model is its own master.
    """
    stage, parameters = zero_stage(deepspeed), num_parameters(held.trained)
    share = ceil(parameters / world_size)
    width = WEIGHT_BYTES[dtype]
    optimizer_place = _PLACES[offload_device(deepspeed, "optimizer")]
    weights_place = _PLACES[offload_device(deepspeed, "param")]
    memory: Memory = {"device": {}, "host": {}, "nvme": {}}

    weights = {"weights": width * parameters, "frozen_weights": held.frozen, "quantized_weights": held.quantized}
    for kind, num_bytes in weights.items():
        if num_bytes:
            memory[weights_place][kind] = ceil(num_bytes / world_size) if stage == 3 else num_bytes
    gradients = width * (share if stage >= 2 else parameters)
    if _sums_in_float32(deepspeed):  # stage 1: beside those of the micro-batch
        gradients = FLOAT32_BYTES * share if stage >= 2 else gradients + FLOAT32_BYTES * parameters
    if optimizer_place == "device" or stage == 1:
        memory["device"]["gradients"] = gradients
    if optimizer_place != "device":  # ZeRO-Offload: the owned part is collected in float32 beside the optimizer
        memory["host"]["gradients"] = FLOAT32_BYTES * share
    if stage > 0 or width < FLOAT32_BYTES:
        memory[optimizer_place]["master_weights"] = FLOAT32_BYTES * (share if stage else parameters)
    states = state_bytes(held.trained, optimizer)
    memory[optimizer_place]["optimizer_states"] = ceil(states / world_size) if stage else states
    return memory


def _sums_in_float32(deepspeed: dict[str, Any]) -> bool:
    return bool(deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32")


def state_bytes(trained: Tensors, optimizer: str) -> int:
    """Bytes of the optimizer's states. Adafactor: a row and a column per matrix, one moment per element of vectors.
    Muon: one moment for the matrices of linear layers, AdamW's two for the rest."""
    if optimizer == "adafactor":
        return FLOAT32_BYTES * sum(_factored(tensor.shape) for tensor in trained.values())
    if optimizer == "muon":
        return FLOAT32_BYTES * sum((1 if tensor.kind == "linear" else 2) * tensor.size for tensor in trained.values())
    return ceil(_STATE_BYTES[optimizer] * num_parameters(trained))


def _factored(shape: tuple[int, ...]) -> int:
    return prod(shape) if len(shape) < 2 else prod(shape[:-1]) + prod((*shape[:-2], shape[-1]))
