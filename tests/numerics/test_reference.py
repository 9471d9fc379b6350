"""A run computes what twenty lines of plain PyTorch compute over the same global batches.

Nothing of harness is used for the model, the loss, the optimizer, clipping or the schedule of the reference: one
process, one forward pass for a whole global batch, `torch.nn.functional.cross_entropy` and `torch.optim.AdamW`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from harness.checkpoint.state import CheckpointTensors
from harness.config.load import load_run_config
from harness.data.loader import TrainingSteps
from harness.training.prepare import build_task, prepare_sets
from tests.plain import padded_batch
from tests.runs import SHARD_ALL, run_ranks, steps_of, tiny_run, write_run

pytestmark = pytest.mark.slow

PRESETS = ("zero0", "zero1", "zero2", "zero3")
NUM_STEPS, WARMUP_STEPS = 20, 5
LR, WEIGHT_DECAY, SMOOTHING, CLIP_NORM = 1e-3, 0.01, 0.1, 0.5


class Reference(NamedTuple):
    loss: list[float]
    nll: list[float]
    grad_norm: list[float]
    learning_rate: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def runs(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two ranks, four micro-batches a step, one run for each ZeRO stage."""
    directory = tmp_path_factory.mktemp("reference")
    found = {
        preset: tiny_run(
            directory, tiny_models["mbart"], name=preset,
            deepspeed={"preset": preset, "overrides": SHARD_ALL if preset == "zero3" else {}},
            batch__max_tokens_per_device=100,
            loss={"label_smoothing": SMOOTHING, "convention": "torch"},
            optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
            schedule={"name": "linear", "warmup_steps": WARMUP_STEPS, "steps": NUM_STEPS},
        )
        for preset in PRESETS
    }  # fmt: skip
    run_ranks(list(found.values()), world_size=2)
    return found


@pytest.fixture(scope="module")
def reference(runs: dict[str, dict[str, Any]]) -> Reference:
    run = runs["zero0"]
    model = AutoModelForSeq2SeqLM.from_pretrained(run["model"]["path"], dropout=0.0, attention_dropout=0.0)
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    found = Reference([], [], [], [], dict(model.named_parameters()))
    for inputs, labels_BT in global_batches(run):
        logits, labels = model(**inputs).logits.flatten(0, 1), labels_BT.flatten()
        loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        loss.backward()
        found.loss.append(loss.item())
        found.nll.append(F.cross_entropy(logits, labels).item())
        found.grad_norm.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        found.learning_rate.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


def lr_factor(num_done: int) -> float:
    step = num_done + 1
    return min(step / WARMUP_STEPS, (NUM_STEPS - step) / (NUM_STEPS - WARMUP_STEPS))


def global_batches(run: dict[str, Any]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Every step's rows as one padded batch."""
    config = load_run_config(write_run(run), [])
    rows = prepare_sets(config, build_task(config))["train"].rows
    pad = AutoModelForSeq2SeqLM.from_pretrained(run["model"]["path"]).config.pad_token_id
    batches = []
    for step in TrainingSteps(rows, data=config.data, batch=config.batch, seed=config.seed, world_size=1).starting_at(
        1
    ):
        if step.step > NUM_STEPS:
            return batches
        batches.append(padded_batch(rows.take(step.rows), pad))
    raise AssertionError


@pytest.mark.parametrize("preset", PRESETS)
def test_every_step_is_that_of_plain_pytorch(
    preset: str, runs: dict[str, dict[str, Any]], reference: Reference
) -> None:
    steps = steps_of(runs[preset])
    assert len(steps) == NUM_STEPS
    for name in ("loss", "nll", "grad_norm", "learning_rate"):
        assert [step[name] for step in steps] == pytest.approx(getattr(reference, name), rel=1e-5, abs=1e-12), name
    assert max(reference.grad_norm) > CLIP_NORM  # clipping took part


@pytest.mark.parametrize("preset", PRESETS)
def test_the_final_weights_are_those_of_plain_pytorch(
    preset: str, runs: dict[str, dict[str, Any]], reference: Reference
) -> None:
    run = runs[preset]
    directory = Path(run["output_dir"]) / run["name"] / "checkpoints" / f"step-{NUM_STEPS:08d}"
    tensors = CheckpointTensors(directory)
    assert tensors.names() == sorted(reference.weights)
    with torch.no_grad():
        differences = [(tensors.whole(name) - weight).abs().max() for name, weight in reference.weights.items()]
    # Summation order alone: a weight travels about NUM_STEPS x LR / 2 = 1e-2, and AdamW's division by sqrt(v) turns
    # a relative error of a small gradient into the same relative error of an update. Seen: 3.5e-7.
    assert max(differences) < 1e-6
