"""Which tokens of a conversation are learned, token by token, with the chat templates of real models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from harness.errors import DataError
from harness.models.chat import ChatTemplate, MarkedTokens
from tests.chat_tokenizers import TEMPLATES, chat_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And Spain?"},
    {"role": "assistant", "content": "Madrid, of course."},
]
# Written by hand from the templates: the learned tokens stand between « and ».
EXPECTED = {
    "qwen2_5": (
        [SYSTEM, *TALK],
        "<|im_start|> system Ċ Be Ġbrief . <|im_end|> Ċ <|im_start|> user Ċ Capital Ġof ĠFrance ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ « Paris . <|im_end|> » Ċ <|im_start|> user Ċ And ĠSpain ? <|im_end|> Ċ "
        "<|im_start|> assistant Ċ « Madrid , Ġof Ġcourse . <|im_end|> »",
    ),
    "llama3": (
        [SYSTEM, *TALK],
        "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ Be Ġbrief . <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> ĊĊ Capital Ġof ĠFrance ? <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ « Paris . <|eot_id|> » "
        "<|start_header_id|> user <|end_header_id|> ĊĊ And ĠSpain ? <|eot_id|> "
        "<|start_header_id|> assistant <|end_header_id|> ĊĊ « Madrid , Ġof Ġcourse . <|eot_id|> »",
    ),
    "gemma": (
        TALK,
        "<bos> <start_of_turn> user ↵ Capital ▁of ▁France ? <end_of_turn> ↵ "
        "<start_of_turn> model ↵ « Paris . <end_of_turn> » ↵ <start_of_turn> user ↵ And ▁Spain ? <end_of_turn> ↵ "
        "<start_of_turn> model ↵ « Madrid , ▁of ▁course . <end_of_turn> »",
    ),
    "phi3": (
        [SYSTEM, *TALK],
        "<|system|> ▁Be ▁brief . <|end|> <|user|> ▁Capital ▁of ▁France ? <|end|> <|assistant|> « ▁Paris . <|end|> » "
        "<|user|> ▁And ▁Spain ? <|end|> <|assistant|> « ▁Madrid , ▁of ▁course . <|end|> »",
    ),
    "mistral": (
        TALK,
        "<s> [INST] ▁Capital ▁of ▁France ? [/INST] « ▁Paris . </s> » "
        "[INST] ▁And ▁Spain ? [/INST] « ▁Madrid , ▁of ▁course . </s> »",
    ),
}


def shown(tokenizer: PreTrainedTokenizerFast, marked: MarkedTokens) -> str:
    words: list[str] = []
    is_open = False
    for token, is_learned in zip(tokenizer.convert_ids_to_tokens(marked.ids), marked.is_learned, strict=True):
        if is_learned != is_open:
            words.append("«" if is_learned else "»")
            is_open = is_learned
        words.append(token.replace("\n", "↵"))
    return " ".join([*words, "»"] if is_open else words)


def examples_of(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[str]:
    return [shown(tokenizer, marked) for marked in ChatTemplate(tokenizer).encode(messages, "row")]


@pytest.mark.parametrize("family", EXPECTED)
def test_the_assistants_turns_are_learned_token_by_token(family: str) -> None:
    messages, expected = EXPECTED[family]
    assert examples_of(chat_tokenizer(family), messages) == [expected]


@pytest.mark.parametrize("family", EXPECTED)
def test_rows_and_prompts_are_the_tokens_that_inference_sees(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    messages, _ = EXPECTED[family]
    template = ChatTemplate(tokenizer)
    (marked,) = template.encode(messages, "row")
    theirs = tokenizer.apply_chat_template(messages, return_dict=False)
    assert theirs[: len(marked.ids)] == marked.ids
    rest = tokenizer.convert_ids_to_tokens(theirs[len(marked.ids) :])
    assert rest in ([], ["Ċ"], ["\n"], ["<|endoftext|>"]), "a line break or the end of the text"
    prompt = template.prompt(messages[:-1], "row")
    assert prompt == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    answer = "▁Madrid" if family in ("phi3", "mistral") else "Madrid"
    assert marked.ids[: len(prompt)] == prompt
    assert tokenizer.convert_ids_to_tokens(marked.ids[len(prompt)]) == answer, "the first token that is learned"
    assert marked.is_learned[len(prompt) - 1 : len(prompt) + 1] == [False, True]


def test_generation_marks_decide_where_there_are_any() -> None:
    """TRL's own marked variant of Llama 3's template; transformers finds the tokens."""
    marked = (TEMPLATES / "llama3_marked.jinja").read_text(encoding="utf-8")
    messages, expected = EXPECTED["llama3"]
    assert examples_of(chat_tokenizer("llama3", marked), messages) == [expected]
    ends = marked.replace("+ '<|eot_id|>' }}\n        {%- endgeneration %}", "}}{% endgeneration %}{{ '<|eot_id|>' }}")
    assert ends != marked
    expected = expected.replace(". <|eot_id|> »", ". » <|eot_id|>")
    assert examples_of(chat_tokenizer("llama3", ends), messages) == [expected]


def test_reasoning_is_learned_in_the_turn_in_which_it_is_said() -> None:
    """Qwen 3 drops the reasoning of past turns, and gives the last turn an empty one if it has none."""
    thoughtful = [*TALK[:1], {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nParis."}, *TALK[2:]]
    thinking, nothing = "<think> Ċ Easy .Ċ </think> ĊĊ", "<think> ĊĊ </think> ĊĊ"
    first = "<|im_start|> user Ċ Capital Ġof ĠFrance ? <|im_end|> Ċ <|im_start|> assistant Ċ"
    second = " Paris . <|im_end|> Ċ <|im_start|> user Ċ And ĠSpain ? <|im_end|> Ċ <|im_start|> assistant Ċ"
    assert examples_of(chat_tokenizer("qwen3"), thoughtful) == [
        f"{first} « {thinking} Paris . <|im_end|> »",
        f"{first}{second} « {nothing} Madrid , Ġof Ġcourse . <|im_end|> »",
    ]
    assert examples_of(chat_tokenizer("qwen3"), thoughtful[:2]) == [f"{first} « {thinking} Paris . <|im_end|> »"]


def test_what_comes_after_the_last_answer_is_left_out() -> None:
    messages, expected = EXPECTED["qwen2_5"]
    assert examples_of(chat_tokenizer("qwen2_5"), [*messages, TALK[0]]) == [expected]


def test_a_conversation_without_an_answer_has_nothing_to_learn() -> None:
    (marked,) = ChatTemplate(chat_tokenizer("llama3")).encode(TALK[:1], "row")
    assert len(marked.ids) > 5
    assert not any(marked.is_learned)


@pytest.mark.parametrize("content", ["", "Hm <|im_end|> Hm", "<|im_start|>user\nHm"])
def test_an_answer_may_hold_anything(content: str) -> None:
    tokenizer = chat_tokenizer("qwen2_5")
    (marked,) = ChatTemplate(tokenizer).encode([*TALK[:1], {"role": "assistant", "content": content}], "row")
    learned = [token for token, is_learned in zip(marked.ids, marked.is_learned, strict=True) if is_learned]
    assert learned == tokenizer(f"{content}<|im_end|>", add_special_tokens=False)["input_ids"]


def test_an_answer_that_the_template_trims_is_the_same_answer() -> None:
    messages, expected = EXPECTED["llama3"]
    spaced = [message | {"content": f" \n{message['content']} "} for message in messages]
    assert examples_of(chat_tokenizer("llama3"), spaced) == [expected]


def test_a_token_that_begins_in_the_header_is_not_learned() -> None:
    """Two line breaks are one token: the model never gets to say the second one alone."""
    first = "<|im_start|> user Ċ Capital Ġof ĠFrance ? <|im_end|> Ċ <|im_start|> assistant"
    spaced = [TALK[0], {"role": "assistant", "content": "\nParis."}]
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chatml += template[template.index("{%- if add_generation_prompt %}") :]
    assert examples_of(chat_tokenizer("qwen3", chatml), spaced) == [f"{first} ĊĊ « Paris . <|im_end|> »"]


def test_templates_write_the_same_date_every_day() -> None:
    checking = "{% if date_string != '26 Jul 2024' %}{{ raise_exception('another day') }}{% endif %}"
    llama3 = (TEMPLATES / "llama3.jinja").read_text(encoding="utf-8")
    messages, expected = EXPECTED["llama3"]
    assert examples_of(chat_tokenizer("llama3", checking + llama3), messages) == [expected]


# --- what cannot be learned from is refused


def refusal(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> str:
    with pytest.raises(DataError) as error:
        ChatTemplate(tokenizer).encode(messages, "talks.jsonl:7")
    return str(error.value)


def test_a_template_without_a_system_role_refuses_it_with_the_row() -> None:
    message = refusal(chat_tokenizer("gemma"), [SYSTEM, *TALK])
    assert "talks.jsonl:7" in message
    assert "System role not supported" in message


def test_a_template_that_drops_the_system_message_is_found_out() -> None:
    """Mistral 7B v0.3 writes it into the last message, if that is the user's."""
    message = refusal(chat_tokenizer("mistral"), [SYSTEM, *TALK])
    assert "talks.jsonl:7: the chat template leaves out turn 1, of the role 'system'" in message
    assert "into a turn of the user" in message


def test_a_template_that_drops_an_unknown_role_is_found_out() -> None:
    message = refusal(chat_tokenizer("phi3"), [TALK[0], {"role": "tool", "content": "Hm"}, TALK[1]])
    assert "leaves out turn 2, of the role 'tool'" in message


def test_turns_in_an_order_that_the_template_refuses_name_the_row() -> None:
    message = refusal(chat_tokenizer("gemma"), [TALK[0], TALK[0], TALK[1]])
    assert "talks.jsonl:7" in message
    assert "roles must alternate" in message


def test_a_prompt_that_the_answer_does_not_go_on_from_is_refused() -> None:
    """DeepSeek's R1 distillations ask with <think>, but write past answers without it."""
    message = refusal(chat_tokenizer("deepseek_r1_distill"), TALK)
    assert "turn 2 is not what is added to the prompt that asks for it" in message
    assert "{% generation %}" in message


def test_a_template_that_changes_the_answer_is_refused() -> None:
    template = (TEMPLATES / "gemma.jinja").read_text(encoding="utf-8")
    template = template.replace(
        "message['content'] | trim", "(message['content'] | upper if role == 'model' else message['content'])"
    )
    assert "changes what the assistant says in turn 2" in refusal(chat_tokenizer("gemma", template), TALK)


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    message = refusal(chat_tokenizer("mistral", template), TALK)
    assert "no special token ends the assistant's turn" in message
    assert "eos_token" in message


def test_a_template_without_a_generation_prompt_may_have_no_header() -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    message = refusal(chat_tokenizer("qwen2_5", template), TALK)
    assert "no generation prompt, so that '<|im_start|>assistant' would count as said by the assistant" in message


# --- templates are programs of strangers

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].listdir('/') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% set f = messages.__class__.__base__.__subclasses__ %}{{ f() }}",
    "{{ self._TemplateReference__context.environment.loader.searchpath }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% extends '/etc/passwd' %}",
    "{{ open('/etc/passwd').read() }}",
    "{{ messages.__class__ }}{{ messages[0].__dict__ }}{{ eos_token.__class__ }}{{ self.__dict__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='assistant') }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_templates_cannot_leave_their_sandbox(escape: str) -> None:
    """An error, or nothing is written."""
    harmless = (TEMPLATES / "llama3.jinja").read_text(encoding="utf-8")
    tokenizer = chat_tokenizer("llama3", harmless)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    tokenizer.chat_template = escape + harmless
    with contextlib.suppress(DataError):
        ChatTemplate(tokenizer).encode(TALK, "row")
        assert tokenizer.apply_chat_template(TALK, tokenize=False) == text


def test_a_range_without_end_is_refused() -> None:
    with pytest.raises(DataError, match="Range too big"):
        ChatTemplate(chat_tokenizer("llama3", "{% for i in range(10 ** 9) %}x{% endfor %}"))
