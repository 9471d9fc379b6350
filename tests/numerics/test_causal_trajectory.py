"""A causal language model learns the same on every layout, packed or not, and what plain transformers learns.

The reference uses nothing of harness for tokens, masks, model, loss, clipping, optimizer or schedule: one process, the
rows of a global batch in one padded forward pass with the labels and the loss of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config.load import load_run_config
from harness.data.loader import TrainingSteps
from harness.training.prepare import build_task, prepare_sets
from tests.llm_runs import PRESETS, conversation, llm_run, weights_of
from tests.pairs import PAIRS
from tests.runs import run_ranks, steps_of, write_run
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow

NUM_STEPS, WARMUP_STEPS, LR, WEIGHT_DECAY, CLIP_NORM = 12, 3, 2e-3, 0.01, 2.0
TOKENS_PER_DEVICE = (256, 512)
PACKING = (True, False)  # each has its own global batches: only rows by themselves are put with rows of their length
WHOLE_EPOCH = 4000  # tokens: a step is all rows, so its rows do not depend on their order


class Runs(NamedTuple):
    """By `data.packing`: the runs of 1 and 2 ranks x ZeRO stages x sizes of a micro-batch, and one of WHOLE_EPOCH."""

    layouts: dict[bool, list[dict[str, Any]]]
    whole: dict[bool, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("causal")
    model = make_tiny_llm(directory / "model")

    def run_of(name: str, preset: str, packing: bool, tokens: int, **changes: Any) -> dict[str, Any]:
        return llm_run(
            directory, model, name=name, preset=preset, data__packing=packing, batch__max_tokens_per_device=tokens,
            optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
            schedule={"name": "linear", "warmup_steps": WARMUP_STEPS, "steps": NUM_STEPS}, **changes,
        )  # fmt: skip

    layouts = {
        (world_size, packing): [
            run_of(f"w{world_size}-{preset}-{packing}-{tokens}", preset, packing, tokens)
            for preset in PRESETS
            for tokens in TOKENS_PER_DEVICE
        ]
        for world_size in (1, 2)
        for packing in PACKING
    }
    whole = {
        packing: run_of(f"whole-{packing}", "zero2", packing, 512, batch__tokens_per_step=WHOLE_EPOCH)
        for packing in PACKING
    }
    run_ranks([*layouts[1, True], *layouts[1, False]], world_size=1, timeout_s=600.0)
    run_ranks([*layouts[2, True], *layouts[2, False], *whole.values()], world_size=2, timeout_s=600.0)
    return Runs({packing: layouts[1, packing] + layouts[2, packing] for packing in PACKING}, whole)


def assert_same_steps(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], message: str) -> None:
    assert [step["row_digest"] for step in ours] == [step["row_digest"] for step in theirs], message
    for key in ("loss", "nll", "grad_norm"):
        assert [step[key] for step in ours] == pytest.approx([step[key] for step in theirs], rel=1e-5), (message, key)


@pytest.mark.parametrize("packing", PACKING)
def test_steps_do_not_depend_on_the_layout(packing: bool, runs: Runs) -> None:
    reference = steps_of(runs.layouts[packing][0])
    assert len(reference) == NUM_STEPS
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.4
    for run in runs.layouts[packing]:
        assert_same_steps(steps_of(run), reference, run["name"])


def test_the_same_rows_packed_and_alone_are_the_same_step(runs: Runs) -> None:
    packed, alone = (steps_of(runs.whole[packing]) for packing in PACKING)
    assert {step["rows"] for step in [*packed, *alone]} == {len(PAIRS)}
    assert_same_steps(packed, alone, "packed and alone")
    assert packed[0]["padding_fraction"] != alone[0]["padding_fraction"], "the micro-batches were others"


@pytest.mark.parametrize("packing", PACKING)
def test_every_step_is_that_of_plain_transformers(packing: bool, runs: Runs) -> None:
    run = runs.layouts[packing][0]
    steps, (losses, grad_norms, weights) = steps_of(run), plain_training(run)
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [step["nll"] for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(grad_norms, rel=1e-5)
    assert max(grad_norms) > CLIP_NORM, "clipping took part"
    ours = weights_of(run)
    assert ours.keys() == weights.keys()
    # A weight travels about NUM_STEPS x LR / 2 = 1e-2; what differs is the order of sums.
    assert max(float((ours[name] - weights[name]).abs().max()) for name in weights) < 2e-6


def plain_training(run: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Loss and gradient norm of every step, and the final weights."""
    model = AutoModelForCausalLM.from_pretrained(run["model"]["path"]).train()
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LR, betas=(0.9, 0.98), eps=1e-6,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    losses, grad_norms = [], []
    for batch in global_batches(run):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, grad_norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


def lr_factor(num_done: int) -> float:
    step = num_done + 1
    return min(step / WARMUP_STEPS, (NUM_STEPS - step) / (NUM_STEPS - WARMUP_STEPS))


def global_batches(run: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """The conversations of each step as one padded batch; which rows a step has is asked of harness."""
    tokenizer = AutoTokenizer.from_pretrained(run["model"]["path"])
    talks = [json.loads(line) for line in Path(run["data"]["train"][0]["path"]).read_text().splitlines()]
    config = load_run_config(write_run(run), [])
    rows = prepare_sets(config, build_task(config))["train"].rows
    steps = TrainingSteps(rows, data=config.data, batch=config.batch, seed=config.seed, world_size=1).starting_at(1)
    for _ in range(NUM_STEPS):
        ids, labels = zip(*(conversation(tokenizer, talks[row]) for row in next(steps).rows), strict=True)
        yield {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
