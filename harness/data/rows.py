"""What a reader yields: a row of text, or the reason why there is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One readable row; ``where`` is file:line (Parquet: file:row number), counted from 1.

    ``source`` is what the model reads and ``target`` what it should say, as text, whatever the task: of a labelled row
    the label; of a conversation the last turn of the assistant, and all turns before it; of a plain document nothing.
    ``messages`` are the turns of a conversation, each with ``role`` and ``content``. ``constraints`` are phrases that
    an output must have, parted by ``|||``.
    """

    where: str
    source: str
    target: str
    source_language: str | None = None
    target_language: str | None = None
    source_pair: str | None = None
    messages: tuple[Message, ...] = ()
    constraints: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is left out: a reason that is counted, a detail for the human, and its text if there is any."""

    where: str
    reason: str
    detail: str = ""
    text: str = ""


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
