"""Which layers get an adapter, what it starts from, what is refused, and what its directory must be like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from harness.config.rules import stage_problems
from harness.config.schema import AdapterConfig, RunConfig, Task
from harness.errors import ConfigError, DataError
from harness.models.adapter_files import load_adapter, merge_adapter, save_adapter
from harness.models.adapters import add_adapter
from harness.models.linear import head_modules, linear_layers
from harness.models.load import base_fingerprint
from harness.models.parameter_table import parameter_counts, parameter_table
from tests.tiny_llm import make_tiny_llm

ENCODER: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llm(tmp_path_factory.mktemp("llm") / "llama")


def causal(family: str, **changes: Any) -> Any:
    shape = {"vocab_size": 50, "pad_token_id": 0, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    shape |= {"num_hidden_layers": 2, "num_key_value_heads": 1}
    own = {"gpt2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2}}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(own.get(family, shape) | changes)))


def encoder(family: str) -> Any:
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **ENCODER))


def adapt(model: Any, *, task: Task = "causal_lm", seed: int = 1, **adapter: Any) -> Any:
    return add_adapter(model, AdapterConfig(**({"rank": 4} | adapter)), task=task, total_steps=100, seed=seed)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapted_layers(model: Any) -> set[str]:
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in trained(model) if "lora_" in name}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "gpt2"])
def test_auto_is_every_linear_layer_but_the_head(family: str) -> None:
    model = causal(family)
    layers = set(linear_layers(model))
    assert layers == {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head"
    }
    assert len(layers) == {"gpt2": 8, "phi3": 8}.get(family, 14)
    assert adapted_layers(adapt(model)) == layers


@pytest.mark.parametrize("family", ["mbart", "nllb", "marian", "t5"])
def test_auto_in_encoder_decoders(family: str, tiny_models: dict[str, Path]) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_models[family])
    layers = set(linear_layers(model))
    adapted = adapted_layers(adapt(model, task="translation"))
    assert adapted == layers
    assert "lm_head" not in layers
    assert len(adapted) == 2 * 6 + 2 * 10  # two layers of each: attention 4, feed-forward 2, cross-attention 4


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("bert", {"bert.pooler", "classifier"}),
        ("roberta", {"classifier"}),
        ("deberta-v2", {"pooler", "classifier"}),
    ],
)
def test_heads_of_classifiers_are_trained_whole_and_get_no_adapter(family: str, heads: set[str]) -> None:
    model = encoder(family)
    assert set(head_modules(model)) == heads
    whole = {name for name, _ in model.named_parameters() if name.rpartition(".")[0].startswith(tuple(heads))}
    model = adapt(model, task="classification")
    marks = ("base_model.model.", "modules_to_save.default.")
    saved = {name.replace(marks[0], "").replace(marks[1], "") for name in trained(model) if "lora_" not in name}
    assert saved == whole
    assert not any(name.startswith(tuple(heads)) for name in adapted_layers(model))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r".*\.layers\.1\..*\.(q|v)_proj", {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
        (["mlp.up_proj"], {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_targets_by_pattern_and_by_name(targets: Any, expected: set[str]) -> None:
    assert adapted_layers(adapt(causal("llama"), targets=targets)) == expected


@pytest.mark.parametrize(
    ("adapter", "where", "words"),
    [
        ({"targets": ["q_porj"]}, "adapter.targets", ["'q_porj'", "did you mean `q_proj`", "down_proj"]),
        ({"targets": ["q_proj", "zzz"]}, "adapter.targets", ["'zzz'"]),
        ({"targets": "q_proj"}, "adapter.targets", ["whole name", "did you mean `q_proj`", "model.layers.0."]),
        ({"targets": "q_(proj"}, "adapter.targets", ["not a regular expression"]),
        ({"modules_to_save": ["lm_haed"]}, "adapter.modules_to_save", ["did you mean `lm_head`"]),
    ],
)
def test_names_that_match_nothing(adapter: dict[str, Any], where: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        adapt(causal("llama"), **adapter)
    assert raised.value.where == where
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "adalora", "prompt_tuning", "p_tuning", "bottleneck"])
def test_the_start_follows_from_the_seed_alone(method: str) -> None:
    torch.manual_seed(0)
    state = causal("llama").state_dict()

    def start(seed: int) -> dict[str, torch.Tensor]:
        model = causal("llama")
        model.load_state_dict(state)
        return trained(adapt(model, method=method, seed=seed, num_virtual_tokens=4))

    first, other = start(1), start(2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again = start(1)
    torch.manual_seed(5)
    causal("llama")
    assert not torch.equal(before, torch.random.get_rng_state())  # building draws, adding the adapter does not
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


def test_adding_an_adapter_draws_no_random_numbers() -> None:
    model = causal("llama")
    before = torch.random.get_rng_state()
    adapt(model)
    assert torch.equal(before, torch.random.get_rng_state())


def test_adapter_weights_are_float32_on_a_base_that_is_not() -> None:
    model = adapt(causal("llama").bfloat16(), modules_to_save=["lm_head"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_ia3_scales_keys_values_and_feed_forward_layers() -> None:
    names = {name.rpartition(".ia3_l")[0].rpartition(".")[2] for name in trained(adapt(causal("llama"), method="ia3"))}
    assert names == {"k_proj", "v_proj", "down_proj"}
    model = adapt(encoder("bert"), method="ia3", task="classification")
    scaled = {
        name.removeprefix("base_model.model.bert.encoder.layer.0.") for name in trained(model) if "layer.0" in name
    }
    assert scaled == {
        f"{name}.ia3_l.default" for name in ("attention.self.key", "attention.self.value", "output.dense")
    }
    with pytest.raises(ConfigError, match=r"name them in adapter\.targets"):
        adapt(causal("mamba"), method="ia3")


def test_modules_that_share_their_weight() -> None:
    model = adapt(causal("gemma"), modules_to_save=["embed_tokens"])
    base = model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    for adapter in ({"method": "ia3"}, {"method": "bottleneck"}):
        with pytest.raises(ConfigError, match="shares its weight with lm_head"):
            adapt(causal("gemma"), modules_to_save=["embed_tokens"], **adapter)


def test_shared_embeddings_of_encoder_decoders_are_not_saved_whole(tiny_models: dict[str, Path]) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_models["mbart"])
    with pytest.raises(ConfigError, match="shares its weight"):
        adapt(model, task="translation", modules_to_save=["shared"])


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_classifiers_by_the_last_token_take_no_virtual_tokens(method: str, llama: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    with pytest.raises(ConfigError, match="virtual tokens"):
        adapt(model, task="classification", method=method)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_marian_would_not_scale_embeddings_beside_virtual_tokens(method: str, tiny_models: dict[str, Path]) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_models["marian"])
    with pytest.raises(ConfigError, match="virtual tokens"):
        adapt(model, task="translation", method=method)


def test_parameter_table() -> None:
    model = adapt(encoder("roberta"), task="classification")
    counts = parameter_counts(model)
    head = (32 * 32 + 32) + (32 * 3 + 3)
    linear = 2 * (4 * (32 + 32) + 2 * (32 + 64)) * 4
    assert counts["adapter"] == (linear, 0)
    assert counts["saved whole"] == (head, 0)
    assert counts["embeddings"] == (0, (50 + 64 + 2) * 32)
    last = parameter_table(model).splitlines()[-1].split()
    total = sum(p.numel() for p in model.parameters())
    assert last == ["total", f"{linear + head:,}", f"{total - linear - head:,}", f"{total:,}",
                    f"{100 * (linear + head) / total:.3f}"]  # fmt: skip


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning", "bottleneck"])
def test_methods_that_are_more_than_weights_are_not_merged(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} cannot be merged"):
        merge_adapter(adapt(causal("llama"), method=method))


@pytest.mark.parametrize(
    ("method", "model", "preset", "words"),
    [
        ("dora", {"quantization": {"bits": 8}}, "zero0", "8-bit weights"),
        ("dora", {"quantization": {}}, "zero3", "use zero2"),
        ("ia3", {"quantization": {}, "dtype": "bfloat16"}, "zero0", "ia3 on a quantised base"),
        ("adalora", {"dtype": "float16"}, "zero0", "scales each differently"),
        ("adalora", {}, "zero3_nvme", "NVMe"),
        ("dora", {"quantization": {}}, "zero2", None),
        ("dora", {}, "zero3", None),
        ("ia3", {"quantization": {}}, "zero3", None),
        ("adalora", {"quantization": {}, "dtype": "bfloat16"}, "zero3", None),
    ],
)
def test_pairs_that_do_not_work_are_refused(method: str, model: dict[str, Any], preset: str, words: str | None) -> None:
    run = {
        "name": "run", "task": "causal_lm", "model": {"path": "x", **model}, "adapter": {"method": method},
        "data": {"train": [{"path": "x.jsonl"}]}, "batch": {"tokens_per_step": 2048, "max_tokens_per_device": 2048},
        "optimizer": {"lr": 1e-3}, "schedule": {"steps": 10}, "deepspeed": {"preset": preset, "nvme_path": "/x"},
    }  # fmt: skip
    problems = [message for key, message in stage_problems(RunConfig.model_validate(run)) if key == "adapter.method"]
    assert [words in message for message in problems] == ([True] if words else [])


def written(llama: Path, directory: Path, **adapter: Any) -> Path:
    save_adapter(adapt(AutoModelForCausalLM.from_pretrained(llama), **adapter), directory, base=llama)
    return directory


def test_an_adapter_knows_its_base_by_its_weights(llama: Path, tmp_path: Path) -> None:
    directory = written(llama, tmp_path / "adapter")
    assert sorted(path.name for path in directory.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "base.json",
    ]  # fmt: skip
    other = make_tiny_llm(tmp_path / "other", seed=8)
    assert base_fingerprint(other) != base_fingerprint(llama)
    moved = tmp_path / "moved"
    llama.rename(moved)
    try:
        load_adapter(AutoModelForCausalLM.from_pretrained(moved), directory)
    finally:
        moved.rename(llama)
    with pytest.raises(DataError, match="other weights"):
        load_adapter(AutoModelForCausalLM.from_pretrained(other), directory)


def test_a_base_without_weights_has_no_fingerprint(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(DataError, match="a base with weights"):
        base_fingerprint(tmp_path)


def drop_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def cut_weights(directory: Path) -> None:
    content = (directory / "adapter_model.safetensors").read_bytes()
    (directory / "adapter_model.safetensors").write_bytes(content[:-100])


def unknown_kind(directory: Path) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "MAGIC"}))


def other_shape(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(
        {name: tensor[:1].contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_weights, "there is no adapter_model.safetensors"),
        (cut_weights, "cannot be read"),
        (unknown_kind, "unknown kind: 'MAGIC'"),
        (other_shape, "cannot be read"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_damaged_adapters(method: str, damage: Callable[[Path], None], words: str, llama: Path, tmp_path: Path) -> None:
    directory = written(llama, tmp_path / "adapter", method=method)
    damage(directory)
    with pytest.raises(DataError, match=words):
        load_adapter(AutoModelForCausalLM.from_pretrained(llama), directory)


def test_virtual_tokens_cannot_be_trained_further(llama: Path, tmp_path: Path) -> None:
    directory = written(llama, tmp_path / "adapter", method="prompt_tuning")
    with pytest.raises(ConfigError, match="cannot be trained further"):
        load_adapter(AutoModelForCausalLM.from_pretrained(llama), directory, trainable=True)
    lora = written(llama, tmp_path / "lora")
    assert trained(load_adapter(AutoModelForCausalLM.from_pretrained(llama), lora, trainable=True))
    assert not trained(load_adapter(AutoModelForCausalLM.from_pretrained(llama), lora))
