"""Ensembles against `transformers` models whose probabilities are averaged by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.decoding.beam import BeamSettings
from harness.errors import ConfigError
from harness.models.ensemble import Ensemble
from harness.models.precision import in_precision
from tests.numerics.test_beam import EOS, FAMILIES, PAD, PREFIXES, decode_rows_of, make_batch, make_model

LONGEST = 9


def other_model(family: str) -> Any:
    model = make_model(family)
    with torch.no_grad():
        for matrix in (weight for weight in model.parameters() if weight.ndim == 2):
            matrix += 0.15 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5))
    return model


def after(models: list[Any], source: dict[str, Tensor], tokens: tuple[int, ...]) -> Tensor:
    """log of the mean probability [V] of the next token."""
    decoder = torch.tensor([tokens])
    p = [model(**source, decoder_input_ids=decoder).logits[0, -1].double().softmax(-1) for model in models]
    log_p_V = torch.stack(p).mean(0).log()
    log_p_V[PAD] = -torch.inf
    return log_p_V


def plain_search(
    models: list[Any], source: dict[str, Tensor], prefix: list[int], beams: int
) -> tuple[float, list[int]]:
    """The best output and its score under transformers' rule, in plain Python."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, tuple(prefix))]
    finished: list[tuple[float, list[int]]] = []
    for length in range(len(prefix), LONGEST + 1):
        rows = [(total, tokens, after(models, source, tokens).tolist()) for total, tokens in running]
        longer = [(total + p, (*tokens, token)) for total, tokens, row in rows for token, p in enumerate(row)]
        candidates = sorted(longer, reverse=True)[: 2 * beams]
        ended = [one for one in candidates[:beams] if one[1][-1] == EOS or length == LONGEST]
        finished += [(total / length, list(tokens[1:])) for total, tokens in ended]
        finished = sorted(finished, reverse=True)[:beams]
        running = [one for one in candidates if one[1][-1] != EOS][:beams]
        if len(finished) == beams and running[0][0] / length <= finished[-1][0]:
            break
    return finished[0]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_probabilities_are_averaged(family: str, beams: int) -> None:
    models, batch = [make_model(family), other_model(family)], make_batch(rows=5)
    settings = BeamSettings(beams, 1.0, max_length=LONGEST)
    found = decode_rows_of(Ensemble(models), family, batch, settings, max_tokens=60)
    alone = decode_rows_of(models[0], family, batch, settings, max_tokens=60)
    start, forced = PREFIXES[family]
    for row in range(5):
        length = int(batch[1][row].sum())
        source = {"input_ids": batch[0][row : row + 1, :length], "attention_mask": batch[1][row : row + 1, :length]}
        score, tokens = plain_search(models, source, [start] if forced is None else [start, forced], beams)
        tokens = tokens[forced is not None :]
        assert found[row][0].token_ids == tokens[: tokens.index(EOS) if EOS in tokens else None]
        assert found[row][0].score == pytest.approx(score, rel=1e-5)
    assert [found[row][0].token_ids for row in range(5)] != [alone[row][0].token_ids for row in range(5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_itself_is_the_model(family: str) -> None:
    model, batch = make_model(family), make_batch(rows=6)
    settings = BeamSettings(4, 1.0, max_length=15, num_hypotheses=4)
    expected = decode_rows_of(model, family, batch, settings, max_tokens=100)
    found = decode_rows_of(Ensemble([model, model]), family, batch, settings, max_tokens=100)
    for row, best in expected.items():
        assert [one.token_ids for one in found[row]] == [one.token_ids for one in best]
        assert [one.score for one in found[row]] == pytest.approx([one.score for one in best], rel=1e-5)


def test_members_decode_in_bfloat16_and_int8() -> None:
    ensemble, batch = Ensemble([make_model("marian"), other_model("marian")]), make_batch(rows=3)
    settings = BeamSettings(3, 1.0, max_length=9)
    for precision in ("bfloat16", "int8"):
        found = decode_rows_of(in_precision(ensemble, precision), "marian", batch, settings, max_tokens=100)
        assert sorted(found) == [0, 1, 2]


@torch.no_grad()
def test_its_loss_is_that_of_the_averaged_probabilities() -> None:
    models, (ids_BS, mask_BS) = [make_model("t5"), other_model("t5")], make_batch(rows=3)
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "decoder_input_ids": ids_BS}
    expected = torch.stack([model(**inputs).logits.softmax(-1) for model in models]).mean(0)
    torch.testing.assert_close(Ensemble(models)(**inputs).logits.softmax(-1), expected)


def test_vocabularies_of_two_sizes_are_refused() -> None:
    larger = make_model("t5")
    larger.resize_token_embeddings(48)
    with pytest.raises(ConfigError, match=r"outputs for \[40, 48\] tokens"):
        Ensemble([make_model("t5"), larger])
