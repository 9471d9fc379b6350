"""`evaluation:` of a run file on tiny models: what is asked for is what the outputs show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from harness.config.schema import RunConfig
from harness.evaluation.outputs import phrases_of
from harness.evaluation.settings import beam_settings
from harness.evaluation.translate import Translated, Translator
from harness.tasks.task import DecodingTask
from harness.training.offline import load_for_inference
from harness.training.prepare import build_task
from harness.training.subject import open_subject
from tests.pairs import PAIRS
from tests.tiny import LANGUAGES
from tests.tiny_llm import make_tiny_llm

SOURCES = [source for source, _ in PAIRS[:6]]


def opened(directory: Path, family: str) -> tuple[RunConfig, DecodingTask, Any]:
    source, target = LANGUAGES[family]
    config = open_subject(str(directory), {"data": {"source_language": source, "target_language": target}}).config
    task = build_task(config)
    assert isinstance(task, DecodingTask)
    return config, task, load_for_inference(config, None, torch.device("cpu"))


def translated(config: RunConfig, task: DecodingTask, model: Any, **options: Any) -> list[Translated]:
    content = config.model_dump(mode="json")
    content["evaluation"] = {"max_target_length": 12, **options}
    settings = beam_settings(RunConfig.model_validate(content), task)
    return Translator(model, task, settings, 4096, torch.device("cpu"))(SOURCES)


@pytest.mark.parametrize("family", ["mbart50", "marian", "t5", "llm"])
def test_bad_words_are_forbidden_as_they_are_written(tiny_models: dict[str, Path], tmp_path: Path, family: str) -> None:
    """As transformers' documentation has it: with and without a space before them."""
    directory = make_tiny_llm(tmp_path / "llm") if family == "llm" else tiny_models[family]
    source, target = LANGUAGES.get(family, (None, None))
    config = open_subject(str(directory), {"data": {"source_language": source, "target_language": target}}).config
    task = build_task(config)
    assert isinstance(task, DecodingTask)
    content = config.model_dump(mode="json")
    content["evaluation"] = {"bad_words": ["file", "the file"]}
    constraints = beam_settings(RunConfig.model_validate(content), task).constraints
    assert constraints is not None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "text_target" if family == "marian" else "text"
    written = ("file", " file", "the file", " the file")
    expected = [tuple(tokenizer(**{text: one}, add_special_tokens=False)["input_ids"]) for one in written]
    assert set(constraints.bad_words) == set(expected)
    assert len(constraints.bad_words) == (4 if family == "llm" else 2), "sentencepiece always puts a space first"


@pytest.mark.parametrize("family", ["mbart50", "marian", "t5", "llm"])
def test_phrases_are_met_as_they_are_written_at_the_start_or_after_a_space(
    tiny_models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    directory = make_tiny_llm(tmp_path / "llm") if family == "llm" else tiny_models[family]
    source, target = LANGUAGES.get(family, (None, None))
    task = build_task(
        open_subject(str(directory), {"data": {"source_language": source, "target_language": target}}).config
    )
    assert isinstance(task, DecodingTask)
    phrases = phrases_of(["file ||| the window", None, " ||| "], task)
    assert list(phrases) == [0]
    texts = [{task.to_text(way) for way in phrase} for phrase in phrases[0]]
    assert texts == [{"file"}, {"the window"}]
    first = {task.tokenizer.decode(way)[0] for phrase in phrases[0] for way in phrase}
    assert [len(phrase) for phrase in phrases[0]] == ([2, 2] if family == "llm" else [1, 1])
    assert first == ({" ", "f", "t"} if family == "llm" else {"f", "t"}), "sentencepiece always puts a space first"


def test_the_unknown_token_is_left_out_on_demand(tiny_models: dict[str, Path]) -> None:
    config, task, model = opened(tiny_models["marian"], "marian")
    unknown = task.tokenizer.unk_token_id
    with torch.no_grad():
        model.final_logits_bias[0, unknown] += 8.0
    assert beam_settings(config, task).constraints is None
    free, without = (
        translated(config, task, model, allow_unknown=allowed, num_hypotheses=5) for allowed in (True, False)
    )
    assert [one.outputs for one in free] != [one.outputs for one in without]
    content = config.model_dump(mode="json")
    content["evaluation"] = {"allow_unknown": False}
    constraints = beam_settings(RunConfig.model_validate(content), task).constraints
    assert constraints is not None
    assert constraints.bad_words == ((unknown,),)


def test_minimum_risk_takes_the_sample_that_is_expected_to_score_best(tiny_models: dict[str, Path]) -> None:
    parts = opened(tiny_models["mbart50"], "mbart50")
    drawn = translated(*parts, sampling={"temperature": 0.7}, num_hypotheses=8)
    chosen = translated(
        *parts, sampling={"temperature": 0.7}, minimum_risk={"utility": "chrf", "samples": 8}, num_hypotheses=2
    )
    for samples, best in zip(drawn, chosen, strict=True):
        texts = {one.text for one in samples.outputs}
        assert {one.text for one in best.outputs} <= texts
        assert len(best.outputs) == min(2, len(texts))
        assert 0 <= best.outputs[-1].score <= best.outputs[0].score <= 100


def test_the_seed_of_the_run_is_that_of_the_draws(tiny_models: dict[str, Path]) -> None:
    config, task, model = opened(tiny_models["t5"], "t5")
    same, again, other = (
        translated(config.model_copy(update={"seed": seed}), task, model, sampling={}) for seed in (17, 17, 18)
    )
    assert same == again != other
