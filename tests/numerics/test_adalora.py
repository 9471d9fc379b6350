"""AdaLoRA under ZeRO: the same values become zero, and the same weights come out, as with PEFT's own allocator on one
process; a run that was broken off goes on with what it had learnt of the importances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.config.schema import RunConfig
from harness.models.assemble import assemble
from tests.adalora_worker import BROKEN_OFF_AT, NUM_STEPS, NUM_TARGETS, loss_sum, rows_of_step
from tests.llm_runs import llm_run
from tests.runs import run_ranks
from tests.tiny_llm import make_tiny_llm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = Path(__file__).parent.parent / "adalora_worker.py"
PRESETS = ("zero0", "zero1", "zero2", "zero3")
RESUMED = ("resumed-zero0", "resumed-zero3")
NUM_TRIPLETS, NUM_KEPT = 14 * 6, 14 * 4  # of 14 matrices: rank 6 at the start, 4 at the end


class Result(NamedTuple):
    num_zeros: list[int]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("adalora")
    model = make_tiny_llm(directory / "model")
    adapter = {"method": "adalora", "rank": 4}
    optimizer = {"lr": 1e-2, "weight_decay": 0.0, "clip_norm": None}
    found = {
        name: llm_run(
            directory, model, name=name, preset=name.removeprefix("resumed-"), adapter=adapter, optimizer=optimizer
        )
        for name in (*PRESETS, *RESUMED)
    }
    run_ranks(list(found.values()), world_size=2, worker=WORKER, timeout_s=800)
    return found


@pytest.fixture(scope="module")
def reference(runs: dict[str, dict[str, Any]]) -> Result:
    """PEFT as its documentation says, with the penalty that its forward pass adds to a loss of its own."""
    config = RunConfig.model_validate(runs["zero0"])
    model, _, _ = assemble(config, step=0, total_steps=NUM_STEPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    num_zeros = []
    for step in range(1, NUM_STEPS + 1):
        optimizer.zero_grad()
        for ids_BT in rows_of_step(step).flatten(0, 1):
            (loss_sum(model, ids_BT) / NUM_TARGETS).backward()
        (model.peft_config["default"].orth_reg_weight * penalty(trained)).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        num_zeros.append(sum(int((p == 0).sum()) for name, p in trained.items() if ".lora_E." in name))
    return Result(num_zeros, {name: p.detach() for name, p in trained.items()})


def penalty(trained: dict[str, Any]) -> Tensor:
    products = [p @ p.T for name, p in trained.items() if ".lora_A." in name]
    products += [p.T @ p for name, p in trained.items() if ".lora_B." in name]
    return torch.stack([torch.norm(product - torch.eye(len(product))) for product in products]).mean()


def result_of(run: dict[str, Any], rank: int = 0) -> Result:
    directory = Path(run["output_dir"]) / run["name"]
    result = json.loads((directory / f"result-{rank}.json").read_text())
    return Result(result["num_zeros"], load_file(directory / "weights.safetensors"))


@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_are_those_of_peft(preset: str, runs: dict[str, dict[str, Any]], reference: Result) -> None:
    found = result_of(runs[preset])
    assert found.num_zeros == result_of(runs[preset], rank=1).num_zeros == reference.num_zeros
    assert found.num_zeros[0] == 0
    assert found.num_zeros[-1] == NUM_TRIPLETS - NUM_KEPT
    assert found.weights.keys() == reference.weights.keys()
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, reference.weights[name], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_importances_survive_a_restart(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """Broken off while the budget falls."""
    broken, whole = result_of(runs[name]), result_of(runs[name.removeprefix("resumed-")])
    assert 0 < whole.num_zeros[BROKEN_OFF_AT - 1] < whole.num_zeros[-1]
    assert broken.num_zeros == whole.num_zeros
    assert all(torch.equal(broken.weights[key], weight) for key, weight in whole.weights.items())
