"""Bases in 4 and 8 bits: how far they are from the whole model, that adapters learn through them exactly as through the
weights that they stand for, and that merging gives those weights back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, RobertaConfig
from transformers.pytorch_utils import Conv1D

from harness.config.schema import AdapterConfig, ClassificationConfig, ModelConfig, QuantizationConfig, Task
from harness.errors import ConfigError, DataError
from harness.models.adapter_files import merge_adapter
from harness.models.adapters import METHODS, add_adapter
from harness.models.linear import linear_layers
from harness.models.load import load_model
from harness.models.parameter_table import num_weights
from harness.models.quantization import dequantize, is_quantized, merge_gate
from tests.pairs import PAIRS
from tests.tiny import make_tiny_model
from tests.tiny_llm import make_tiny_llm

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
NF4 = QuantizationConfig()
FORMS = {
    "nf4": NF4,
    "nf4-plain": QuantizationConfig(double=False),
    "fp4": QuantizationConfig(type="fp4"),
    "int8": QuantizationConfig(bits=8),
}
MERGEABLE = [name for name in METHODS if name in ("lora", "rslora", "dora", "adalora", "ia3")]
# Of the largest logit. In float32 a product with unpacked 4-bit weights is exact, 8-bit products round their inputs to
# 8 bits too, and bfloat16 keeps 8 bits of every sum.
MERGE_TOLERANCE = {("nf4", "float32"): 1e-5, ("int8", "float32"): 5e-2, ("nf4", "bfloat16"): 3e-2}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("bases")
    return {
        "llama": trained_llama(parent / "llama"),
        "gpt2": make_tiny_llm(parent / "gpt2", "gpt2", n_embd=64),
        "mbart": make_tiny_model("mbart", parent / "mbart", d_model=64),
    }


def trained_llama(directory: Path) -> Path:
    """A model that has learnt its text: the distance of two losses means something."""
    model = AutoModelForCausalLM.from_pretrained(make_tiny_llm(directory, **SIZES))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss_of_text(model, directory).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def loss_of_text(model: Any, directory: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer([source for source, _ in PAIRS], padding=True, return_tensors="pt")
    labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: Tensor = model(**batch, labels=labels_BT).loss
    return loss


def load(directory: Path, quantization: QuantizationConfig | None, dtype: str = "float32", **options: Any) -> Any:
    task: Task = options.pop("task", "translation" if directory.name == "mbart" else "causal_lm")
    model = ModelConfig(path=str(directory), dtype=dtype, quantization=quantization)  # type: ignore[arg-type]
    return load_model(model, 1, task=task, frozen=True, **options).eval()


def inputs_of(directory: Path) -> dict[str, Tensor]:
    ids_BT = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    return inputs | ({"decoder_input_ids": ids_BT.flip(1)} if directory.name == "mbart" else {})


@torch.no_grad()
def logits_of(model: Any, directory: Path) -> Tensor:
    logits: Tensor = model.eval()(**inputs_of(directory)).logits
    return logits


def adapted(model: Any, directory: Path, method: str = "lora") -> Any:
    """An adapter that changes the logits: every trained weight is moved a little from its start."""
    config = AdapterConfig(method=method, rank=4)  # type: ignore[arg-type]
    task: Task = "translation" if directory.name == "mbart" else "causal_lm"
    model = add_adapter(model, config, task=task, total_steps=100, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def quantised_layers(model: Any) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt))


def test_the_loss_stays_near_that_of_the_whole_model(directories: dict[str, Path]) -> None:
    """In nats a token, of a model that has come down from 6 to 0.1; seen: 0.05 (nf4), 0.1 (fp4), 0.0003 (8 bits)."""
    directory = directories["llama"]
    with torch.no_grad():
        whole = float(loss_of_text(load(directory, None), directory))
        distances = {
            name: abs(float(loss_of_text(load(directory, form), directory)) - whole) for name, form in FORMS.items()
        }
    print(whole, distances)
    assert whole < 0.5
    assert 0 < distances["int8"] < 0.005
    assert 0 < distances["nf4"] < 0.1
    assert distances["nf4-plain"] < 0.1
    assert distances["nf4"] < distances["fp4"] < 0.2


@pytest.mark.parametrize("family", ["llama", "gpt2", "mbart"])
@pytest.mark.parametrize("form", FORMS)
def test_linear_layers_are_quantised_and_nothing_else(form: str, family: str, directories: dict[str, Path]) -> None:
    model = load(directories[family], FORMS[form])
    kind = bnb.nn.Linear8bitLt if form == "int8" else bnb.nn.Linear4bit
    layers = linear_layers(model)
    assert {type(layer) for layer in layers.values()} == {kind}
    assert len(layers) == {"llama": 14, "gpt2": 8, "mbart": 32}[family]
    assert type(model.get_output_embeddings()) is nn.Linear
    first = next(iter(layers.values()))
    if form != "int8":
        state = first.weight.quant_state
        assert (state.quant_type, state.nested) == (FORMS[form].type, FORMS[form].double)
        assert first.weight.dtype == torch.uint8
    rest = {name for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers}
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name in rest)
    whole = sum(p.numel() for p in load(directories[family], None).parameters())
    assert sum(num_weights(p) for p in model.parameters()) == whole


@pytest.mark.parametrize("storage_dtype", ["uint8", "bfloat16", "float32"])
def test_storage_types_hold_the_same_weights(storage_dtype: str, directories: dict[str, Path]) -> None:
    form = QuantizationConfig(storage_dtype=storage_dtype)  # type: ignore[arg-type]
    model = load(directories["llama"], form)
    assert {layer.weight.dtype for layer in quantised_layers(model)} == {getattr(torch, storage_dtype)}
    expected = logits_of(load(directories["llama"], NF4), directories["llama"])
    assert torch.equal(logits_of(model, directories["llama"]), expected)


def test_compute_and_model_types(directories: dict[str, Path]) -> None:
    model = load(directories["llama"], NF4, "bfloat16")
    assert {layer.compute_dtype for layer in quantised_layers(model)} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    model = load(directories["llama"], QuantizationConfig(compute_dtype="bfloat16"))
    assert {layer.compute_dtype for layer in quantised_layers(model)} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="would be cast") as raised:
        load(directories["llama"], QuantizationConfig(storage_dtype="float32"), "bfloat16")
    assert raised.value.where == "model.quantization.storage_dtype"


@pytest.mark.parametrize(("family", "form"), [("llama", "nf4"), ("llama", "fp4"), ("gpt2", "nf4"), ("mbart", "nf4")])
def test_adapters_learn_as_on_the_weights_that_4_bits_stand_for(
    family: str, form: str, directories: dict[str, Path]
) -> None:
    directory = directories[family]
    packed = adapted(load(directory, FORMS[form]), directory)
    plain = adapted(dequantize(load(directory, FORMS[form]), torch.float32), directory)
    gradients = []
    for model in (packed, plain):
        logits = model(**inputs_of(directory)).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(logits.shape[0] * logits.shape[1])).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0.0, atol=1e-5 * scale)


@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mbart"])
def test_merged_is_unmerged(family: str, method: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """And what plain transformers opens is the merged model bit for bit."""
    directory = directories[family]
    model = adapted(load(directory, NF4), directory, method)
    unmerged = logits_of(model, directory)
    merged = merge_adapter(model)
    assert not is_quantized(merged)
    gap = merge_gate(unmerged, logits_of(merged, directory), tolerance=MERGE_TOLERANCE["nf4", "float32"])
    print(family, method, gap)
    merged.save_pretrained(tmp_path / "merged")
    auto_model = AutoModelForSeq2SeqLM if family == "mbart" else AutoModelForCausalLM
    again, info = auto_model.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert torch.equal(logits_of(again, directory), logits_of(merged, directory))


@pytest.mark.parametrize(("form", "dtype"), [("int8", "float32"), ("nf4", "bfloat16")])
@pytest.mark.parametrize("family", ["llama", "mbart"])
def test_merged_is_near_unmerged_where_products_are_rounded(
    family: str, form: str, dtype: str, directories: dict[str, Path]
) -> None:
    directory = directories[family]
    model = adapted(load(directory, FORMS[form], dtype), directory)
    unmerged = logits_of(model, directory)
    merged = merge_adapter(model)
    gap = merge_gate(unmerged, logits_of(merged, directory), tolerance=MERGE_TOLERANCE[form, dtype])
    print(family, form, dtype, gap)


def test_the_gate_shuts() -> None:
    logits = torch.tensor([[2.0, -4.0]])
    assert merge_gate(logits, logits + 0.001, tolerance=1e-3).relative == pytest.approx(2.5e-4, rel=1e-3)
    for wrong in (logits + 0.1, logits * torch.nan):
        with pytest.raises(DataError, match="merging changed the logits"):
            merge_gate(logits, wrong, tolerance=1e-3)


def test_gpt2_gets_its_own_kind_of_layer_back(directories: dict[str, Path]) -> None:
    model = dequantize(load(directories["gpt2"], NF4), torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(directories["gpt2"])
    assert {name for name, m in model.named_modules() if isinstance(m, Conv1D)} == {
        name for name, m in reference.named_modules() if isinstance(m, Conv1D)
    }
    for name, tensor in reference.state_dict().items():
        ours = model.state_dict()[name]
        assert ours.shape == tensor.shape
        assert float((ours - tensor).norm() / tensor.norm().clamp_min(1e-9)) < 0.15


def test_random_weights_are_quantised_too(directories: dict[str, Path]) -> None:
    def start(quantization: QuantizationConfig | None, seed: int) -> Any:
        model = ModelConfig(config=str(directories["llama"]), quantization=quantization)
        return load_model(model, seed, task="causal_lm", frozen=True)

    first, again, other = (logits_of(start(NF4, seed), directories["llama"]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert is_quantized(start(NF4, 1))
    whole = logits_of(start(None, 1), directories["llama"])
    assert 0 < float((first - whole).norm() / whole.norm()) < 0.5


@pytest.mark.parametrize("bits", [4, 8])
def test_classifiers_keep_their_heads_whole(bits: Any, directories: dict[str, Path], tmp_path: Path) -> None:
    """RoBERTa's head has two layers, of which transformers alone would spare the last."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(directories["llama"])
    tokenizer.save_pretrained(tmp_path)
    RobertaConfig(**sizes, vocab_size=400, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(tmp_path)
    model = ModelConfig(config=str(tmp_path), quantization=QuantizationConfig(bits=bits))
    labels = ClassificationConfig(labels=["a", "b", "c"])
    network: Any = load_model(model, 1, task="classification", classification=labels, frozen=True)
    assert type(network.classifier.dense) is type(network.classifier.out_proj) is nn.Linear
    assert sum(1 for _ in quantised_layers(network)) == 12
    trained = add_adapter(network, AdapterConfig(rank=4), task="classification", total_steps=10, seed=1)
    ids_BT = torch.randint(5, 300, (2, 6))
    trained(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits.sum().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize(("family", "dtype"), product(["llama", "mbart"], ["float32", "bfloat16"]))
def test_frozen_bases_are_in_the_compute_type(family: str, dtype: str, directories: dict[str, Path]) -> None:
    assert {p.dtype for p in load(directories[family], None, dtype).parameters()} == {getattr(torch, dtype)}
