"""What is refused where, which ops are compiled before, and Muon's two halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.config.rules import optimizer_problem
from harness.config.schema import OptimizerConfig
from harness.engine.groups import parameter_groups
from harness.engine.optimizers import OPTIMIZERS, build_optimizer, needed_ops
from tests.unit.test_parameter_groups import make

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", range(4))
def test_what_needs_whole_matrices_runs_without_zero_only(name: str, stage: int) -> None:
    problem = optimizer_problem(name, stage=stage, offload="none")
    assert (problem is not None) == (name in ("adafactor", "muon") and stage > 0)
    if problem:
        assert f"ZeRO stage {stage} cuts them into flat pieces: set `deepspeed.preset` to zero0" in problem


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_adamw_is_swapped_to_nvme(name: str) -> None:
    assert (optimizer_problem(name, stage=3, offload="nvme") is None) == (name == "adamw")
    assert (optimizer_problem(name, stage=3, offload="cpu") is None) == (name not in ("adafactor", "muon"))


@pytest.mark.parametrize(
    ("implementation", "device", "offload", "expected"),
    [
        ("auto", "cpu", "cpu", []),
        ("auto", "cuda", "none", []),
        ("auto", "cuda", "cpu", ["cpu_adam"]),
        ("torch", "cuda", "cpu", []),
        ("torch", "cpu", "nvme", ["async_io"]),
        ("deepspeed", "cpu", "none", ["fused_adam"]),
        ("deepspeed", "cpu", "cpu", ["cpu_adam"]),
        ("deepspeed", "cuda", "nvme", ["async_io", "cpu_adam"]),
    ],
)
def test_ops_that_are_compiled_before_ranks_wait(
    implementation: Any, device: str, offload: str, expected: list[str]
) -> None:
    config = OptimizerConfig(lr=1.0, implementation=implementation)
    document = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": offload}}}
    assert needed_ops(config, document, device) == expected
    assert set(needed_ops(OptimizerConfig(lr=1.0, name="lion"), document, device)) <= {"async_io"}


def test_muon_is_torchs_muon_and_adamw() -> None:
    """Bit for bit on the same gradients, with a rate that changes and weight decay on matrices alone."""
    ours, theirs = (materialised(make("llama")) for _ in range(2))
    config = OptimizerConfig(name="muon", lr=1e-2, weight_decay=0.1)
    optimizer = build_optimizer(parameter_groups(ours, config), config, device=CPU, offloaded=False)
    layers = [p for name, p in theirs.named_parameters() if ".layers." in name and p.ndim == 2]
    matrices = [p for name, p in theirs.named_parameters() if ".layers." not in name and p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    plain = [
        torch.optim.Muon(layers, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(matrices, weight_decay=0.1, betas=config.betas, eps=config.eps),
        torch.optim.AdamW(vectors, weight_decay=0.0, betas=config.betas, eps=config.eps),
    ]
    for step in range(3):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for one in (optimizer, *plain):
            for group in one.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    kinds = {frozenset(state) for state in optimizer.state.values()}
    assert kinds == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}


def materialised(model: Any) -> Any:
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    return model
