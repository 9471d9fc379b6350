"""`harness evaluate --invariance` on a model, and on one into which a dependence on neighbours has been built."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from harness.cli.main import main
from harness.training import invariance
from tests.pairs import PAIRS
from tests.runs import write_pairs
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("invariance")
    write_pairs(directory / "test.tsv", PAIRS[:12])
    return make_tiny_model("mbart", directory / "model")


def evaluate(model, output, *options: Any) -> tuple[int, dict[str, Any]]:
    languages = ("--source-language", "en_XX", "--target-language", "de_DE")
    batch = ("--beam-size", "3", "--max-length", "20", "--max-tokens", "200")
    data = str(model.with_name("test.tsv"))
    code = main(
        ["evaluate", str(model), "--data", data, *languages, *batch, "--invariance", "--output", str(output), *options]
    )
    return code, json.loads((output / "invariance.json").read_text())


def test_no_output_changes_in_float32(model, tmp_path, capsys):
    code, report = evaluate(model, tmp_path / "report", "--dtype", "float32")
    assert code == 0
    assert report["rows"] == 12
    assert len(report["ways"]) == 5
    assert report["changes"] == []
    assert "one row at a time" in capsys.readouterr().out


def plant(monkeypatch, disturb) -> None:
    """Every model that the command loads gets logits + disturb(logits)."""
    load = invariance.load_together

    def load_disturbed(*arguments: Any) -> Any:
        loaded = load(*arguments)
        loaded.lm_head.register_forward_hook(lambda module, inputs, logits: logits + disturb(logits))
        return loaded

    monkeypatch.setattr(invariance, "load_together", load_disturbed)


def test_a_dependence_on_neighbours_is_found(model, tmp_path, capsys, monkeypatch):
    plant(monkeypatch, lambda logits: (torch.arange(logits.shape[-1]) * len(logits)).sin().to(logits.dtype))
    code, report = evaluate(model, tmp_path / "report", "--dtype", "float32")
    assert code == 1
    kinds = {change["kind"] for change in report["changes"]}
    assert "depends on neighbours" in kinds
    assert any(way["changed"] > way["ties"] for way in report["ways"])
    change = report["changes"][0]
    assert change["source"] == PAIRS[change["row"] - 1][0]
    assert change["outputs"][0] != change["outputs"][1]
    assert "depends on neighbours" in capsys.readouterr().out


def test_what_goes_away_in_double_precision_is_a_numeric_tie(model, tmp_path, monkeypatch):
    """The same, as rounding would do it: not in float64."""

    def disturb(logits):
        wave = (torch.arange(logits.shape[-1]) * len(logits)).sin().to(logits.dtype)
        return wave if logits.dtype == torch.float32 else torch.zeros_like(logits)

    plant(monkeypatch, disturb)
    code, report = evaluate(model, tmp_path / "report", "--dtype", "float32")
    assert code == 0
    assert report["changes"]
    assert {change["kind"] for change in report["changes"]} == {"numeric tie"}
    assert all(way["changed"] == way["ties"] for way in report["ways"])
