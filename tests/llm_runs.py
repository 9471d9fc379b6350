"""Short real runs of tiny decoder-only models: the run file, its conversations, what is left of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.state import CheckpointTensors
from tests.pairs import PAIRS
from tests.runs import SHARD_ALL, with_changes

PRESETS = ("zero0", "zero1", "zero2", "zero3")
Q4 = {"bits": 4, "type": "nf4"}


def write_talks(path: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> str:
    """Prompts and completions as a file of data.format prompt."""
    rows = [{"prompt": source, "completion": target} for source, target in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def llm_run(directory: Path, model: Path, *, name: str, preset: str = "zero0", **changes: Any) -> dict[str, Any]:
    """A run file (as a dict) of 12 steps on the pairs as conversations; `changes` are dotted keys written with `__`."""
    run: dict[str, Any] = {
        "name": name,
        "output_dir": str(directory),
        "task": "causal_lm",
        "model": {"path": str(model)},
        "data": {
            "format": "prompt",
            "train": [{"path": write_talks(directory / "talks.jsonl")}],
            "max_length": 256,
        },
        "batch": {"tokens_per_step": 640, "max_tokens_per_device": 256},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.01},
        "schedule": {"name": "linear", "warmup_steps": 3, "steps": 12},
        "deepspeed": {"preset": preset, "overrides": SHARD_ALL if preset == "zero3" else {}},
        "evaluation": None,
        "monitor": {"tensorboard": False},
    }
    return with_changes(run, changes)


def evaluations_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of scored sets, in order."""
    path = Path(run["output_dir"]) / run["name"] / "metrics.jsonl"
    return [record for record in map(json.loads, path.read_text().splitlines()) if record["event"] == "evaluation"]


def last_checkpoint(run: dict[str, Any]) -> Path:
    directory: Path = max((Path(run["output_dir"]) / run["name"] / "checkpoints").glob("step-*"))
    return directory


def weights_of(run: dict[str, Any]) -> dict[str, Any]:
    """The trained parameters at the end of a run, by name."""
    tensors = CheckpointTensors(last_checkpoint(run))
    return {name: tensors.whole(name) for name in tensors.names()}


def conversation(tokenizer: Any, talk: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Token ids [T] of a row, and its labels for transformers: the answer and its <|im_end|>, not the line break after.

    The chat template of tests.tiny_llm is rendered by transformers, not by harness.
    """
    turns = [{"role": "user", "content": talk["prompt"]}, {"role": "assistant", "content": talk["completion"]}]
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    return torch.tensor(ids), torch.tensor([-100] * len(prompt) + ids[len(prompt) : -1] + [-100])
