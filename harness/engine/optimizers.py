"""Client optimizers for DeepSpeed: one dict of names. The rules for their parameter groups are in groups.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness.config.deepspeed import offload_device
from harness.config.schema import OptimizerConfig
from harness.engine.groups import IS_HIDDEN_MATRIX, ParamGroups

# What each optimizer is built from: groups, settings, device of the model, whether its state lives in host memory.
Builder = Callable[[ParamGroups, OptimizerConfig, torch.device, bool], torch.optim.Optimizer]


def build_optimizer(
    groups: ParamGroups, config: OptimizerConfig, *, device: torch.device, offloaded: bool
) -> torch.optim.Optimizer:
    """The optimizer of the run file over `groups`, before DeepSpeed wraps it."""
    return OPTIMIZERS[config.name](groups, config, device, offloaded)


def needed_ops(config: OptimizerConfig, deepspeed_config: dict[str, Any], device_type: str) -> list[str]:
    """DeepSpeed ops that a run would compile at first use, while ranks wait for each other."""
    optimizer_place, weights_place = (offload_device(deepspeed_config, what) for what in ("optimizer", "param"))
    offloaded = optimizer_place != "none"
    ops = ["async_io"] if "nvme" in (optimizer_place, weights_place) else []
    if config.name == "adamw" and _is_deepspeeds(config, device_type, offloaded):
        ops.append("cpu_adam" if offloaded else "fused_adam")
    return ops


def _is_deepspeeds(config: OptimizerConfig, device_type: str, offloaded: bool) -> bool:
    """DeepSpeed's Adam is taken when asked for, and for offload on a GPU, where it is by far the fastest."""
    return config.implementation == "deepspeed" or (
        config.implementation == "auto" and offloaded and device_type == "cuda"
    )


def _adamw(groups: ParamGroups, config: OptimizerConfig, device: torch.device, offloaded: bool) -> Any:
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if not _is_deepspeeds(config, device.type, offloaded):
        return torch.optim.AdamW(groups, **options, fused=device.type == "cuda")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    optimizer = DeepSpeedCPUAdam(groups, **options) if offloaded else FusedAdam(groups, **options)
    if offloaded or device.type == "cpu":
        optimizer.register_step_pre_hook(_forget_powers)
    return optimizer


def _forget_powers(optimizer: Any, args: Any, kwargs: Any) -> None:
    """DeepSpeed's Adam on CPUs multiplies the powers of beta on from step to step, and after a resume computes them
    anew, which differs in the last bit. An update of nothing with other betas makes it compute them in every step.
    """
    nothing = torch.zeros(1)
    state = [nothing.clone() for _ in range(3)]
    if hasattr(optimizer, "ds_opt_adam"):
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 1, 0.0, 0.0, 0.0, 1.0, 0.0, False, nothing, *state)
    else:
        tensors = [[one] for one in (nothing, *state)]
        optimizer.multi_tensor_adam(0, torch.zeros(1), tensors, 0.0, 0.0, 0.0, 1.0, 1, 1, 0, 0.0)


def _bitsandbytes_adamw(name: str, *, paged: bool) -> Builder:
    """Paged states lie in memory that the GPU driver moves to the host when the device is full."""

    def build(groups: ParamGroups, config: OptimizerConfig, device: torch.device, offloaded: bool) -> Any:
        import bitsandbytes

        kind = getattr(bitsandbytes.optim, name)
        return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, is_paged=paged)

    return build


def _lion(groups: ParamGroups, config: OptimizerConfig, device: torch.device, offloaded: bool) -> Any:
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (2023)."""
    from bitsandbytes.optim import Lion

    return Lion(groups, lr=config.lr, betas=config.betas)


def _adafactor(groups: ParamGroups, config: OptimizerConfig, device: torch.device, offloaded: bool) -> Any:
    return torch.optim.Adafactor(groups, lr=config.lr)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside layers, AdamW for embeddings, heads and vectors.

    Jordan et al., "Muon" (2024), with the step size of Liu et al., "Muon is Scalable for LLM Training" (2025): updates
    have the root mean square of AdamW's, so both halves take the same learning rate and weight decay.
    """

    def __init__(self, groups: ParamGroups, config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        hidden = [group for group in self.param_groups if group[IS_HIDDEN_MATRIX]]
        others = [group for group in self.param_groups if not group[IS_HIDDEN_MATRIX]]
        self._halves: list[torch.optim.Optimizer] = []  # they share our groups and our state
        if hidden:
            self._halves.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw"))
        if others:
            self._halves.append(torch.optim.AdamW(others, betas=config.betas, eps=config.eps))
        for half in self._halves:
            half.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for half in self._halves:
            half.step()


OPTIMIZERS: dict[str, Builder] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes_adamw("AdamW8bit", paged=False),
    "paged_adamw": _bitsandbytes_adamw("AdamW32bit", paged=True),
    "paged_adamw_8bit": _bitsandbytes_adamw("AdamW8bit", paged=True),
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": lambda groups, config, device, offloaded: MuonWithAdamW(groups, config),
}
