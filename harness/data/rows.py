"""What a reader yields: a row of text, or the reason why there is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LANGUAGE_COLUMNS = ("source_language", "target_language")


@dataclass(frozen=True, slots=True)
class Row:
    """One readable row; ``where`` is file:line (Parquet: file:row number), counted from 1."""

    where: str
    source: str
    target: str
    source_language: str | None
    target_language: str | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out: a reason that is counted, a detail for the human, and its text if there is any."""

    where: str
    reason: str
    detail: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names of the two sides, and the languages of rows that do not name their own."""

    source: str
    target: str
    source_language: str | None
    target_language: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Source, target, source language, target language; a file need not have the last two."""
        return (self.source, self.target, *LANGUAGE_COLUMNS)

    def row(self, where: str, source: Any, target: Any, languages: Sequence[Any] = (None, None)) -> Row | BadRow:
        """A Row of the four values, or the reason why they are none: not text, a NUL character, not Unicode."""
        if not (isinstance(source, str) and isinstance(target, str)):
            name, value = (self.target, target) if isinstance(source, str) else (self.source, source)
            if value is None:
                return BadRow(where, "missing_field", f"`{name}` is null", f"{source}\t{target}")
            return _wrong_type(where, name, value)
        for name, value in zip(LANGUAGE_COLUMNS, languages, strict=True):
            if not isinstance(value, str | None):
                return _wrong_type(where, name, value)
        text = f"{source}\t{target}"
        if "\0" in text:
            return BadRow(where, "control_characters", "U+0000", text)
        if not is_unicode(text):
            return BadRow(where, "not_utf8", "half of a surrogate pair", text)
        return Row(where, source, target, languages[0] or self.source_language, languages[1] or self.target_language)


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest_name(name: str, names: Iterable[str]) -> str:
    """'did you mean `x`?', or nothing when no name is near."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean `{found[0]}`?" if found else ""


def _wrong_type(where: str, name: str, value: Any) -> BadRow:
    return BadRow(where, "wrong_type", f"`{name}` is {type(value).__name__}, not text", repr(value)[:1000])
