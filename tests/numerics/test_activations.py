"""Recomputation changes memory and no gradient; NEFTune's noise is the paper's; dropout rates reach every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from harness.config.schema import GradientCheckpointingConfig, ModelConfig
from harness.errors import ConfigError
from harness.models.activations import (
    apply_activation_options,
    embedding_noise,
    override_dropout,
    position_lengths,
)

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
BERT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
}  # fmt: skip
BART = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 1, "scale_embedding": True, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
OPT = {
    "vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "max_position_embeddings": 32, "word_embed_proj_dim": 16,
}  # fmt: skip

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (AutoModelForCausalLM, LLAMA),
    "gpt2": (AutoModelForCausalLM, GPT2),
    "opt": (AutoModelForCausalLM, OPT),
    "gpt_neox": (AutoModelForCausalLM, BERT),
    "phi3": (AutoModelForCausalLM, LLAMA),
    "bert": (AutoModelForSequenceClassification, BERT),
    "roberta": (AutoModelForSequenceClassification, BERT),
    "distilbert": (
        AutoModelForSequenceClassification,
        {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_layers": 4, "n_heads": 2},
    ),
    "deberta-v2": (AutoModelForSequenceClassification, BERT | {"type_vocab_size": 2}),
    "mbart": (AutoModelForSeq2SeqLM, BART),
    "m2m_100": (AutoModelForSeq2SeqLM, BART),
    "t5": (AutoModelForSeq2SeqLM, T5),
}
RECOMPUTED: dict[str, bool | GradientCheckpointingConfig] = {
    "full": True,
    "every 2": GradientCheckpointingConfig(every=2),
    "offloaded": GradientCheckpointingConfig(offload=True),
    "every 2, offloaded": GradientCheckpointingConfig(every=2, offload=True),
}


def make(family: str, *, dropout: float = 0.1, **changes: Any) -> PreTrainedModel:
    auto, sizes = FAMILIES[family]
    config = CONFIG_MAPPING[family](**{**sizes, **changes})
    options = ModelConfig(config="-", **({} if family == "llama" else {"dropout": dropout}))
    override_dropout(config, options)
    torch.manual_seed(3)
    return auto.from_config(config).train()


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = {"input_ids": torch.randint(5, 50, (3, 12), generator=generator), "attention_mask": torch.ones(3, 12)}
    inputs["attention_mask"] = inputs["attention_mask"].long()
    inputs["attention_mask"][1, 7:] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 50, (3, 6), generator=generator)
    return inputs


def trained(model: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step with dropout, and the bytes its graph keeps."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(11)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs_of(model)).logits.float().square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_saves_memory_and_changes_no_gradient(family: str) -> None:
    expected, all_kept = trained(make(family))
    kept = {}
    for name, variant in RECOMPUTED.items():
        model = make(family)
        apply_activation_options(model, ModelConfig(config="-", gradient_checkpointing=variant))
        gradients, kept[name] = trained(model)
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[key], atol=1e-6, rtol=1e-5)
    assert kept["full"] < 0.6 * all_kept, "the test's models have small layers beside their logits"
    assert kept["full"] < kept["every 2"] < all_kept


def test_every_kth_layer_is_recomputed() -> None:
    model = make("llama")
    variant = GradientCheckpointingConfig(every=3)
    apply_activation_options(model, ModelConfig(config="-", gradient_checkpointing=variant))
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [True, False, False, True]


def test_recomputation_in_a_frozen_model_with_an_adapter() -> None:
    def gradients(variant: bool) -> dict[str, Tensor]:
        model = make("llama")
        apply_activation_options(model, ModelConfig(config="-", gradient_checkpointing=variant))
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        return trained(adapted)[0]

    plain, recomputed = gradients(False), gradients(True)
    assert plain
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offload to host memory needs a GPU to leave")
def test_offloading_leaves_less_on_the_device() -> None:
    def peak(variant: GradientCheckpointingConfig) -> int:
        sizes = {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 50}
        model = make("llama", **sizes).to("cuda")
        apply_activation_options(model, ModelConfig(config="-", gradient_checkpointing=variant))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=torch.ones(8, 1024, dtype=torch.long, device="cuda")).logits.float().mean().backward()
        return torch.cuda.max_memory_allocated() - before

    assert (
        peak(GradientCheckpointingConfig(offload=True)) < peak(GradientCheckpointingConfig()) - 4 * 8 * 1024 * 256 * 4
    )


def test_noise_is_the_formula_of_the_paper() -> None:
    """Algorithm 1: eps ~ U(-1, 1), X + (alpha / sqrt(L d)) eps; L is the row's own length where a mask tells it."""
    embeddings = torch.randn(2, 10, 8)
    lengths = torch.tensor([[10] * 10, [4] * 10])
    torch.manual_seed(2)
    noise = embedding_noise(embeddings, lengths, alpha=5.0)
    torch.manual_seed(2)
    eps = torch.empty(2, 10, 8).uniform_(-1, 1)
    torch.testing.assert_close(noise[0], eps[0] * 5 / math.sqrt(10 * 8), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(noise[1], eps[1] * 5 / math.sqrt(4 * 8), atol=1e-7, rtol=1e-6)
    torch.manual_seed(2)
    torch.testing.assert_close(embedding_noise(embeddings, None, alpha=5.0), eps * 5 / math.sqrt(10 * 8))


def test_noise_is_uniform() -> None:
    """Within the bound, mean 0 and variance bound^2 / 3, each within 5 standard errors of 2^20 draws."""
    noise = embedding_noise(torch.zeros(64, 128, 128), None, alpha=10.0)
    bound, draws = 10.0 / 128, 2**20
    assert noise.abs().max() <= bound
    assert abs(noise.mean()) < 5 * bound / math.sqrt(3 * draws)
    assert abs(noise.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(4 / (5 * draws))


def test_lengths_of_padded_and_packed_rows() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    padded = position_lengths(mask, None)
    assert padded is not None
    assert padded.tolist() == [[3] * 4, [1] * 4], "a row of no tokens does not divide by zero"
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
    packed = position_lengths(None, positions)
    assert packed is not None
    assert packed.tolist() == [[3, 3, 3, 2, 2, 1], [4, 4, 4, 4, 1, 1]]
    assert position_lengths(torch.ones(2, 1, 4, 4), None) is None


def embedded(model: Any, **more: Tensor) -> list[Tensor]:
    """What the token tables give in one training step, in order of their calls (an encoder's, then a decoder's)."""
    seen: list[Tensor] = []
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.num_embeddings == 50]
    handles = [table.register_forward_hook(lambda _, __, output: seen.append(output.detach())) for table in tables]
    torch.manual_seed(7)
    model(**inputs_of(model), **more)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_put_on_the_input_in_training_only(family: str) -> None:
    clean = embedded(make(family, dropout=0.0))
    model = make(family, dropout=0.0)
    apply_activation_options(model, ModelConfig(config="-", neftune_alpha=5.0))
    noisy = embedded(model)
    width = clean[0].shape[-1]
    for row, length in ((0, 12), (1, 7), (2, 12)):
        noise = (noisy[0] - clean[0])[row, :length]
        bound = 5 / math.sqrt(length * width)
        assert 0.9 * bound < noise.abs().max() <= bound + 1e-6
    assert len(noisy) == len(clean) == 1 + model.config.is_encoder_decoder
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(noisy[1:], clean[1:], strict=True)), "no decoder noise"
    assert torch.equal(noisy[0], embedded(model)[0]), "the same seed draws the same noise"
    model.eval()
    assert torch.equal(embedded(model)[0], clean[0])


@pytest.mark.parametrize("saved", [None, ["embed_tokens"]])
def test_noise_stays_in_a_model_with_an_adapter(saved: list[str] | None) -> None:
    clean = embedded(make("llama"))[0]
    model = make("llama")
    apply_activation_options(model, ModelConfig(config="-", neftune_alpha=5.0, gradient_checkpointing=True))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=saved))
    noise = embedded(adapted)[0] - clean
    assert 0.9 < noise[0].abs().max() * math.sqrt(12 * 16) / 5 <= 1 + 1e-5


def test_noise_knows_the_rows_of_a_pack() -> None:
    positions = torch.tensor([[*range(5), *range(7)]] * 3)
    clean = embedded(make("llama"), position_ids=positions)[0]
    model = make("llama")
    apply_activation_options(model, ModelConfig(config="-", neftune_alpha=5.0))
    noise = embedded(model, position_ids=positions)[0] - clean
    for part, length in ((slice(0, 5), 5), (slice(5, 12), 7)):
        assert 0.9 < noise[:, part].abs().max() * math.sqrt(length * 16) / 5 <= 1 + 1e-5


RATES = {
    "llama": (None, "attention_dropout"),
    "phi3": ("resid_pdrop", "attention_dropout"),
    "gpt2": ("resid_pdrop", "attn_pdrop"),
    "opt": ("dropout", "attention_dropout"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "mbart": ("dropout", "attention_dropout"),
    "t5": ("dropout_rate", None),
}


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize("key", ["dropout", "attention_dropout"])
def test_a_dropout_rate_reaches_the_model_or_is_refused(family: str, key: str) -> None:
    auto, sizes = FAMILIES[family]
    config = CONFIG_MAPPING[family](**sizes)
    for name in ("activation_dropout", *filter(None, RATES[family]), "embd_pdrop", "classifier_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    attribute = RATES[family][key == "attention_dropout"]
    if attribute is None:
        with pytest.raises(ConfigError, match="no such dropout rate") as error:
            override_dropout(config, ModelConfig(config="-", **{key: 0.5}))
        assert error.value.where == f"model.{key}"
        return

    def is_random() -> bool:
        torch.manual_seed(3)
        model = auto.from_config(config).train()
        first, second = (model(**inputs_of(model)).logits for _ in range(2))
        return not torch.equal(first, second)

    assert not is_random()
    override_dropout(config, ModelConfig(config="-", **{key: 0.5}))
    assert getattr(config, attribute) == 0.5
    assert is_random()
    override_dropout(config, ModelConfig(config="-", **{key: 0.0}))
    assert not is_random()


def test_a_classifiers_own_rate_follows() -> None:
    for family, name in (("bert", "classifier_dropout"), ("distilbert", "seq_classif_dropout")):
        config = CONFIG_MAPPING[family]()
        override_dropout(config, ModelConfig(config="-", dropout=0.25))
        assert getattr(config, name) == 0.25
