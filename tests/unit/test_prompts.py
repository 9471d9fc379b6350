"""Pairs as prompts of a language model: templates, examples, what is learned, and what the model is asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.load import load_run_config
from harness.config.schema import DEFAULT_PROMPT, DataSource, LossConfig, RunConfig
from harness.data.cache import prepare_rows
from harness.data.prompts import pair_prompts
from harness.data.rows import BadRow, Row
from harness.errors import DataError
from harness.models.stops import StopStrings
from harness.tasks.causal_lm import CausalTask
from harness.training.prepare import encoding
from tests.pairs import PAIRS
from tests.tiny_llm import train_llm_tokenizer

CHAT, PLAIN = train_llm_tokenizer(), train_llm_tokenizer(chat_template=None)
CPU = torch.device("cpu")
LANGUAGES = {"source_language": "English", "target_language": "German"}
ROWS = [Row(f"dev.tsv:{n}", s, t, "English", "German") for n, (s, t) in enumerate(PAIRS[5:11], start=2)]


def content_of(task: str = "causal_lm", **data: Any) -> dict[str, Any]:
    return {
        "name": "x", "task": task, "model": {"path": "x"}, "optimizer": {"lr": 1.0}, "schedule": {"steps": 1},
        "data": {"format": "pairs", "train": [{"path": "x.tsv"}], **LANGUAGES, **data},
        "batch": {"tokens_per_step": 4096, "max_tokens_per_device": 4096},
    }  # fmt: skip


def config_of(**data: Any) -> RunConfig:
    return RunConfig.model_validate(content_of(**data))


def task_of(tokenizer: Any = PLAIN, *, stops: tuple[str, ...] = (), **data: Any) -> CausalTask:
    return CausalTask(tokenizer, config_of(**data).data, LossConfig(), stop_strings=stops)


def shots(directory: Path, pairs: list[tuple[str, str]] = PAIRS[:3]) -> str:
    path = directory / "shots.tsv"
    path.write_text("source\ttarget\n" + "".join(f"{s}\t{t}\n" for s, t in pairs), encoding="utf-8")
    return str(path)


def test_a_language_model_of_pairs_is_scored_as_translation_with_a_plain_prompt() -> None:
    config = config_of()
    assert config.evaluation is not None
    assert (config.evaluation.metrics, config.watched_metric) == (["bleu", "chrf"], "bleu")
    assert config.data.prompt_template == DEFAULT_PROMPT
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert RunConfig.model_validate(content_of(task="translation")).data.prompt_template is None


def test_a_pair_becomes_a_prompt_and_its_completion() -> None:
    written = pair_prompts(config_of().data).written(Row("x:1", "Hi {there}.", " Hallo. ", "English", "German"))
    assert written.source == "Translate this from English to German:\nEnglish: Hi {there}.\nGerman:"
    assert written.target == " Hallo."
    assert [turn["content"] for turn in written.messages] == [written.source, "Hallo."]


@pytest.mark.parametrize(
    ("template", "source", "target"),
    [
        ("{source}\n", "Hi.\n", "Hallo."),
        ("{source} = ", "Hi. =", " Hallo."),
        ("{{{source}}}", "{Hi.}", " Hallo."),
        ("{target_language}: {source} -> {target_language}:", "German: Hi. -> German:", " Hallo."),
    ],
)
def test_the_space_belongs_to_the_completion(template: str, source: str, target: str) -> None:
    written = pair_prompts(config_of(prompt_template=template).data).written(Row("", "Hi.", "Hallo.", "en", "German"))
    assert (written.source, written.target) == (source, target)


def test_examples_stand_where_the_template_says_or_in_front(tmp_path: Path) -> None:
    row = Row("x:1", "Hi.", "Hallo.", "English", "German")
    few_shot = {"path": shots(tmp_path), "examples": 2}
    plain = "".join(f"English: {source}\nGerman: {target}\n" for source, target in PAIRS[:2])
    default = pair_prompts(config_of(few_shot=few_shot).data).written(row).source
    assert default == f"Translate this from English to German:\n{plain}English: Hi.\nGerman:"
    few_shot["template"] = "{source}={target};"
    own = "".join(f"{source}={target};" for source, target in PAIRS[:2])
    in_front = pair_prompts(config_of(few_shot=few_shot, prompt_template="{source}=").data)
    assert in_front.written(row).source == f"{own}Hi.="


def test_the_example_of_the_manual_shows_three_pairs_and_asks_in_the_default_words() -> None:
    data = load_run_config(Path("examples/llm-translation.yaml"), [], accelerator="cpu").data
    assert data.prompt_template == DEFAULT_PROMPT
    prompt = pair_prompts(data).written(Row("x:1", "Hallo.", "Hi.", "German", "English")).source
    assert prompt.startswith("Translate this from German to English:\nGerman: Öffnen Sie das Dokument")
    assert prompt.endswith("English: Right-click a cell.\nGerman: Hallo.\nEnglish:")
    assert prompt.count("\nGerman:") == 4


def test_examples_that_cannot_be_had(tmp_path: Path) -> None:
    for few_shot, message in (
        ({"path": str(tmp_path / "none.tsv")}, "no such file"),
        ({"path": shots(tmp_path), "examples": 4}, "3 rows can be read, and each prompt shall have 4"),
    ):
        with pytest.raises(DataError, match=message):
            pair_prompts(config_of(few_shot=few_shot).data)


def test_a_language_that_nobody_names_is_missed() -> None:
    with pytest.raises(DataError, match=r"the prompt says {target_language}, and x:1 names none") as caught:
        task_of(target_language=None).encode([Row("x:1", "Hi.", "Hallo.", "English")])
    assert caught.value.where == "data.target_language"


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("template", [None, "{source}\n", "{source} ="])
def test_the_answer_alone_is_learned_and_the_prompt_alone_is_asked(tokenizer: Any, template: str | None) -> None:
    task = task_of(tokenizer, prompt_template=template, system_prompt="Be brief." if tokenizer is CHAT else None)
    encoded, asked = task.encode(ROWS), task.encode_sources([Row("", r.source, "", "English", "German") for r in ROWS])
    for row, whole, prompt in zip(ROWS, encoded, asked, strict=True):
        learned = [int(label) for label in whole.labels if label != -100]
        assert task.to_text(learned) == row.target
        assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
        given = task.collate_sources([(whole.input_ids, whole.labels, 0)], CPU)["input_ids_BS"][0].tolist()
        assert given == prompt.input_ids
        assert row.target not in tokenizer.decode(given)
        assert row.source in tokenizer.decode(given)
        assert ("Be brief." in tokenizer.decode(given)) == (tokenizer is CHAT)


def test_a_row_that_is_an_example_is_not_trained_on_and_never_scored(tmp_path: Path) -> None:
    task = task_of(few_shot={"path": shots(tmp_path)})
    shown = Row("train.tsv:9", PAIRS[1][0].upper(), "Etwas anderes.", "English", "German")
    kept, left_out = task.encode_for_training([ROWS[0], shown])
    assert not isinstance(kept, BadRow)
    assert isinstance(left_out, BadRow)
    assert (left_out.reason, left_out.where) == ("few_shot", "train.tsv:9")
    with pytest.raises(DataError, match="few_shot: its source is one of the examples"):
        prepare_rows(
            "test", [DataSource(path=shots(tmp_path))], task.data,
            encode=task.encode_for_scores, fingerprint="x", cache_root=tmp_path / "cache", is_training=False,
        )  # fmt: skip


def test_rows_are_encoded_anew_when_the_examples_have_changed(tmp_path: Path) -> None:
    PLAIN.save_pretrained(tmp_path / "model")
    config = config_of(few_shot={"path": shots(tmp_path)})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(tmp_path / "model")})})
    task = task_of()
    before = encoding(config, task, is_training=True)["fingerprint"]
    assert encoding(config, task, is_training=True)["fingerprint"] == before
    shots(tmp_path, PAIRS[1:4])
    assert encoding(config, task, is_training=True)["fingerprint"] != before


def test_a_prompt_that_is_not_whole_is_refused() -> None:
    task = task_of(max_length=20)
    (scored,) = task.encode_for_scores(ROWS[:1])
    assert isinstance(scored, BadRow)
    assert scored.reason == "too_long"
    with pytest.raises(DataError, match=r"longer than data\.max_length"):
        task.encode_sources(ROWS[:1])


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_a_line_is_cut_until_its_prompt_fits(tokenizer: Any) -> None:
    task = task_of(tokenizer, max_length=150)
    source = " ".join(source for source, _ in PAIRS)
    long, short = task.encode_sources([Row("line 1", text, "", "English", "German") for text in (source, "Hi.")])
    assert (long.truncated, short.truncated) == (True, False)
    assert len(long.input_ids) in range(147, 151)
    text = tokenizer.decode(long.input_ids)
    (kept,) = re.findall(r"\nEnglish: (.*)\nGerman:", text)
    assert source.startswith(kept)
    assert text.replace(kept, "Hi.") == tokenizer.decode(short.input_ids)


def test_check_shows_the_prompt_as_text(tmp_path: Path) -> None:
    shown = task_of(few_shot={"path": shots(tmp_path)}).show(ROWS[0])
    assert shown.startswith(f"Translate this from English to German:\nEnglish: {PAIRS[0][0]}\n")
    assert f"English: {ROWS[0].source}\nGerman:\n\n" in shown
    assert "tokens are learned" in shown.splitlines()[-1]


def test_text_ends_before_the_first_stop_string() -> None:
    task = task_of(stops=("\n", "###"))
    for said, text in (("Ja.\nNein.", "Ja."), ("a###b\nc", "a"), ("no stop", "no stop"), ("\nlate", "")):
        assert task.to_text(PLAIN(said)["input_ids"]) == text


def test_an_output_is_stopped_by_the_token_that_completes_a_stop_string() -> None:
    stops = StopStrings(PLAIN, ("table.\n", "ä!"))
    for said in ("Open the table.\n", "Umlaut ä!"):
        ids = PLAIN(said)["input_ids"]
        assert len(ids) > 2
        for length in range(1, len(ids) + 1):
            tokens_RNL = torch.tensor([[ids + [0] * 3]])
            assert stops.reached(tokens_RNL, torch.tensor([length])).tolist() == [[length == len(ids)]]
