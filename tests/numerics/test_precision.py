"""Decoding in bfloat16 and int8: what is converted, what stays, and how far a trained model's outputs change."""

from __future__ import annotations

import csv
import gzip
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.config.schema import AdapterConfig, ModelConfig, QuantizationConfig
from harness.data.rows import Row
from harness.errors import ConfigError
from harness.evaluation.translate import Translator
from harness.models.adapters import METHODS, add_adapter
from harness.models.load import load_model, reload_model
from harness.models.precision import Int8Linear, in_precision
from harness.scoring.scores import corpus_scores
from harness.training.offline import open_translator
from harness.training.subject import open_subject
from tests.numerics.test_adapters import inputs_of, load, logits_of, trained_adapter
from tests.runs import REPOSITORY
from tests.tiny_llm import make_tiny_llm

EXAMPLES = REPOSITORY / "examples"
NUM_ROWS = 30


@pytest.fixture(scope="module")
def directories(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("bases")
    made = {family: make_tiny_llm(parent / family, family) for family in ("llama", "gpt2")}
    return made | {"mbart": tiny_models["mbart"]}


def distance(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of the expected values."""
    return float((found.float() - expected).norm() / expected.norm())


def test_a_layer_is_rounded_to_8_bits_and_rows_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 48)
    x = torch.randn(5, 7, 64, generator=generator) * torch.logspace(-3, 3, 7).unsqueeze(1)
    x[0, 0] = 0.0
    layer.weight.data[3] = 0.0
    rounded = Int8Linear(layer.weight, layer.bias)
    with torch.no_grad():
        expected, found = layer(x) - layer.bias, rounded(x) - layer.bias
    weight_step_O1 = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    input_step = x.abs().amax(dim=2, keepdim=True) / 63
    of_weights = weight_step_O1.T / 2 * x.abs().sum(dim=2, keepdim=True)
    of_inputs = input_step / 2 * (layer.weight.abs() + weight_step_O1 / 2).sum(dim=1)
    assert ((found - expected).abs() <= of_weights + of_inputs + 1e-5 * (1 + expected.abs())).all()
    assert distance(found, expected) < 0.02
    assert all(torch.equal(rounded(x[i, j : j + 1]), rounded(x)[i, j : j + 1]) for i in range(5) for j in range(7))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mbart"])
def test_logits_are_close_and_the_model_stays_as_it_is(
    family: str, precision: Any, directories: dict[str, Path]
) -> None:
    model = load(directories[family], family).train()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    twin = in_precision(model, precision).eval()
    assert model.training
    assert distance(logits_of(twin, family), logits_of(model.eval(), family)) < 0.05
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    table, head = twin.get_input_embeddings().weight, twin.get_output_embeddings()
    if precision == "int8":
        assert isinstance(head, Int8Linear)
        assert table.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert not [one for one in twin.modules() if type(one) is nn.Linear]
    else:
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert (head.weight is table) == is_tied
        assert {parameter.dtype for parameter in twin.parameters()} == {torch.bfloat16}
        assert all(table.dtype == torch.float32 for name, table in twin.named_buffers() if "inv_freq" in name)


@pytest.mark.parametrize("family", ["marian", "t5", "nllb", "mbart50"])
def test_every_family_runs_in_int8(family: str, tiny_models: dict[str, Path]) -> None:
    model = reload_model(tiny_models[family], "translation").eval()
    inputs = inputs_of("mbart")
    with torch.no_grad():
        assert distance(in_precision(model, "int8")(**inputs).logits, model(**inputs).logits) < 0.05


@pytest.mark.parametrize("method", [*METHODS, "bottleneck"])
@pytest.mark.parametrize("family", ["llama", "mbart"])
def test_adapters(family: str, method: str, directories: dict[str, Path]) -> None:
    model = trained_adapter(directories[family], family, method)
    expected, adapted = logits_of(model, family), {n: p.clone() for n, p in model.named_parameters()}
    assert distance(logits_of(in_precision(model, "bfloat16"), family), expected) < 0.05
    if method == "dora":
        with pytest.raises(ConfigError, match="dora computes with the base's own weights"):
            in_precision(model, "int8")
        return
    twin = in_precision(model, "int8")
    assert distance(logits_of(twin, family), expected) < 0.05
    assert any(isinstance(one, Int8Linear) for one in twin.modules())
    ours = dict(twin.named_parameters())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(ours[name] is model.get_parameter(name) for name in trained)
    assert all(torch.equal(p, adapted[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_4_or_8_bits(bits: Any, tmp_path: Path) -> None:
    directory = make_tiny_llm(tmp_path / "llama", hidden_size=64, intermediate_size=128, head_dim=32)
    config = ModelConfig(path=str(directory), quantization=QuantizationConfig(bits=bits), dtype="float32")
    base = load_model(config, 1, task="causal_lm", frozen=True)
    model = add_adapter(base, AdapterConfig(method="lora"), task="causal_lm", total_steps=1, seed=1).eval()
    assert distance(logits_of(in_precision(model, "bfloat16"), "llama"), logits_of(model, "llama")) < 0.05
    with pytest.raises(ConfigError, match="in 4 or 8 bits already"):
        in_precision(model, "int8")


def test_a_rank_needs_all_weights() -> None:
    with pytest.raises(ConfigError, match="int8 needs all weights on every rank"):
        in_precision(nn.Linear(2, 2), "int8", is_whole=False)


@pytest.fixture(scope="module")
def real_rows() -> list[Row]:
    with gzip.open(EXAMPLES / "data" / "libreoffice-help.en-de.dev.tsv.gz", "rt", encoding="utf-8") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Row("", line["source"], line["target"], "en_XX", "de_DE") for line in islice(lines, NUM_ROWS)]


def translator(precision: str) -> Translator:
    changes = {
        "model": {"dtype": "float32"},
        "data": {"source_language": "en_XX", "target_language": "de_DE"},
        "evaluation": {"beam_size": 2, "max_length_ratio": 1.5, "precision": precision},
    }
    return open_translator(open_subject(str(EXAMPLES / "base"), changes))


def test_scores_of_a_trained_model_stay_within_two_points(real_rows: list[Row]) -> None:
    references = [row.target for row in real_rows]
    scores, texts = {}, {}
    for precision in ("model", "bfloat16", "int8"):
        texts[precision] = [one.outputs[0].text for one in translator(precision).of_rows(real_rows)]
        scores[precision] = corpus_scores(
            texts[precision], references, ["bleu", "chrf"], target_language="de_DE"
        ).values
    for precision in ("bfloat16", "int8"):
        same = sum(ours == theirs for ours, theirs in zip(texts[precision], texts["model"], strict=True))
        assert NUM_ROWS / 3 < same < NUM_ROWS
        for metric in ("bleu", "chrf"):
            assert scores[precision][metric] == pytest.approx(scores["model"][metric], abs=2.0)
