"""The plan: parameter counts against the real models, memory against the ZeRO papers, JSON there and back."""

from __future__ import annotations

import json
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from harness.config.load import load_run_config
from harness.errors import ConfigError, DataError
from harness.plan.advice import candidates, parse_bytes, shown_bytes
from harness.plan.parameters import model_json, parameter_shapes
from harness.plan.plan import Plan, make_plan
from harness.plan.report import recommended
from harness.plan.zero import Memory, model_states, num_parameters
from tests.run_files import write_run_file

BART: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 40,
}
MARIAN = {**BART, "pad_token_id": 1}
T5: dict[str, Any] = {"vocab_size": 100, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 3}
GATED = {"feed_forward_proj": "gated-gelu"}

MODELS = [
    ("mbart", BART),
    ("mbart", {**BART, "tie_word_embeddings": False}),
    ("mbart", {}),
    ("m2m_100", BART),
    ("m2m_100", {**BART, "tie_word_embeddings": False}),
    ("m2m_100", {}),
    ("marian", MARIAN),
    ("marian", {**MARIAN, "tie_word_embeddings": False}),
    ("marian", {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 77}),
    (
        "marian",
        {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 77, "tie_word_embeddings": False},
    ),
    ("t5", T5),
    ("t5", {**T5, **GATED, "num_decoder_layers": 2}),
    ("t5", {**T5, "tie_word_embeddings": False}),
    ("t5", {}),
    ("mt5", T5),
    ("mt5", {}),
]

P = 1000
SHAPES = Counter({(30, 30): 1, (100,): 1})


@pytest.mark.parametrize(("family", "changes"), MODELS)
def test_parameters_are_those_of_the_real_model(family: str, changes: dict[str, Any]) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForSeq2SeqLM

    config = CONFIG_MAPPING[family](**changes)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    model.tie_weights()
    trainable = [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
    shapes = parameter_shapes({**config.to_dict(), "model_type": family})
    assert sorted(shapes.elements()) == sorted(trainable)


def test_mbart_large_has_the_published_size() -> None:
    large = {**BART, "vocab_size": 250027, "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12}
    large |= {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "max_position_embeddings": 1024}
    assert num_parameters(parameter_shapes({"model_type": "mbart", **large})) == 610_851_840


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "bert"}', '{"model_type": "t5"}', "{}"])
def test_a_wrong_model_json_is_a_data_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError):
        parameter_shapes(model_json(str(tmp_path)) or {})


def test_a_downloaded_hub_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text('{"model_type": "mbart"}')
    assert model_json("org/name") == {"model_type": "mbart"}
    assert model_json("org/other") is None


def states(stage: int, dtype: str, ranks: int, optimizer_on: str = "none", params_on: str = "none") -> Memory:
    zero = {"stage": stage, "offload_optimizer": {"device": optimizer_on}, "offload_param": {"device": params_on}}
    return model_states(SHAPES, deepspeed={"zero_optimization": zero}, dtype=dtype, optimizer="adamw", world_size=ranks)


def total(memory: Memory) -> int:
    return sum(sum(kinds.values()) for kinds in memory.values())


@pytest.mark.parametrize("ranks", [1, 2, 64])
def test_mixed_precision_memory_is_that_of_the_zero_paper(ranks: int) -> None:
    """Figure 1 of Rajbhandari et al. with K = 12: (2 + 2 + K) P, 4 P + K P / N, 2 P + (2 + K) P / N, (4 + K) P / N."""
    k = 12
    expected = [(4 + k) * P, 4 * P + k * P / ranks, 2 * P + (2 + k) * P / ranks, (4 + k) * P / ranks]
    for stage, num_bytes in enumerate(expected):
        assert total(states(stage, "bfloat16", ranks)) == pytest.approx(num_bytes, abs=4 * 4)


def test_float32_memory() -> None:
    """No master copy without ZeRO, one with it: 16 P, and 4 + 4 + (4 + 8) / N at stage 1."""
    assert total(states(0, "float32", 4)) == 16 * P
    assert total(states(1, "float32", 4)) == 8 * P + 12 * P // 4


def test_bfloat16_gradients_summed_in_float32() -> None:
    """The default: 4 P more at stage 1 (the sums), 4 P / N in place of 2 P / N from stage 2 on."""
    for stage, num_bytes in ((1, 2 * P + 4 * P), (2, 4 * P // 4), (3, 4 * P // 4)):
        deepspeed = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
        memory = model_states(SHAPES, deepspeed=deepspeed, dtype="bfloat16", optimizer="adamw", world_size=4)
        assert memory["device"]["gradients"] == num_bytes


def test_offload_moves_states_off_the_device() -> None:
    offloaded = states(2, "bfloat16", 4, optimizer_on="cpu")
    assert offloaded["device"] == {"weights": 2 * P}
    assert offloaded["host"] == {
        "gradients": 4 * P // 4,
        "master_weights": 4 * P // 4,
        "optimizer_states": 8 * P // 4,
    }
    nvme = states(3, "bfloat16", 4, optimizer_on="nvme", params_on="nvme")
    assert nvme["device"] == {}
    assert nvme["nvme"] == {"weights": 2 * P // 4, "master_weights": 4 * P // 4, "optimizer_states": 8 * P // 4}


def test_adafactor_keeps_a_row_and_a_column_per_matrix() -> None:
    memory = model_states(SHAPES, deepspeed={}, dtype="float32", optimizer="adafactor", world_size=1)
    assert memory["device"]["optimizer_states"] == 4 * (30 + 30 + 100)


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "mbart", **BART, "max_position_embeddings": 128}))
    return directory


def test_a_plan_goes_to_json_and_back(tmp_path: Path, model_directory: Path) -> None:
    config = load_run_config(write_run_file(tmp_path), [f"model.path={model_directory}", "early_stopping={}"])
    plan = make_plan(config, world_size=2)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.num_parameters is not None
    assert plan.checkpoint_bytes == 12 * plan.num_parameters
    assert Path(plan.run_dir) == Path.cwd() / "runs" / "enro"


@pytest.mark.parametrize("content", [{}, {"config": {}}, {"config": None, "batches": None}])
def test_what_is_not_a_plan(content: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not a plan"):
        Plan.from_json(content)


@pytest.mark.parametrize(("ranks", "micro_steps"), [(1, 4), (2, 2), (3, 2), (4, 1), (64, 1)])
def test_batch_arithmetic(ranks: int, micro_steps: int, tmp_path: Path) -> None:
    batches = make_plan(load_run_config(write_run_file(tmp_path)), world_size=ranks).batches
    assert batches.least_micro_steps == micro_steps
    assert batches.total_tokens == 100 * 4096


def test_inputs_longer_than_the_model_are_refused(tmp_path: Path, model_directory: Path) -> None:
    path = write_run_file(tmp_path)
    overrides = [f"model.path={model_directory}", "data.max_source_length=129"]
    with pytest.raises(ConfigError, match="129 is more than the 128 positions"):
        make_plan(load_run_config(path, overrides), world_size=1)


def test_nvme_buffers_hold_the_largest_tensor(tmp_path: Path, model_directory: Path) -> None:
    overrides = [f"model.path={model_directory}", "deepspeed={preset: zero3_nvme, nvme_path: /nvme}"]
    plan = make_plan(load_run_config(write_run_file(tmp_path), overrides), world_size=3)
    positions = 128 + 2
    assert plan.deepspeed["zero_optimization"]["offload_param"]["buffer_size"] == ceil(positions * 16 / 3)


def test_the_first_preset_that_fits_is_recommended(tmp_path: Path) -> None:
    config = load_run_config(write_run_file(tmp_path))
    shapes = Counter({(1000, 1000): 600})

    def advice(gib: float | None, ranks: int) -> str | None:
        size = None if gib is None else int(gib * 2**30)
        found = candidates(config, shapes, world_size=ranks, device_bytes=size, logits_bytes=0, on_cpu=False)
        chosen = recommended(found)
        return chosen.preset if chosen else None

    assert [advice(gib, 8) for gib in (80, 8, 4, 2, 0.2)] == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
    assert [advice(gib, 1) for gib in (80, 4)] == ["zero0", "zero2_offload"], "one rank has nothing to divide by"
    assert advice(None, 8) is None


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 * 2**30), ("24GB", 24 * 10**9), ("24g", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


def test_shown_sizes() -> None:
    assert [shown_bytes(n) for n in (0, 999, 2**20, 80 * 2**30, 5 * 2**40)] == [
        "0 B",
        "999 B",
        "1 MiB",
        "80 GiB",
        "5 TiB",
    ]


def test_the_accelerator_is_what_the_environment_says_or_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from harness.io import accelerator as found

    monkeypatch.delenv("HARNESS_ACCELERATOR", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(found, "nvidia_devices", lambda: [Path("/dev/nvidia0"), Path("/dev/nvidia1")])
    assert (found.accelerator(), found.num_devices()) == ("cuda", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert found.num_devices() == 1
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (found.accelerator(), found.num_devices()) == ("cpu", 1)
    monkeypatch.setenv("HARNESS_ACCELERATOR", "cuda")
    assert found.accelerator() == "cuda"
