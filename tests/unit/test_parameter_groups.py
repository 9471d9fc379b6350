"""Weight decay, layer-wise learning rates, new heads and late starts as parameter groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.config.schema import OptimizerConfig
from harness.engine.groups import IS_HIDDEN_MATRIX, LR_SCALE, learning_rate_scales, parameter_groups
from tests.unit.test_freeze import make


def names_of(model: Any, group: dict[str, Any]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 1e-3, "weight_decay": 0.1, **changes})


@pytest.mark.parametrize("family", ["mbart", "t5", "llama", "gpt2", "bert"])
def test_matrices_decay_and_nothing_more_is_asked_for(family: str) -> None:
    model = make(family)
    matrices, vectors = parameter_groups(model, config())
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert matrices[LR_SCALE] == vectors[LR_SCALE] == 1.0
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group() -> None:
    model = make("llama")
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    (group,) = parameter_groups(model, config())
    assert names_of(model, group) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "bert",
            {
                "bert.embeddings.word_embeddings.weight": 4,
                "bert.embeddings.LayerNorm.weight": 4,
                "bert.encoder.layer.0.output.dense.weight": 3,
                "bert.encoder.layer.2.output.dense.bias": 1,
                "bert.pooler.dense.weight": 0,
                "classifier.weight": 0,
            },
        ),
        (
            "llama",
            {
                "model.embed_tokens.weight": 4,
                "model.layers.2.mlp.up_proj.weight": 1,
                "model.norm.weight": 0,
                "lm_head.weight": 0,
            },
        ),
        ("gpt2", {"transformer.wte.weight": 4, "transformer.wpe.weight": 4, "transformer.h.0.ln_1.weight": 3}),
        (
            "mbart",
            {
                "model.shared.weight": 4,
                "model.decoder.embed_positions.weight": 4,
                "model.encoder.layernorm_embedding.weight": 4,
                "model.encoder.layers.0.fc1.weight": 3,
                "model.encoder.layers.2.fc1.weight": 1,
                "model.encoder.layer_norm.weight": 0,
                "model.decoder.layers.0.fc1.weight": 2,
                "model.decoder.layers.1.fc1.weight": 1,
                "model.decoder.layer_norm.bias": 0,
            },
        ),
        ("t5", {"shared.weight": 4, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 3}),
    ],
)
def test_layers_learn_more_slowly_the_deeper_they_lie(family: str, expected: dict[str, int]) -> None:
    """The numbers are powers of the decay, for three layers (two in the decoders)."""
    model = make(family)
    scales = learning_rate_scales(model, 0.5)
    assert {name: scales[name] for name in expected} == {name: 0.5**power for name, power in expected.items()}
    groups = parameter_groups(model, config(layer_decay=0.5))
    assert {group[LR_SCALE] for group in groups} == set(scales.values())
    for group in groups:
        assert {scales[name] for name in names_of(model, group)} == {group[LR_SCALE]}
        assert group["lr"] == 1e-3 * group[LR_SCALE]


def test_new_heads_have_their_own_rate() -> None:
    model = make("bert")
    heads = {"classifier.weight", "classifier.bias"}
    groups = parameter_groups(model, config(head_lr=5e-3, layer_decay=0.9), new_heads=heads)
    fast = [group for group in groups if group[LR_SCALE] == 5.0]
    assert [names_of(model, group) for group in fast] == [{"classifier.weight"}, {"classifier.bias"}]
    others = [group for group in groups if group[LR_SCALE] <= 1.0]
    assert sum(len(group["params"]) for group in [*fast, *others]) == len(list(model.parameters()))


def test_different_starts_never_share_a_group() -> None:
    model = make("llama")
    late = {name: 7 for name, _ in model.named_parameters() if ".layers.0." in name}
    groups = parameter_groups(model, config(), starts=late)
    assert [len(names_of(model, group) & late.keys()) > 0 for group in groups] == [False, False, True, True]
    assert set().union(*(names_of(model, group) for group in groups[2:])) == late.keys()


def test_muon_gets_the_matrices_inside_layers() -> None:
    model = make("t5")
    hidden = [group for group in parameter_groups(model, config(name="muon")) if group[IS_HIDDEN_MATRIX]]
    (names,) = (names_of(model, group) for group in hidden)
    assert "decoder.block.1.layer.2.DenseReluDense.wi.weight" in names
    assert "shared.weight" not in names
    assert not [name for name in names if "relative_attention_bias" in name]
    assert all(isinstance(p, torch.nn.Parameter) and p.ndim == 2 for p in hidden[0]["params"])
