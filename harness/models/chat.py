"""Conversations as a tokeniser's own chat template writes them, and which tokens of them the assistant says.

transformers renders a template in jinja2's ImmutableSandboxedEnvironment: it reaches no file, no module and none of
Python's internals, but nothing bounds its time and memory (docs/causal-lm.md). The rendering is tokenised in one piece,
so that training sees the tokens that inference sees; a token is learned if it begins in what the assistant says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]  # first character, and the one after the last

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
PLACEHOLDER = "\ufdd0"  # a character that no text has: Unicode keeps it for use inside programs
DATE = "26 Jul 2024"  # what Llama's templates write if given no date; today's would change the rows every day
USE_MARKS = "put {% generation %} and {% endgeneration %} around what the assistant says in the template"


class MarkedTokens(NamedTuple):
    """Token ids of a row, and for each token whether it is one to learn."""

    ids: list[int]
    is_learned: list[bool]


class ChatTemplate:
    """The chat template of one tokeniser.

    A template with {% generation %} marks says itself what the assistant says. With any other, a turn of the assistant
    is what rendering adds to the prompt that asks for it, up to the first special token after its content.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DataError if it cannot be told from the template where a turn of the assistant begins or ends."""
        self._tokenizer = tokenizer
        self._has_marks = bool(GENERATION_MARK.search(tokenizer.get_chat_template()))
        self._turn_end, self._rest = ("", "") if self._has_marks else self._end_of_turn()

    def encode(self, messages: Messages, where: str) -> list[MarkedTokens]:
        """The training examples of a conversation, the one with the last turn last; `where` names it in a DataError.

        There is one example if every turn of the assistant stands in the whole as it was said. Templates that drop
        earlier reasoning, for one, write a turn in another way once it is past: there is then an example per turn.
        What comes after the assistant's last turn is left out.
        """
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return [encode_marked(self._tokenizer, self._render(messages, where), [])]
        if self._has_marks:
            return [self._encode_by_marks(messages[: answers[-1] + 1], where)]
        turns = [self._turn(messages[: index + 1], where) for index in answers]
        whole, _ = turns[-1]
        if all(whole.startswith(text) for text, _ in turns):
            return [encode_marked(self._tokenizer, whole, [span for _, span in turns])]
        return [encode_marked(self._tokenizer, text, [span]) for text, span in turns]

    def prompt(self, messages: Messages, where: str) -> list[int]:
        """Token ids of what asks for the assistant's next turn."""
        text = self._render(messages, where, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _turn(self, messages: Messages, where: str) -> tuple[str, Span]:
        """A conversation up to the end of its last turn, and the assistant's part of that turn."""
        *before, last = messages
        number = len(messages)
        prompt = self._render(before, where, add_generation_prompt=True)
        text = self._render(messages, where)
        if not text.startswith(prompt) or not text.endswith(self._turn_end + self._rest):
            what = f"in the chat template's text, turn {number} is not what is added to the prompt that asks for it"
            raise DataError(what, where=where, hint=USE_MARKS)
        text = text.removesuffix(self._rest)
        said = text[len(prompt) :].removesuffix(self._turn_end)
        if not _without_spaces(said).endswith(_without_spaces(last["content"])):
            what = f"the chat template changes what the assistant says in turn {number}"
            raise DataError(what, where=where, hint="write the turn as the template does, or mend the template")
        return text, (len(prompt), len(text))

    def _encode_by_marks(self, messages: Messages, where: str) -> MarkedTokens:
        self._render(messages, where)  # for its checks
        encoded = self._tokenizer.apply_chat_template(
            list(messages), date_string=DATE, return_dict=True, return_assistant_tokens_mask=True
        )
        return MarkedTokens(encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]])

    def _end_of_turn(self) -> tuple[str, str]:
        """What ends the assistant's turn, special token included, and what the template writes after the last one."""
        question, answer = {"role": "user", "content": "."}, {"role": "assistant", "content": PLACEHOLDER}
        where = "chat template"
        prompt = self._render([question], where, add_generation_prompt=True)
        text, _, tail = self._render([question, answer], where).partition(PLACEHOLDER)
        header = text.removeprefix(prompt).strip()
        if header and prompt == self._render([question], where):
            what = f"it has no generation prompt, so that {header!r} would count as said by the assistant"
            raise DataError(what, where=where, hint=f"let it mind `add_generation_prompt`, or {USE_MARKS}")
        tokens = {*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens}
        longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        ends = [match.end() for match in re.finditer("|".join(map(re.escape, longest_first)), tail) if match[0]]
        if not ends:
            what = "no special token ends the assistant's turn: the model would not learn to stop"
            raise DataError(what, where=where, hint="write {{ eos_token }} after what the assistant says")
        return tail[: ends[0]], tail[ends[0] :]

    def _render(self, messages: Messages, where: str, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises DataError if the template refuses it or leaves out what others than the
        assistant say."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, date_string=DATE
            )
        except Exception as error:  # a template is a program
            raise DataError(f"the chat template cannot write this: {error}", where=where) from error
        spaceless = _without_spaces(text)
        for number, message in enumerate(messages, start=1):
            if message["role"] != "assistant" and _without_spaces(message["content"]) not in spaceless:
                what = f"the chat template leaves out turn {number}, of the role {message['role']!r}"
                raise DataError(what, where=where, hint="put its text into a turn of the user")
        return str(text)


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span], *, add_special_tokens: bool = False
) -> MarkedTokens:
    """Tokens of a text; those that begin within a span are to be learned. Raises DataError for a slow tokeniser."""
    if not tokenizer.is_fast:
        raise DataError("the tokeniser does not tell where its tokens stand", hint="use a model with a tokenizer.json")
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return MarkedTokens(encoded["input_ids"], [any(a <= start < b for a, b in spans) for start in starts])


def _without_spaces(text: str) -> str:
    return "".join(text.split())
