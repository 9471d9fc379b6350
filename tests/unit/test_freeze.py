"""Freeze rules on the names of real families, and when which parameter is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MBartConfig,
    OPTConfig,
    T5Config,
)

from harness.config.schema import FreezeRule
from harness.errors import ConfigError
from harness.models.freeze import phase_boundaries, resolve_freezing

BART: dict[str, Any] = {"d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 8}
BART |= {"decoder_ffn_dim": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1, "vocab_size": 20}
BERT: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 8}
MODELS: dict[str, tuple[Any, Any]] = {
    "mbart": (AutoModelForSeq2SeqLM, MBartConfig(**BART)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(d_model=8, d_kv=8, d_ff=8, num_layers=3, num_decoder_layers=2, num_heads=1)),
    "bart classifier": (AutoModelForSequenceClassification, BartConfig(**BART)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**BERT, vocab_size=20)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(n_embd=8, n_layer=3, n_head=1, vocab_size=20)),
    "opt": (
        AutoModelForCausalLM,
        OPTConfig(hidden_size=8, num_hidden_layers=3, ffn_dim=8, num_attention_heads=1, word_embed_proj_dim=8),
    ),
    "bert": (AutoModelForSequenceClassification, BertConfig(**BERT)),
    "distilbert": (AutoModelForSequenceClassification, DistilBertConfig(dim=8, n_layers=3, n_heads=1, hidden_dim=8)),
}


def make(name: str) -> Any:
    auto, config = MODELS[name]
    with torch.device("meta"):
        return auto.from_config(config)


def frozen(model: Any, **rule: Any) -> set[str]:
    """Names of what one rule freezes, after checking `requires_grad`."""
    freezing = resolve_freezing(model, FreezeRule(**rule))
    freezing.apply(model, 1)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == freezing.trainable_at(1)
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("family", "rule", "expected"),
    [
        ("mbart", {"encoder": "0-1"}, ["model.encoder.layers.0.", "model.encoder.layers.1."]),
        ("mbart", {"decoder": "1"}, ["model.decoder.layers.1."]),
        ("t5", {"encoder": "0,2", "decoder": "0"}, ["encoder.block.0.", "encoder.block.2.", "decoder.block.0."]),
        ("bart classifier", {"encoder": "all"}, ["model.encoder.layers."]),
        ("llama", {"layers": "0-1"}, ["model.layers.0.", "model.layers.1."]),
        ("gpt2", {"layers": "2"}, ["transformer.h.2."]),
        ("opt", {"layers": "0"}, ["model.decoder.layers.0."]),
        ("bert", {"layers": "1-2"}, ["bert.encoder.layer.1.", "bert.encoder.layer.2."]),
        ("distilbert", {"layers": "0"}, ["distilbert.transformer.layer.0."]),
        ("llama", {"patterns": [r"mlp\.", "norm"]}, []),
    ],
)
def test_layers_are_found_in_every_family(family: str, rule: dict[str, Any], expected: list[str]) -> None:
    model = make(family)
    names = [name for name, _ in model.named_parameters()]
    wanted = {name for name in names if any(name.startswith(prefix) for prefix in expected)}
    if "patterns" in rule:
        wanted = {name for name in names if "mlp." in name or "norm" in name}
    assert frozen(model, **rule) == wanted != set()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "mbart",
            {"model.shared.weight", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"},
        ),
        ("t5", {"shared.weight"}),
        ("llama", {"model.embed_tokens.weight"}),
        ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"}),
        (
            "bert",
            {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
        ),
    ],
)
def test_embeddings(family: str, expected: set[str]) -> None:
    assert frozen(make(family), embeddings=True) == expected


def test_a_tied_embedding_is_one_parameter_under_all_its_names() -> None:
    model = make("mbart")
    assert frozen(model, patterns=["lm_head"]) == {"model.shared.weight"}
    freezing = resolve_freezing(make("mbart"), [])
    assert freezing.names.count("model.shared.weight") == 1
    assert not [name for name in freezing.names if "lm_head" in name]


def test_peft_prefixes_change_nothing() -> None:
    import peft

    auto, config = MODELS["llama"]
    model = peft.get_peft_model(auto.from_config(config), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    freezing = resolve_freezing(model, FreezeRule(layers="0-1"))
    assert freezing.trainable_at(1) == [
        f"base_model.model.model.layers.2.self_attn.q_proj.lora_{side}.default.weight" for side in "AB"
    ]


@pytest.mark.parametrize(
    ("family", "rule", "says"),
    [
        ("mbart", {"encoder": "1-3"}, ["freeze.encoder", "no layer 3", "`encoder: 0-2`", "`decoder: 0-1`"]),
        ("mbart", {"layers": "0"}, ["freeze.layers", "more than one stack", "`encoder: 0-2`"]),
        ("llama", {"encoder": "0"}, ["freeze.encoder", "no encoder", "`layers: 0-2`"]),
        ("llama", {"patterns": ["norm", "embed_tokenz"]}, ["freeze.patterns.1", "did you mean `embed_tokens`"]),
        ("llama", {"patterns": ["."]}, ["every parameter is frozen"]),
        ("llama", {"patterns": ["."], "until_step": 5}, ["every parameter is frozen"]),
    ],
)
def test_rules_that_mean_nothing(family: str, rule: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_freezing(make(family), FreezeRule(**rule))
    for text in says:
        assert text in str(caught.value)


def test_a_rule_in_a_list_is_named_by_its_number() -> None:
    with pytest.raises(ConfigError, match=r"freeze\.1\.layers"):
        resolve_freezing(make("llama"), [FreezeRule(embeddings=True), FreezeRule(layers="9")])


def test_phases() -> None:
    rules = [
        FreezeRule(embeddings=True),
        FreezeRule(layers="0-1", until_step=10),
        FreezeRule(layers="0", until_step=20),
        FreezeRule(patterns=["norm"], until_step=10),
    ]
    model = make("llama")
    freezing = resolve_freezing(model, rules)

    def has(step: int, part: str) -> bool:
        return any(part in name for name in freezing.trainable_at(step))

    assert phase_boundaries(rules) == [10, 20]
    assert phase_boundaries(rules[1]) == [10]
    assert freezing.trainable_at(0) == freezing.trainable_at(1) == freezing.trainable_at(10)
    assert not has(10, ".layers.1.") and has(11, ".layers.1.")  # noqa: PT018
    assert not has(20, ".layers.0.") and has(21, ".layers.0.")  # noqa: PT018
    assert not has(99, "embed_tokens") and has(1, "lm_head") and has(11, "model.norm")  # noqa: PT018
    assert set(freezing.starts.values()) == {10, 20}
    assert freezing.starts["model.layers.0.input_layernorm.weight"] == 20  # the longest of the rules it is under
    assert freezing.starts["model.layers.2.input_layernorm.weight"] == 10


def test_what_the_model_never_trains_stays_untrained() -> None:
    model = make("llama")
    model.model.norm.weight.requires_grad_(False)
    freezing = resolve_freezing(model, FreezeRule(patterns=["norm"], until_step=1))
    assert "model.norm.weight" not in freezing.names
    freezing.apply(model, 2)
    assert not model.model.norm.weight.requires_grad
