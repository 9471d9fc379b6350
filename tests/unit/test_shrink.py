"""The narrow model and the few rows of a rehearsal stand for the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from harness.config.schema import DataSource, ModelConfig, RunConfig, Task
from harness.data.sources import read_rows
from harness.models.assemble import assemble
from harness.models.load import load_model
from harness.models.shrink import shrink_model
from harness.training.prepare import build_task, with_labels
from harness.training.rehearsal import STEPS, small_run
from tests.runs import tiny_run
from tests.tiny import LANGUAGES, make_tiny_model
from tests.tiny_classifiers import make_tiny_bert
from tests.tiny_llm import make_tiny_llm

SHAPE_LLM = {"hidden_size": 160, "num_attention_heads": 10, "num_key_value_heads": 5}


def make_wide(family: str, directory: Path) -> Path:
    """A random model of a family, wider than its copy will be."""
    if family in LANGUAGES:
        return make_tiny_model(family, directory, d_model=160)
    shape = {"n_embd": 160, "n_head": 10} if family == "gpt2" else SHAPE_LLM
    return make_tiny_llm(directory, family, **shape)


@pytest.mark.parametrize("family", ["mbart", "m2m100", "marian", "t5", "llama", "gpt2", "qwen3", "phi3"])
def test_copy_is_narrow_and_otherwise_the_same(family: str, tmp_path: Path) -> None:
    task: Task = "translation" if family in LANGUAGES else "causal_lm"
    wide, narrow = make_wide(family, tmp_path / "wide"), tmp_path / "narrow"
    shrink_model(str(wide), narrow, task, seed=1)
    before, after = (AutoConfig.from_pretrained(directory) for directory in (wide, narrow))
    assert (before.hidden_size, after.hidden_size) == (160, 64)
    assert before.num_hidden_layers == after.num_hidden_layers
    assert before.vocab_size == after.vocab_size
    tokenizer_files = [
        file.name for file in wide.iterdir() if file.suffix != ".safetensors" and "config" not in file.name
    ]
    assert tokenizer_files
    assert all((narrow / name).read_bytes() == (wide / name).read_bytes() for name in tokenizer_files)
    model = load_model(ModelConfig(path=str(narrow)), 1, task=task)
    names = {name for name, _ in load_model(ModelConfig(path=str(wide)), 1, task=task).named_parameters()}
    assert {name for name, _ in model.named_parameters()} == names


def test_model_that_is_narrow_keeps_its_shape(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    shrink_model(str(tiny_models["t5"]), tmp_path, "translation", seed=1)
    assert AutoConfig.from_pretrained(tmp_path).d_model == 32


def classification(tmp_path: Path) -> dict[str, Any]:
    rows = [{"text": f"row {number}", "label": "yes" if number % 2 else "no"} for number in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny_run(tmp_path, make_tiny_bert(tmp_path / "base"), name="real", task="classification")
    run["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 60}
    return run


def causal(tmp_path: Path) -> dict[str, Any]:
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 100)
    run = tiny_run(tmp_path, make_tiny_llm(tmp_path / "base", **SHAPE_LLM), name="real", task="causal_lm")
    run["data"] = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 60}
    run["model"] = {"path": run["model"]["path"]}
    return run | {"adapter": {"rank": 64, "targets": r".*layers\.1\..*_proj"}}


def translation(tmp_path: Path) -> dict[str, Any]:
    return tiny_run(tmp_path, make_wide("mbart", tmp_path / "base"), name="real") | {"freeze": {"encoder": "1"}}


@pytest.mark.parametrize("make", [translation, causal, classification])
def test_small_run_is_a_run_of_the_same_kind(make: Any, tmp_path: Path) -> None:
    content = make(tmp_path) | {"slurm": {"nodes": 4, "sweep": {"seed": [1, 2]}, "time": "2-00:00:00"}}
    config = RunConfig.model_validate(content)
    small = small_run(config, tmp_path / "rehearsal", nodes=2)
    assert small.schedule.steps == STEPS
    assert (small.task, small.freeze, small.launch) == (config.task, config.freeze, config.launch)
    assert small.slurm is not None
    assert (small.slurm.nodes, small.slurm.time, small.slurm.sweep) == (2, "00:20:00", {})
    rows, firsts = (
        [row for row, _ in zip(read_rows(one.data.train[0], one.data), range(20), strict=False)]
        for one in (config, small)
    )
    assert [(row.source, row.target, row.messages) for row in rows] == [
        (row.source, row.target, row.messages) for row in firsts
    ]
    assert isinstance(small.data.train[0], DataSource)
    assert build_task(with_labels(small)).tokenizer.get_vocab() == build_task(with_labels(config)).tokenizer.get_vocab()
    assert assemble(with_labels(small), step=0, total_steps=STEPS, device="meta").freezing.trainable_at(1)
