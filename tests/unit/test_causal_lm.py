"""What a document, a prompt with its completion, and a conversation become in tokens and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from harness.config.schema import DataConfig, DataSource, LossConfig
from harness.data.batches import pack
from harness.data.rows import Row
from harness.errors import DataError
from harness.tasks.causal_lm import CausalTask
from tests.pairs import PAIRS
from tests.tiny_llm import train_llm_tokenizer

TOKENIZER = train_llm_tokenizer()
PLAIN = train_llm_tokenizer(chat_template=None)
CPU = torch.device("cpu")
TALKS = [
    [{"role": "user", "content": source}, {"role": "assistant", "content": target}] for source, target in PAIRS[:5]
]
ROWS = [
    Row(f"talks.jsonl:{number}", talk[0]["content"], talk[1]["content"], messages=tuple(talk))
    for number, talk in enumerate(TALKS, start=1)
]


def task_of(tokenizer: Any, row_format: str = "messages", **changes: Any) -> CausalTask:
    data = DataConfig.model_validate({"train": [DataSource(path="x.jsonl")], "format": row_format, **changes})
    return CausalTask(tokenizer, data, LossConfig())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 90))
@settings(deadline=None)
def test_collate_finds_the_packs_again(sizes: list[int], capacity: int) -> None:
    packs = pack(np.arange(len(sizes)), np.array(sizes), capacity)
    task = task_of(TOKENIZER, "text", max_length=capacity)
    examples = [([1 + row] * sizes[row], [-100] * sizes[row], 0) for rows in packs for row in rows.tolist()]
    inputs = task.collate(examples, CPU).inputs
    for row, rows in enumerate(packs):
        ids, positions = (inputs[name][row].tolist() for name in ("input_ids", "position_ids"))
        num_tokens = sum(sizes[r] for r in rows)
        assert ids[:num_tokens] == [1 + r for r in rows.tolist() for _ in range(sizes[r])]
        assert positions[:num_tokens] == [place for r in rows for place in range(sizes[r])]
        assert not any(positions[num_tokens:])
    assert inputs["input_ids"].shape == (len(packs), max(sum(sizes[r] for r in rows) for rows in packs))


DOCUMENT = Row("docs.txt:1", " ".join(source for source, _ in PAIRS[:4]), "")


@pytest.mark.parametrize("max_length", [3, 7, 16, 1024])
def test_every_token_of_a_document_but_the_first_is_learned_once(max_length: int) -> None:
    task = task_of(TOKENIZER, "text", max_length=max_length)
    parts = [one[1] for one in task.encode_for_training([DOCUMENT]) if isinstance(one, tuple)]
    ids = [*TOKENIZER(DOCUMENT.source)["input_ids"], TOKENIZER.eos_token_id]
    read = [token for part in parts for token in part.input_ids]
    assert read == ids[: len(read)]
    assert len(ids) - len(read) in (0, 1), "the last token need not be read"
    learned = [label for part in parts for label in part.labels]
    assert [label for label in learned if label != -100] == ids[1:]
    assert not any(part.truncated for part in parts)
    assert all(len(part.input_ids) == len(part.labels) <= max_length for part in parts)
    assert [part.num_targets for part in parts] == [sum(label != -100 for label in part.labels) for part in parts]
    (cut,) = task.encode([DOCUMENT])
    assert (cut.input_ids, cut.labels) == (parts[0].input_ids, parts[0].labels)
    assert cut.truncated == (len(ids) > max_length), "an evaluation row is cut, and that is reported"


def test_a_document_has_the_special_tokens_of_its_tokeniser_and_an_end() -> None:
    tokenizer = train_llm_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = TOKENIZER(DOCUMENT.source)["input_ids"]
    special = [("<s>", bos), ("</s>", eos)]
    for template, ids in (("$A", [*text, eos]), ("<s> $A", [bos, *text, eos]), ("<s> $A </s>", [bos, *text, eos])):
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        (encoded,) = task_of(tokenizer, "text").encode([DOCUMENT])
        assert encoded.input_ids == ids
        assert encoded.labels == [*ids[1:], -100]


def prompt_of(task: CausalTask, row: Row) -> list[int]:
    """What is read before the last answer is written."""
    (one,) = task.encode([row])
    prompts: list[int] = task.collate_sources([(one.input_ids, one.labels, 0)], torch.device("cpu"))["input_ids_BS"][0]
    return torch.as_tensor(prompts).tolist()


def test_a_prompt_row_without_a_chat_template_is_prompt_completion_end() -> None:
    row = Row("rows.jsonl:1", "English: The dog sleeps.\nGerman:", " Der Hund schläft.")
    task = task_of(PLAIN, "prompt")
    (encoded,) = task.encode([row])
    prompt, completion = PLAIN(row.source)["input_ids"], PLAIN(row.target)["input_ids"]
    assert encoded.input_ids == [*prompt, *completion, PLAIN.eos_token_id]
    assert encoded.labels == [*[-100] * (len(prompt) - 1), *completion, PLAIN.eos_token_id, -100]
    assert encoded.num_targets == len(completion) + 1
    assert prompt_of(task, row) == prompt


def test_a_prompt_row_with_a_chat_template_is_a_conversation() -> None:
    assert task_of(TOKENIZER, "prompt").encode(ROWS) == task_of(TOKENIZER, "messages").encode(ROWS)


def test_the_system_prompt_is_for_conversations_that_have_none() -> None:
    task = task_of(TOKENIZER, system_prompt="Translate to German.")
    system = {"role": "system", "content": "Translate to German."}
    with_ours = Row("x", "", "", messages=(system, *ROWS[0].messages))
    with_other = Row("x", "", "", messages=({"role": "system", "content": "The dog."}, *ROWS[0].messages))
    first, second = task.encode([ROWS[0], with_ours])
    assert first == second
    assert task.encode([with_other]) == task_of(TOKENIZER).encode([with_other]) != [first]
    assert prompt_of(task, ROWS[0]) == TOKENIZER.apply_chat_template(
        [system, *TALKS[0][:1]], add_generation_prompt=True, return_dict=False
    )


def test_long_conversations_are_cut_at_the_end_and_say_so() -> None:
    (whole,) = task_of(TOKENIZER).encode(ROWS[:1])
    length = len(whole.input_ids)
    for max_length in (length, length - 1, 5):
        (cut,) = task_of(TOKENIZER, max_length=max_length).encode(ROWS[:1])
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:max_length], whole.labels[:max_length])
        assert cut.truncated == (max_length < length)
    assert cut.num_targets == 0, "the answer is cut off: nothing to learn"


def test_conversations_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template") as error:
        task_of(PLAIN).encode(ROWS)
    assert "data.format" in error.value.where


def test_what_check_shows_of_a_row() -> None:
    row = Row("x", "", "", messages=tuple(TALKS[0]) * 2)
    text = task_of(TOKENIZER).show(row)
    before, *answers = text.split("«")
    assert "<|im_start|>assistantĊ" in before.replace(" ", "")
    assert len(answers) == 2
    assert answers[-1].endswith("<|im_end|>»")
    (encoded,) = task_of(TOKENIZER).encode([row])
    assert text.startswith(f"{encoded.num_targets} of {len(encoded.input_ids)} tokens are learned: ")
    assert len(task_of(TOKENIZER, "text", max_length=9).show(DOCUMENT).splitlines()) > 3
