"""A causal language model learns the same on every layout, packed or not, and what plain PyTorch and transformers learn.

The reference uses nothing of harness for tokens, masks, model, loss, clipping, optimizer or schedule: one process, the
rows of a global batch in one padded forward pass with the labels and the loss of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config.load import load_run_config
from harness.data.loader import TrainingSteps
from harness.training.prepare import build_task, prepare_sets
from tests.llm_runs import PRESETS, llm_run, weights_of
from tests.runs import run_ranks, steps_of, write_run
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow

NUM_STEPS, WARMUP_STEPS, LR, WEIGHT_DECAY, CLIP_NORM = 12, 3, 2e-3, 0.01, 2.0
TOKENS_PER_DEVICE = (256, 512)
WHOLE_EPOCH = 4000  # tokens: a step is all rows, so its rows do not depend on their order

Runs = dict[bool, list[dict[str, Any]]]  # packing -> the run of each layout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """1 and 2 ranks x ZeRO stages x sizes of a micro-batch."""
    directory = tmp_path_factory.mktemp("causal")
    model = make_tiny_llm(directory / "model")
    found: Runs = {True: [], False: []}
    for world_size in (1, 2):
        group = [
            (packing, make_run(directory, model, f"w{world_size}-{preset}-{tokens}-{packing}", preset, tokens, packing))
            for packing in found
            for preset in PRESETS
            for tokens in TOKENS_PER_DEVICE
        ]
        run_ranks([run for _, run in group], world_size)
        for packing, run in group:
            found[packing].append(run)
    return found


def make_run(
    directory: Path, model: Path, name: str, preset: str, tokens: int, packing: bool, **changes: Any
) -> dict[str, Any]:
    return llm_run(
        directory, model, name=name, preset=preset, data__packing=packing, batch__max_tokens_per_device=tokens,
        optimizer={"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM},
        schedule={"name": "linear", "warmup_steps": WARMUP_STEPS, "steps": NUM_STEPS}, **changes,
    )  # fmt: skip


def assert_same_steps(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], message: str) -> None:
    assert [step["row_digest"] for step in ours] == [step["row_digest"] for step in theirs], message
    for key in ("loss", "nll", "grad_norm"):
        assert [step[key] for step in ours] == pytest.approx([step[key] for step in theirs], rel=1e-5), (message, key)


@pytest.mark.parametrize("packing", [True, False])
def test_steps_do_not_depend_on_the_layout(packing: bool, runs: Runs) -> None:
    reference = steps_of(runs[packing][0])
    assert len(reference) == NUM_STEPS
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.4
    for run in runs[packing]:
        assert_same_steps(steps_of(run), reference, run["name"])


def test_packs_have_less_padding_and_other_global_batches(runs: Runs) -> None:
    packed, alone = (steps_of(runs[packing][0]) for packing in (True, False))
    assert packed[0]["row_digest"] != alone[0]["row_digest"]
    assert max(step["padding_fraction"] for step in alone) > 0.0
    rows = [step["rows"] for step in packed]
    assert sum(step["rows"] for step in packed if step["epoch"] == 0) == 42, rows


def test_the_same_rows_packed_and_alone_are_the_same_step(tmp_path: Path) -> None:
    model = make_tiny_llm(tmp_path / "model")
    found = [
        make_run(tmp_path, model, f"whole-{packing}", "zero2", 512, packing, batch__tokens_per_step=WHOLE_EPOCH)
        for packing in (True, False)
    ]
    run_ranks(found, world_size=2)
    packed, alone = map(steps_of, found)
    assert len({step["row_digest"] for step in packed}) == 1
    assert_same_steps(packed, alone, "packed and alone")
    assert packed[0]["padding_fraction"] != alone[0]["padding_fraction"]


@pytest.mark.parametrize("packing", [True, False])
def test_every_step_is_that_of_plain_transformers(packing: bool, runs: Runs) -> None:
    run = runs[packing][0]
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


def conversation(tokenizer: Any, talk: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Token ids, and the labels of transformers: the answer with its <|im_end|>, without the line break after that."""
    turns = [{"role": "user", "content": talk["prompt"]}, {"role": "assistant", "content": talk["completion"]}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    return torch.tensor(ids), torch.tensor([-100] * len(prompt) + ids[len(prompt) : -1] + [-100])
