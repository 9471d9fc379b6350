"""Building and loading models: seeds, precision, overrides, names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from harness.config.schema import ModelConfig
from harness.errors import ConfigError, DataError
from harness.models.load import as_dtype, load_model, load_tokenizer, model_directory
from tests.tiny_llm import make_tiny_llm


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("family", ["mbart", "mbart50", "nllb", "marian", "t5"])
def test_random_weights_depend_on_the_seed_alone(family: str, tiny_models: dict[str, Path]) -> None:
    config = ModelConfig(config=str(tiny_models[family]))
    torch.manual_seed(1)
    first = weights(load_model(config, seed=5))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert equal(first, weights(load_model(config, seed=5)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not equal(first, weights(load_model(config, seed=6)))


def test_saved_weights_are_loaded_whatever_the_seed(tiny_models: dict[str, Path]) -> None:
    config = ModelConfig(path=str(tiny_models["mbart"]))
    assert equal(weights(load_model(config, seed=1)), weights(load_model(config, seed=2)))


def test_a_bfloat16_model_is_loaded_in_float32(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(tiny_models["mbart"])), seed=0)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    load_tokenizer(tiny_models["mbart"]).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path)), seed=0)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_dropout_overrides_reach_the_layers(tiny_models: dict[str, Path]) -> None:
    model = load_model(ModelConfig(path=str(tiny_models["mbart"]), dropout=0.3, attention_dropout=0.2), seed=0)
    layer = model.model.encoder.layers[0]
    assert (layer.dropout, layer.self_attn.dropout) == (0.3, 0.2)
    assert model.training


def test_t5_has_one_dropout_rate(tiny_models: dict[str, Path]) -> None:
    model = load_model(ModelConfig(path=str(tiny_models["t5"]), dropout=0.3), seed=0)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    with pytest.raises(ConfigError, match="t5 has no such dropout rate"):
        load_model(ModelConfig(path=str(tiny_models["t5"]), attention_dropout=0.1), seed=0)


def test_layer_drop_is_off(tiny_models: dict[str, Path]) -> None:
    model = load_model(ModelConfig(config=str(tiny_models["nllb"])), seed=0)
    assert (model.model.encoder.layerdrop, model.model.decoder.layerdrop) == (0.0, 0.0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_kernel_is_the_one_asked_for(attention: str, tiny_models: dict[str, Path]) -> None:
    model = load_model(ModelConfig(path=str(tiny_models["mbart"]), attention=attention), seed=0)  # type: ignore[arg-type]
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("family", ["mbart", "t5"])
def test_an_attention_kernel_that_is_not_there_is_a_user_error(family: str, tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="cannot be built") as error:
        load_model(ModelConfig(path=str(tiny_models[family]), attention="flash_attention_2"), seed=0)
    assert error.value.where == "model.attention"


def test_checkpointed_activations_give_the_same_gradients(tiny_models: dict[str, Path]) -> None:
    ids = torch.arange(4, 20).view(2, 8)
    gradients = []
    for on in (False, True):
        model = load_model(ModelConfig(path=str(tiny_models["mbart"]), gradient_checkpointing=on), seed=0)
        logits = model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        assert model.is_gradient_checkpointing is on
        gradients.append(model.model.shared.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_directory_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_directory("org/name") == Path("org/name")


def test_a_hub_name_without_the_hub_is_a_user_error() -> None:
    with pytest.raises(DataError, match="neither a directory nor obtainable") as error:
        model_directory("facebook/mbart-large-cc25")
    assert error.value.where == "facebook/mbart-large-cc25"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinusoidal_positions_have_the_compute_type(dtype: str, tiny_models: dict[str, Path]) -> None:
    """DeepSpeed casts parameters and leaves buffers: a float32 one would turn NLLB's activations back into float32."""
    config = ModelConfig.model_validate({"path": str(tiny_models["nllb"]), "dtype": dtype})
    model = load_model(config, seed=1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    positions = [buffer for name, buffer in model.named_buffers() if "embed_positions" in name]
    assert len(positions) == 2
    assert {buffer.dtype for buffer in positions} == {getattr(torch, dtype)}


def test_rotary_positions_stay_exact_in_bfloat16(tmp_path: Path) -> None:
    """Rounded to 8 bits, their frequencies would turn far positions by radians; training keeps them too."""
    directory = make_tiny_llm(tmp_path / "llama")
    model = load_model(ModelConfig(path=str(directory)), seed=1, task="causal_lm")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    as_dtype(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert any("inv_freq" in name for name in before)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
