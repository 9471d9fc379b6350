"""Every adapter method on a language model and on a translation model: it starts from the base, learns, leaves the base
alone, and is the same model again in plain PEFT, read back, or merged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from harness.config.schema import AdapterConfig, Task
from harness.decoding.beam import BeamSettings
from harness.models.adapter_files import MERGEABLE, load_adapter, merge_adapter, save_adapter
from harness.models.adapters import METHODS, add_adapter
from harness.models.parameter_table import ADAPTER_PART
from tests.searches import beam_search
from tests.tiny_llm import make_tiny_llm

FAMILIES = ("llama", "gpt2", "mbart", "classifier")
METHOD_NAMES = (*METHODS, "bottleneck")
CHANGES_THE_START = ("prefix_tuning", "prompt_tuning", "p_tuning")
NUM_VIRTUAL_TOKENS = 5


@pytest.fixture(scope="module")
def directories(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("bases")
    llama = make_tiny_llm(parent / "llama")
    gpt2 = make_tiny_llm(parent / "gpt2", "gpt2")
    return {"llama": llama, "classifier": llama, "gpt2": gpt2, "mbart": tiny_models["mbart"]}


def task_of(family: str) -> Task:
    return "translation" if family == "mbart" else "classification" if family == "classifier" else "causal_lm"


def load(directory: Path, family: str) -> Any:
    """The base; a new head of a classifier is always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if family == "classifier":
            return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3).eval()
        auto_model = AutoModelForSeq2SeqLM if family == "mbart" else AutoModelForCausalLM
        return auto_model.from_pretrained(directory).eval()


def inputs_of(family: str) -> dict[str, Any]:
    ids_BT = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 6:] = 0
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
    return inputs | ({"decoder_input_ids": ids_BT.flip(1)} if family == "mbart" else {})


def loss_of(model: Any, family: str) -> Tensor:
    logits = model(**inputs_of(family)).logits
    labels = torch.arange(logits.flatten(0, -2).shape[0]) % logits.shape[-1]
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels)


def frozen_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not ADAPTER_PART.search(name):
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def trained_adapter(directory: Path, family: str, method: str, steps: int = 3) -> Any:
    config = AdapterConfig(method=method, rank=4, num_virtual_tokens=NUM_VIRTUAL_TOKENS, bottleneck_size=8)  # type: ignore[arg-type]
    model = add_adapter(load(directory, family), config, task=task_of(family), total_steps=100, seed=1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before, losses = frozen_hash(model), []
    for _ in range(steps):
        loss = loss_of(model, family)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert frozen_hash(model) == before
    if steps:
        assert float(loss_of(model, family)) < losses[0] - 1e-4
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, family: str) -> Tensor:
    return model(**inputs_of(family)).logits


CASES = [
    (family, method)
    for family in FAMILIES
    for method in METHOD_NAMES
    if family != "classifier" or method not in ("prompt_tuning", "p_tuning")
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_trains_and_comes_back(family: str, method: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """PiSSA is written as a LoRA on the untouched base, a sum in another order; all others are equal bit for bit."""
    base = directories[family]
    tolerance = {"rtol": 0.0, "atol": 5e-6 if method == "pissa" else 0.0}
    model = trained_adapter(base, family, method)
    expected = logits_of(model, family)
    assert expected.shape == logits_of(load(base, family), family).shape
    save_adapter(model, tmp_path / "adapter", base=base)
    again = load_adapter(load(base, family), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again.eval(), family), expected, **tolerance)
    if method != "bottleneck":
        plain = PeftModel.from_pretrained(load(base, family), tmp_path / "adapter")
        extra = NUM_VIRTUAL_TOKENS if family in ("llama", "gpt2") and method in ("prompt_tuning", "p_tuning") else 0
        logits = logits_of(plain.eval(), family)
        torch.testing.assert_close(logits[:, extra:], expected, **tolerance)
    if getattr(model, "peft_type", None) in MERGEABLE:
        merged = merge_adapter(model).eval()
        torch.testing.assert_close(logits_of(merged, family), expected, rtol=0.0, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits_of(load(tmp_path / "merged", family), family), expected, rtol=0.0, atol=1e-5)
        assert not any(ADAPTER_PART.search(name) for name in merged.state_dict())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mbart"])
@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name not in CHANGES_THE_START])
def test_the_start_is_the_base(family: str, method: str, directories: dict[str, Path]) -> None:
    """PiSSA takes the adapter's start out of the weights again: a sum in another order."""
    base = logits_of(load(directories[family], family), family)
    start = logits_of(trained_adapter(directories[family], family, method, steps=0), family)
    torch.testing.assert_close(start, base, rtol=0.0, atol=5e-6 if method == "pissa" else 0.0)


@pytest.mark.parametrize("family", ["mbart", "nllb", "t5", "gemma"])
def test_virtual_tokens_stand_beside_embeddings_of_the_same_scale(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT embeds the input itself: models that scale their embeddings must not notice."""
    directory = tiny_models[family] if family in tiny_models else make_tiny_llm(tmp_path / family, family)
    kind = "mbart" if family in tiny_models else "llama"
    model = trained_adapter(directory, kind, "prompt_tuning", steps=0)
    inputs = inputs_of(kind)
    embedded = inputs | {"inputs_embeds": model.word_embeddings(inputs["input_ids"])}
    del embedded["input_ids"]
    base = model.get_base_model()
    with torch.no_grad():
        torch.testing.assert_close(base(**embedded).logits, base(**inputs).logits, rtol=0.0, atol=1e-5)


def test_a_prefix_has_the_shape_of_the_decoder(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Of its layers and heads, where PEFT would take the encoder's."""
    config = AutoModelForSeq2SeqLM.from_pretrained(tiny_models["mbart"]).config
    config.encoder_layers, config.encoder_attention_heads = 1, 4
    model = AutoModelForSeq2SeqLM.from_config(config)
    adapter = AdapterConfig(method="prefix_tuning", num_virtual_tokens=3)
    adapted: Any = add_adapter(model, adapter, task="translation", total_steps=10, seed=1)
    prefix = adapted.get_prompt(batch_size=2).self_attention_cache
    assert len(prefix.layers) == config.decoder_layers == 2
    assert prefix.layers[0].keys.shape == (2, config.decoder_attention_heads, 3, 32 // config.decoder_attention_heads)
    assert loss_of(adapted, "mbart").isfinite()


def test_adalora_comes_down_within_the_run(directories: dict[str, Path]) -> None:
    adapted: Any = add_adapter(
        load(directories["llama"], "llama"),
        AdapterConfig(method="adalora", rank=4),
        task="causal_lm",
        total_steps=50,
        seed=1,
    )
    config = adapted.peft_config["default"]
    assert isinstance(config, AdaLoraConfig)
    assert (config.init_r, config.target_r, config.tinit, config.tfinal, config.deltaT) == (6, 4, 5, 15, 1)


@pytest.mark.parametrize("family", ["llama", "mbart"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_greedy_search_takes_what_the_forward_pass_finds_best(
    method: str, family: str, directories: dict[str, Path]
) -> None:
    """Virtual tokens must be there in the first step of the search, and only once."""
    model = trained_adapter(directories[family], family, method)
    sources_BS, mask_BS = inputs_of("llama")["input_ids"][:2], torch.ones(2, 9, dtype=torch.long)
    settings = BeamSettings(beam_size=1, length_penalty=0.0, max_length=6)
    start_B = torch.full((2,), 7) if family == "mbart" else None
    options = {"decoder_start_B": start_B, "settings": settings, "synced": False, "pad": 1, "ends": [2]}
    found = beam_search(model, sources_BS, mask_BS, **options)  # type: ignore[arg-type]
    for row, (hypothesis,) in enumerate(found):
        outputs, score = [], 0.0
        while len(outputs) < settings.max_length:
            inputs = {"input_ids": sources_BS[row : row + 1], "attention_mask": mask_BS[:1], "use_cache": False}
            if family == "mbart":
                inputs["decoder_input_ids"] = torch.tensor([[7, *outputs]])
            else:
                inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([outputs], dtype=torch.long)], dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            with torch.no_grad():
                log_p_V = model(**inputs).logits[0, -1].log_softmax(-1)
            log_p_V[1] = -torch.inf
            best = int(log_p_V.argmax())
            score += float(log_p_V[best])
            if best == 2:
                break
            outputs.append(best)
        assert hypothesis.token_ids == outputs
        assert hypothesis.score == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mbart"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_beam_search_finds_what_generate_finds(method: str, family: str, directories: dict[str, Path]) -> None:
    model = trained_adapter(directories[family], family, method)
    sources_BS, mask_BS = inputs_of("llama")["input_ids"][:2], torch.ones(2, 9, dtype=torch.long)
    settings = BeamSettings(beam_size=4, length_penalty=0.7, max_length=8)
    starts = {"decoder_start_B": torch.full((2,), 7)} if family == "mbart" else {}
    found = beam_search(model, sources_BS, mask_BS, **starts, settings=settings, synced=False, pad=1, ends=[2])
    start = {"decoder_start_token_id": 7} if family == "mbart" else {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config = GenerationConfig()
    expected = model.generate(
        input_ids=sources_BS, attention_mask=mask_BS, num_beams=4, length_penalty=0.7, max_new_tokens=8,
        suppress_tokens=[1], pad_token_id=1, eos_token_id=2, output_scores=True, return_dict_in_generate=True, **start,
    )  # fmt: skip
    scores = [one[0].score for one in found]
    assert scores == pytest.approx(expected.sequences_scores.tolist(), rel=1e-5)
