"""The DeepSpeed engine and the one operation the loop needs of it: an optimizer step that is applied on all ranks
or on none."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from harness.config.schema import OptimizerConfig
from harness.engine.build_ops import use_our_ninja
from harness.engine.fragments import start_from
from harness.engine.groups import LR_SCALE, parameter_groups
from harness.engine.optimizers import build_optimizer
from harness.engine.processes import Processes
from harness.plan.zero import offload_device


class StepOutcome(NamedTuple):
    """`grad_norm` is the global norm before clipping; `applied` is false when it was not finite."""

    applied: bool
    grad_norm: float


def build_engine(
    model: nn.Module,
    optimizer_config: OptimizerConfig,
    deepspeed_config: dict[str, Any],
    processes: Processes,
    *,
    new_heads: Collection[str] = (),
    starts: Mapping[str, int] | None = None,
) -> Any:
    """`deepspeed.initialize` with an optimizer of ours and the final DeepSpeed JSON of the plan.

    Parameters without `requires_grad` get neither gradients nor optimizer state. `new_heads` and `starts` are those of
    `parameter_groups`.
    """
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    use_our_ninja()
    offloaded = offload_device(deepspeed_config, "optimizer") != "none"
    groups = parameter_groups(model, optimizer_config, new_heads=new_heads, starts=starts)
    optimizer = build_optimizer(groups, optimizer_config, device=processes.device, offloaded=offloaded)
    # DeepSpeed warns of optimizers it does not know; ours are proven in tests/numerics/test_optimizers.py.
    ZERO_SUPPORTED_OPTIMIZERS[:] = {*ZERO_SUPPORTED_OPTIMIZERS, type(optimizer)}
    weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    if engine.bfloat16_enabled() or engine.fp16_enabled():
        start_from(engine, weights)
    return engine


def close_engine(engine: Any) -> None:
    """Free what an engine holds (model, masters, moments, buffers), so that another can be built in this process."""
    is_sharded = int(engine.zero_optimization_stage()) == 3
    engine.destroy()
    if is_sharded:
        _forget_sharded_models()
    vars(engine).clear()  # the caller still refers to it
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_sharded_models() -> None:
    """DeepSpeed 0.19 keeps every model that ran under ZeRO-3: in a list of module roots and in a method's cache."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def apply_gradients(engine: Any, learning_rate: float) -> StepOutcome:
    """Reduce what is left to reduce, clip, and update, unless the global gradient norm is not finite.

    `learning_rate` is the schedule's; each group takes its multiple of it.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group[LR_SCALE]
    if isinstance(engine.optimizer, torch.optim.Optimizer):  # ZeRO 0 in float32: DeepSpeed has no guard of its own
        return _guarded_plain_step(engine)
    engine.step()
    norm = float(engine.get_global_grad_norm())
    return StepOutcome(bool(engine.was_step_applied()), norm)


def _guarded_plain_step(engine: Any) -> StepOutcome:
    engine.buffered_allreduce_fallback()
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        engine.zero_grad()
        return StepOutcome(False, norm)
    engine.enable_backward_allreduce = False  # reduced above; step() must not divide by the world size again
    engine.step()
    return StepOutcome(True, norm)
