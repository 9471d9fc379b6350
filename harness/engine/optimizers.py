"""Client optimizers for DeepSpeed: one dict of names, and the rule for weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.config.schema import OptimizerConfig

ParamGroups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> ParamGroups:
    """Matrices decay; vectors and scalars (norms, biases) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # A parameter partitioned by ZeRO-3 is empty here and keeps its shape in `ds_shape`.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    matrix_ids = {id(p) for p in matrices}
    vectors = [p for p in trainable if id(p) not in matrix_ids]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _adamw(groups: ParamGroups, config: OptimizerConfig, device: torch.device, on_cpu: bool) -> torch.optim.Optimizer:
    if on_cpu and device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, adamw_mode=True
        )
        return optimizer
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=device.type == "cuda")


def _adafactor(
    groups: ParamGroups, config: OptimizerConfig, device: torch.device, on_cpu: bool
) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=config.lr)


OPTIMIZERS: dict[str, Callable[[ParamGroups, OptimizerConfig, torch.device, bool], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, device: torch.device, offloaded: bool
) -> torch.optim.Optimizer:
    """`offloaded`: the optimizer state lives in host memory, so a GPU run takes DeepSpeed's vectorised CPU Adam."""
    return OPTIMIZERS[config.name](parameter_groups(model, config.weight_decay), config, device, offloaded)
