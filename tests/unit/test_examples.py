"""Every example: its run file is right, its plan has the numbers of the real model, its languages exist.

The models are stood in for by their real config.json sizes; no weights are needed. That the published parameter counts
belong to these sizes is checked on modules without memory.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig

from harness.cli.main import main
from harness.config.load import load_run_config
from harness.config.schema import DataConfig, DataSource, RunConfig
from harness.models.load import AUTO_MODELS
from harness.models.tokenizer import MBART50_CODES, MBART_CODES, NLLB_CODES
from tests.pairs import PAIRS
from tests.tiny_llm import CHATML, train_llm_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_FILES = sorted(EXAMPLES.rglob("*.yaml"))
NUM_DEVICES = 8
GIB = 2**30

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


LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA2_7B = {
    **LLAMA3_8B,
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
BERT_BASE = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
ROBERTA_BASE = {
    **BERT_BASE,
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}


class RealSize(NamedTuple):
    """An example's model and, by hand, what its plan on 8 devices must say. `trained`: None for all parameters."""

    config: dict[str, Any]
    num_parameters: int
    least_micro_steps: int
    total_tokens: int | None
    languages: set[str]
    trained: int | None = None
    devices: int = 8
    nodes: int = 1
    base: str = "bfloat16"


def lora(rank: int, layers: int, sizes: list[tuple[int, int]]) -> int:
    """Parameters of LoRA in linear layers of these (outputs, inputs) per transformer layer."""
    return layers * rank * sum(outputs + inputs for outputs, inputs in sizes)


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
    "llama3-8b-qlora": RealSize(
        LLAMA3_8B, 8_030_261_248, 4, 8192 * 1875, set(), devices=1, base="4-bit base",
        trained=lora(64, 32, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]),
    ),
    "llama3-70b-qlora-zero3": RealSize(
        LLAMA3_70B, 70_553_706_496, 1, 16384 * 1875, set(), nodes=2, base="4-bit base",
        trained=lora(64, 80, [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]),
    ),
    "nllb-3.3b-lora": RealSize(
        {"model_type": "m2m_100", "vocab_size": 256206, **LARGE, **BILLIONS},
        3_344_863_232, 16, 16000 * 10000, set(NLLB_CODES), devices=1,
        trained=lora(16, 24, [(2048, 2048)] * 12 + [(8192, 2048), (2048, 8192)] * 2),
    ),
    "alma-7b": RealSize(LLAMA2_7B, 6_738_415_616, 1, None, set()),
    # 109,482,240 and 124,645,632 without a head, as published; RoBERTa's pooler makes way for a head of its own.
    "bert-classification": RealSize(BERT_BASE, 109_482_240 + 2 * 769, 1, None, set()),
    "graphcodebert-defects": RealSize(ROBERTA_BASE, 124_645_632 + 2 * 769, 1, None, set()),
}  # fmt: skip


NEW_TASKS = [
    "llama3-8b-qlora", "llama3-70b-qlora-zero3", "nllb-3.3b-lora", "alma-7b", "bert-classification",
    "graphcodebert-defects",
]  # fmt: skip


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
    command = ["plan", str(EXAMPLES / f"{name}.yaml"), f"model.path={tmp_path}", "--accelerator", "cuda"]
    command += ["--devices", str(real.devices), "--nodes", str(real.nodes), "--device-memory", "80GiB"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == real.num_parameters
    assert plan["num_trained"] == (real.trained or real.num_parameters)
    assert plan["warnings"] == []
    assert plan["batches"]["least_micro_steps"] == real.least_micro_steps
    assert plan["batches"]["total_tokens"] == real.total_tokens
    assert plan["recommended"] is not None, "an 80 GiB device is enough for every example"

    assert main(command) == 0
    text = capsys.readouterr().out
    share = f", {real.trained:,} trained ({real.trained / real.num_parameters:.2%})" if real.trained else ""
    assert f"{real.num_parameters:,} parameters{share}, {real.base}" in text
    assert f": {real.least_micro_steps} micro-steps per step or more" in text
    if real.total_tokens is not None:
        assert f"{real.total_tokens:,} tokens; epochs follow from the data" in text


@pytest.mark.parametrize("name", REAL_SIZES)
def test_the_published_parameter_count_is_that_of_the_real_modules(name: str) -> None:
    real = REAL_SIZES[name]
    sizes = {key: value for key, value in real.config.items() if key != "model_type"}
    task = load_run_config(EXAMPLES / f"{name}.yaml", [], accelerator="cuda").task
    with torch.device("meta"):
        model = AUTO_MODELS[task].from_config(AutoConfig.for_model(real.config["model_type"], **sizes))
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


def write_rows(path: Path) -> Path:
    """Rows with the columns of every format and of every example."""
    rows = []
    for number, (source, target) in enumerate(PAIRS):
        turns = [{"role": "user", "content": source}, {"role": "assistant", "content": target}]
        row = {"source": source, "target": number % 2 if "func" in path.stem else target, "messages": turns}
        row |= {"prompt": source, "completion": target, "sentence1": source, "sentence2": target, "func": source}
        rows.append(row | {"label": number % 2})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NEW_TASKS)
def test_an_example_passes_check_with_a_model_of_real_size(
    name: str, tiny_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is a config.json and a small tokeniser; nothing of its weights is needed."""
    real, path = REAL_SIZES[name], EXAMPLES / f"{name}.yaml"
    directory = tmp_path / "model"
    if real.config["model_type"] == "m2m_100":
        shutil.copytree(tiny_models["nllb"], directory, ignore=shutil.ignore_patterns("*.safetensors"))
        ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    else:
        tokenizer = train_llm_tokenizer(CHATML if "messages" in path.read_text(encoding="utf-8") else None)
        tokenizer.save_pretrained(directory)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    (directory / "config.json").write_text(json.dumps(real.config | ids), encoding="utf-8")
    rows = write_rows(tmp_path / ("func.jsonl" if "graphcodebert" in name else "rows.jsonl"))
    overrides = ["model.path=null", f"model.config={directory}", f"output_dir={tmp_path}"]
    overrides += [f"data.train=[{{path: {rows}}}]", f"data.validation={rows}", "data.test=null"]
    if real.languages:
        overrides.append("data.target_language=deu_Latn")
    assert main(["check", str(path), *overrides]) == 0
    said = capsys.readouterr().out
    assert f"{real.num_parameters:,} parameters, random weights" in said
    assert f"train       {len(PAIRS)} rows read, {len(PAIRS)} kept" in said


@pytest.mark.parametrize(
    ("name", "overrides", "memory"),
    [
        ("llama3-8b-qlora", [], 24),
        ("llama3-70b-qlora-zero3", [], 24),
        ("nllb-3.3b-lora", [], 24),
        ("nllb-3.3b-lora", ["model.quantization={bits: 4}"], 12),
        ("alma-7b", [], 80),
    ],
)
def test_an_example_fits_the_devices_it_is_for(
    name: str, overrides: list[str], memory: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own preset, not only the recommended one, leaves a third of the memory to activations."""
    real = REAL_SIZES[name]
    (tmp_path / "config.json").write_text(json.dumps(real.config), encoding="utf-8")
    command = ["plan", str(EXAMPLES / f"{name}.yaml"), f"model.path={tmp_path}", *overrides, "--accelerator", "cuda"]
    assert main([*command, "--devices", str(real.devices), "--nodes", str(real.nodes), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(plan["memory"]["device"].values()) + 2 * plan["logits_bytes"] < 2 / 3 * memory * GIB


def test_quantised_nllb_has_the_weights_that_its_remark_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, path = REAL_SIZES["nllb-3.3b-lora"], EXAMPLES / "nllb-3.3b-lora.yaml"
    (tmp_path / "config.json").write_text(json.dumps(real.config), encoding="utf-8")
    gib = []
    for more in (["model.quantization={bits: 4}"], []):
        assert main(["plan", str(path), f"model.path={tmp_path}", *more, "--accelerator", "cuda", "--json"]) == 0
        device = json.loads(capsys.readouterr().out)["memory"]["device"]
        gib.append((device["frozen_weights"] + device.get("quantized_weights", 0)) / GIB)
    remark = re.search(r"(\S+) GiB of weights instead of (\S+):", path.read_text(encoding="utf-8"))
    assert remark
    assert [f"{size:.1f}" for size in gib] == list(remark.groups())


@pytest.mark.parametrize(
    ("name", "lr", "dropout"), [("llama3-8b-qlora", 2e-4, 0.1), ("llama3-70b-qlora-zero3", 1e-4, 0.05)]
)
def test_the_qlora_recipes_are_the_published_ones(name: str, lr: float, dropout: float) -> None:
    """finetune_guanaco_7b.sh and finetune_guanaco_65b.sh of github.com/artidoro/qlora."""
    config = load_run_config(EXAMPLES / f"{name}.yaml", [], accelerator="cuda")
    adapter, quantization, optimizer = config.adapter, config.model.quantization, config.optimizer
    assert adapter is not None
    assert quantization is not None
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.dropout) == ("lora", 64, 16.0, dropout)
    assert (quantization.bits, quantization.type, quantization.double) == (4, "nf4", True)
    assert (optimizer.lr, optimizer.betas[1], optimizer.weight_decay, optimizer.clip_norm) == (lr, 0.999, 0.0, 0.3)
    assert (config.schedule.name, config.schedule.steps) == ("constant", 1875)


def test_the_alma_recipe_is_the_published_one_with_and_without_lora() -> None:
    """runs/parallel_ft.sh and parallel_ft_lora.sh of github.com/fe1ixxu/ALMA."""
    path = EXAMPLES / "alma-7b.yaml"
    config = load_run_config(path, [], accelerator="cuda")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.schedule.name) == (2e-5, 0.01, "inverse_sqrt")
    assert config.evaluation is not None
    assert (config.evaluation.beam_size, config.evaluation.max_target_length) == (5, 256)
    remark = re.search(r"^# adapter: (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert remark
    adapted = load_run_config(path, [f"adapter={remark[1]}", "optimizer.lr=2e-3"], accelerator="cuda").adapter
    assert adapted is not None
    assert (adapted.rank, adapted.alpha, adapted.targets) == (16, 32.0, ["down_proj"])


def test_the_pretraining_model_is_the_quickstarts_base(capsys: pytest.CaptureFixture[str]) -> None:
    """8.5 M parameters, as the remark in quickstart.yaml says."""
    command = ["plan", str(EXAMPLES / "pretrain" / "pretrain.yaml"), f"model.config={EXAMPLES / 'pretrain'}"]
    assert main([*command, "--accelerator", "cpu", "--devices", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == 8_501_504
    assert plan["batches"]["least_micro_steps"] == 1
