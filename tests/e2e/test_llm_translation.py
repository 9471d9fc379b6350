"""A language model as a translator: it learns pairs by a prompt, is scored as a translator, and translates lines."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.cli.main import main
from harness.scoring.scores import corpus_scores
from tests.llm_runs import llm_run
from tests.pairs import PAIRS
from tests.runs import run_ranks, write_pairs
from tests.tiny_llm import make_tiny_llm

pytestmark = pytest.mark.slow
LEARNED, SHOTS = PAIRS[:8], PAIRS[20:23]
TEMPLATE = "{examples}{source_language}: {source}\n{target_language}:"
SHOT = "{source_language}: {source}\n{target_language}: {target}\n"
LANGUAGES = {"source_language": "English", "target_language": "German"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model without chat template that has learned eight pairs by heart, with two examples in each prompt."""
    directory = tmp_path_factory.mktemp("llm-translation")
    model = make_tiny_llm(directory / "model", chat_template=None, hidden_size=64, intermediate_size=128)
    rows = write_pairs(directory / "rows.tsv", LEARNED)
    shots = write_pairs(directory / "shots.tsv", SHOTS)
    few_shot = {"path": str(shots), "examples": 2}
    data = {"format": "pairs", "train": [{"path": str(rows)}], "test": str(rows), "max_length": 256, **LANGUAGES}
    run = llm_run(
        directory, model, name="run", data={**data, "prompt_template": TEMPLATE, "few_shot": few_shot},
        optimizer={"lr": 1e-2}, schedule={"name": "linear", "warmup_steps": 5, "steps": 120},
        batch={"tokens_per_step": 1024, "max_tokens_per_device": 1024},
        evaluation={"beam_size": 3, "max_target_length": 60, "stop_strings": ["\n"]},
    )  # fmt: skip
    run_ranks([run], world_size=1)
    return SimpleNamespace(dir=directory / "run", model=model, rows=rows, shots=shots, directory=directory)


def command(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def scores_in(directory: Path) -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((directory / "scores.json").read_text())
    return scores


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_what_was_learned_is_scored_as_plain_pairs(trained: SimpleNamespace, tmp_path: Path) -> None:
    assert command("evaluate", trained.dir, "--output", tmp_path / "again") == 0
    (by_training,) = (trained.dir / "evaluations").glob("step-*-test")
    for directory in (tmp_path / "again", by_training):
        assert scores_in(directory)["bleu"] > 80.0
        assert lines_of(directory / "sources.txt") == [source for source, _ in LEARNED]
        assert lines_of(directory / "references.txt") == [target for _, target in LEARNED]
    hypotheses = lines_of(tmp_path / "again" / "hypotheses.txt")
    assert hypotheses == lines_of(by_training / "hypotheses.txt")
    expected = corpus_scores(hypotheses, [target for _, target in LEARNED], ["bleu"], target_language="German")
    assert scores_in(tmp_path / "again")["prompt"] == {
        "prompt_template": TEMPLATE, "system_prompt": None, "stop_strings": ["\n"],
        "few_shot": {"path": str(trained.shots), "examples": 2, "template": SHOT},
    }  # fmt: skip
    assert scores_in(tmp_path / "again")["bleu"] == pytest.approx(expected.values["bleu"])


def test_lines_are_translated_by_the_prompt_of_the_run(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    lines = [LEARNED[3][0], "", LEARNED[1][0]]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(lines).encode())))
    assert command("translate", trained.dir) == 0
    assert capsysbinary.readouterr().out.decode().splitlines() == [LEARNED[3][1], "", LEARNED[1][1]]


def test_every_line_gives_one_line(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    odd = ["", " ", "\t", "Hi.\tThere.", "a\x0bb\x85c\u2028d", "שלום עולם", "{source} {x}", "\x00", "Hi.\r", "\u3000"]
    lines = [LEARNED[3][0], *odd, "Open the table. " * 100, LEARNED[1][0]]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(lines).encode())))
    assert command("translate", trained.dir) == 0
    out, err = capsysbinary.readouterr()
    assert out.endswith(b"\n")
    said = out.decode().removesuffix("\n").split("\n")
    assert len(said) == len(lines)
    assert (said[0], said[-1]) == (LEARNED[3][1], LEARNED[1][1])
    assert [not text for text in said] == [not line.strip() for line in lines]
    assert err.decode() == "line 12 makes a prompt of more than 256 tokens: its end was left out\n"


def test_a_language_that_nobody_names_is_missed_before_a_line_is_read(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert command("translate", trained.model, "--source-language", "English") == 3
    assert "error: --target-language: the prompt says {target_language}" in capsys.readouterr().err


def test_a_model_without_training_is_scored_by_its_examples(trained: SimpleNamespace, tmp_path: Path) -> None:
    options = ["--source-language", "English", "--target-language", "German", "--beam-size", 1, "--max-length", 12]
    options += ["--format", "pairs", "--data", trained.rows, "--output", tmp_path / "shots"]
    overrides = [f"data.few_shot={{path: {trained.shots}, examples: 3}}", 'evaluation.stop_strings=["e"]']
    assert command("evaluate", trained.model, *options, *overrides) == 0
    scores = scores_in(tmp_path / "shots")
    assert scores["bleu"] < 10.0
    assert scores["chrf"] >= 0.0
    assert scores["nll"] > 3.0
    assert not any("e" in line for line in lines_of(tmp_path / "shots" / "hypotheses.txt"))


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["data.few_shot={path: ROWS}"], 3, "its source is one of the examples that stand in every prompt"),
        (["data.prompt_template='{text}'"], 2, "{text} is no name of a template"),
        (["data.max_length=9"], 3, "its prompt has 9 tokens (data.max_length) or more"),
        (["data.target_language=null"], 3, "the prompt says {target_language}"),
    ],
)
def test_a_mistake_gives_one_clear_message(
    trained: SimpleNamespace, overrides: list[str], code: int, message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    overrides = [override.replace("ROWS", str(trained.rows)) for override in overrides]
    assert command("evaluate", trained.dir, "--output", tmp_path / "none", *overrides) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
