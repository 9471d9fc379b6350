"""What the columns of a file mean: one entry of ``FORMATS`` for each value of the run file's `data.format`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.schema import DataConfig, DataSource
from harness.data.rows import BadRow, Message, Row, is_unicode

LANGUAGE_COLUMNS = ("source_language", "target_language")


class _Unusable(Exception):
    """A value that makes no row, with the reason and the detail of its BadRow."""


@dataclass(frozen=True)
class Columns:
    """Columns to read and how their values, in the order of ``names``, become a row.

    A file must have the ``required`` ones; a missing optional one gives None. ``keys`` tells the user how to name them.
    ``structured`` columns may hold lists and numbers as well as text.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    keys: str
    build: Callable[[str, Sequence[Any]], Row]
    structured: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return self.required + self.optional

    def row(self, where: str, values: Sequence[Any]) -> Row | BadRow:
        """A Row of the values, or the reason why they are none: not text, a NUL character, not Unicode."""
        text = "\t".join(value if isinstance(value, str) else repr(value) for value in values[: len(self.required)])
        try:
            for name, value in zip(self.names, values, strict=True):
                self._check(name, value)
            return self.build(where, values)
        except _Unusable as fault:
            reason, detail = fault.args
            return BadRow(where, reason, detail, text[:1000] if is_unicode(text) else "")

    def _check(self, name: str, value: Any) -> None:
        if value is None:
            if name in self.required:
                raise _Unusable("missing_field", f"`{name}` is null")
        elif isinstance(value, str):
            _check_text(value)
        elif name not in self.structured:
            raise _Unusable("wrong_type", f"`{name}` is {type(value).__name__}, not text")


def columns_of(source: DataSource, data: DataConfig) -> Columns:
    """The columns of one data source of the run file."""
    return FORMATS[data.format](source, data)


def _pairs(source: DataSource, data: DataConfig) -> Columns:
    languages = (
        source.source_language or data.source_language,
        source.target_language or data.target_language,
    )

    def build(where: str, values: Sequence[Any]) -> Row:
        text, translation, *named = values
        ours, theirs = (given or default for given, default in zip(named[:2], languages, strict=True))
        return Row(where, text, translation, ours, theirs, constraints=named[2] if constraints else None)

    constraints = (data.constraints_column,) if data.constraints_column else ()
    keys = "data.source_column and data.target_column name the columns"
    return Columns((data.source_column, data.target_column), (*LANGUAGE_COLUMNS, *constraints), keys, build)


def _text(source: DataSource, data: DataConfig) -> Columns:
    def build(where: str, values: Sequence[Any]) -> Row:
        return Row(where, values[0], "")

    return Columns((data.text_column,), (), "data.text_column names the column", build)


def _prompt(source: DataSource, data: DataConfig) -> Columns:
    def build(where: str, values: Sequence[Any]) -> Row:
        prompt, completion = values
        turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        return Row(where, prompt, completion, messages=turns)

    keys = "data.prompt_column and data.completion_column name the columns"
    return Columns((data.prompt_column, data.completion_column), (), keys, build)


def _messages(source: DataSource, data: DataConfig) -> Columns:
    name = data.messages_column

    def build(where: str, values: Sequence[Any]) -> Row:
        turns = _turns(name, values[0])
        last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if last is None:
            raise _Unusable("nothing_to_learn", "no turn of the assistant")
        before = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns[:last])
        return Row(where, before, turns[last]["content"], messages=turns)

    return Columns((name,), (), "data.messages_column names the column", build, frozenset({name}))


def _labelled(source: DataSource, data: DataConfig) -> Columns:
    pair = (data.text_pair_column,) if data.text_pair_column else ()

    def build(where: str, values: Sequence[Any]) -> Row:
        text, label, *second = values
        return Row(where, text, _label(label), source_pair=second[0] if second else None)

    keys = "data.text_column, data.text_pair_column and data.label_column name the columns"
    required = (data.text_column, data.label_column, *pair)
    return Columns(required, (), keys, build, frozenset({data.label_column}))


FORMATS: dict[str, Callable[[DataSource, DataConfig], Columns]] = {
    "pairs": _pairs,
    "text": _text,
    "prompt": _prompt,
    "messages": _messages,
    "labelled": _labelled,
}


def _check_text(text: str) -> None:
    if "\0" in text:
        raise _Unusable("control_characters", "U+0000")
    if not is_unicode(text):
        raise _Unusable("not_utf8", "half of a surrogate pair")


def _turns(name: str, value: Any) -> tuple[Message, ...]:
    """The turns of a conversation; a table holds them as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _Unusable("malformed", f"`{name}` is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise _Unusable("wrong_type", f"`{name}` must be a list of messages")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise _Unusable("wrong_type", f"each message of `{name}` needs a role and a content, both text")
        _check_text(turn["content"])
    return tuple(value)


def _label(value: Any) -> str:
    """A label as text: a number as it is written, several labels parted by commas."""
    if isinstance(value, list):
        return ",".join(map(_label, value))
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise _Unusable("wrong_type", f"a label is {type(value).__name__}, not text or a number")
