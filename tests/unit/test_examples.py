"""Every example: its run file is right, its plan has the numbers of the real model, its languages exist.

The models are stood in for by their real config.json sizes; no weights are needed. That the published parameter counts
belong to these sizes is checked on modules without memory.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from harness.cli.main import main
from harness.config.load import load_run_config
from harness.config.schema import DataConfig, DataSource, RunConfig
from harness.models.tokenizer import MBART50_CODES, MBART_CODES, NLLB_CODES

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_FILES = sorted(EXAMPLES.rglob("*.yaml"))
NUM_DEVICES = 8

LARGE: dict[str, Any] = {
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "scale_embedding": True,
}
BILLIONS = {
    "encoder_layers": 24,
    "decoder_layers": 24,
    "d_model": 2048,
    "encoder_ffn_dim": 8192,
    "decoder_ffn_dim": 8192,
}
SMALL = {
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "max_position_embeddings": 512,
    "scale_embedding": True,
    "static_position_embeddings": True,
    "pad_token_id": 58100,
    "decoder_start_token_id": 58100,
    "eos_token_id": 0,
}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}


class RealSize(NamedTuple):
    """An example's model and, by hand, what its plan on 8 devices must say."""

    config: dict[str, Any]
    num_parameters: int
    least_micro_steps: int
    total_tokens: int | None
    languages: set[str]


REAL_SIZES = {
    "mbart-large-cc25-en-ro": RealSize(
        {"model_type": "mbart", "vocab_size": 250027, **LARGE}, 610_851_840, 2, 16384 * 40000, set(MBART_CODES)
    ),
    "mbart50-many-to-many": RealSize(
        {"model_type": "mbart", "vocab_size": 250054, **LARGE}, 610_879_488, 2, 16384 * 40000, set(MBART50_CODES)
    ),
    "nllb-600m": RealSize(
        {"model_type": "m2m_100", "vocab_size": 256206, **LARGE}, 615_073_792, 1, 16000 * 10000, set(NLLB_CODES)
    ),
    "nllb-3.3b-zero3": RealSize(
        {"model_type": "m2m_100", "vocab_size": 256206, **LARGE, **BILLIONS},
        3_344_863_232,
        2,
        16000 * 50,
        set(NLLB_CODES),
    ),
    "t5-base": RealSize({"model_type": "t5", **T5_BASE}, 222_903_552, 1, 65536 * 20000, set()),
    # The 74.4 M of the hub count two tables of 512 fixed positions, which are not trained.
    "marian-opus": RealSize(
        {"model_type": "marian", "vocab_size": 58101, **SMALL}, 74_410_496 - 2 * 512 * 512, 1, None, set()
    ),
}


def sources_of(config: RunConfig) -> list[DataSource]:
    sets = [DataSource(path=s) if isinstance(s, str) else s for s in (config.data.validation, config.data.test) if s]
    return [*config.data.train, *sets]


def test_real_size_examples_are_all_here() -> None:
    assert set(REAL_SIZES) | {"quickstart"} <= {path.stem for path in RUN_FILES}


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_an_example_is_a_right_run_file(path: Path, accelerator: Any) -> None:
    config = load_run_config(path, [], accelerator=accelerator)
    shipped = [s.path for s in sources_of(config) if s.path and s.path.startswith("examples/")]
    assert all((EXAMPLES.parent / name).is_file() for name in shipped)
    assert path.read_text(encoding="utf-8").startswith("# "), "an example begins with what it is"


@pytest.mark.parametrize("name", REAL_SIZES)
def test_a_plan_has_the_numbers_of_the_real_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = REAL_SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(real.config), encoding="utf-8")
    command = ["plan", str(EXAMPLES / f"{name}.yaml"), f"model.path={tmp_path}", "--devices", str(NUM_DEVICES)]
    command += ["--accelerator", "cuda", "--device-memory", "80GiB"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == real.num_parameters
    assert plan["batches"]["least_micro_steps"] == real.least_micro_steps
    assert plan["batches"]["total_tokens"] == real.total_tokens
    assert plan["recommended"] is not None, "an 80 GiB device is enough for every example"

    assert main(command) == 0
    text = capsys.readouterr().out
    assert f"{real.num_parameters:,} parameters, bfloat16" in text
    assert f": {real.least_micro_steps} micro-steps per step or more" in text
    if real.total_tokens is not None:
        assert f"{real.total_tokens:,} tokens; epochs follow from the data" in text


@pytest.mark.parametrize("name", REAL_SIZES)
def test_the_published_parameter_count_is_that_of_the_real_modules(name: str) -> None:
    real = REAL_SIZES[name]
    sizes = {key: value for key, value in real.config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(real.config["model_type"], **sizes))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == real.num_parameters


@pytest.mark.parametrize("name", REAL_SIZES)
def test_the_languages_are_the_models(name: str) -> None:
    known = REAL_SIZES[name].languages
    config = load_run_config(EXAMPLES / f"{name}.yaml", [], accelerator="cuda")
    places: list[DataConfig | DataSource] = [config.data, *sources_of(config)]
    named = {code for place in places for code in (place.source_language, place.target_language) if code}
    assert named <= known
    assert bool(named) == bool(known)


def test_zero3_keeps_18_bytes_per_parameter_in_host_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the file's remark says: bfloat16 weights, and gradients, master weights and two moments in float32."""
    real = REAL_SIZES["nllb-3.3b-zero3"]
    (tmp_path / "config.json").write_text(json.dumps(real.config), encoding="utf-8")
    path = EXAMPLES / "nllb-3.3b-zero3.yaml"
    assert main(["plan", str(path), f"model.path={tmp_path}", "--devices", "8", "--accelerator", "cuda", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert sum(memory["device"].values()) == 0
    total = NUM_DEVICES * sum(memory["host"].values())
    assert total == pytest.approx(18 * real.num_parameters, rel=1e-6)
    remark = re.search(r"18 bytes per parameter, (\d+) GiB", path.read_text(encoding="utf-8"))
    assert remark
    assert round(total / 2**30) == int(remark[1])


def test_the_mbart_recipe_is_the_published_one() -> None:
    """fairseq/examples/mbart/README.md, "Finetune on EN-RO"; fairseq's default is not to clip."""
    config = load_run_config(EXAMPLES / "mbart-large-cc25-en-ro.yaml", [], accelerator="cuda")
    optimizer, schedule = config.optimizer, config.schedule
    assert (config.loss.label_smoothing, config.loss.convention) == (0.2, "fairseq")
    assert (config.model.dropout, config.model.attention_dropout) == (0.3, 0.1)
    assert (optimizer.name, optimizer.lr, optimizer.betas, optimizer.eps) == ("adamw", 3e-5, (0.9, 0.98), 1e-6)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.0, None)
    assert (schedule.name, schedule.warmup_steps, schedule.steps) == ("polynomial", 2500, 40000)
    assert (schedule.power, schedule.min_lr) == (1.0, 0.0)
    assert config.batch.tokens_per_step == 1024 * 2 * NUM_DEVICES


def test_the_pretraining_model_is_the_quickstarts_base(capsys: pytest.CaptureFixture[str]) -> None:
    """8.5 M parameters, as the remark in quickstart.yaml says."""
    command = ["plan", str(EXAMPLES / "pretrain" / "pretrain.yaml"), f"model.config={EXAMPLES / 'pretrain'}"]
    assert main([*command, "--accelerator", "cpu", "--devices", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == 8_501_504
    assert plan["batches"]["least_micro_steps"] == 1
