"""Two texts word by word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from itertools import takewhile

MAX_EQUAL_PAIRS = 30_000  # of words, one from each text; beyond, a comparison word by word takes seconds
# A word, a sign, or one character of a script written without spaces; with the white space before it.
_TOKEN = re.compile(
    r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\S)"
)


def words(text: str) -> list[str]:
    """Words, signs, and characters of scripts without spaces."""
    return [token.strip() for token in _TOKEN.findall(text)]


def mark_differences(old: str, new: str) -> tuple[str, str]:
    """Both texts as HTML: words of the old one alone are underlined, words of the new one alone are marked."""
    left, right = _TOKEN.findall(old), _TOKEN.findall(new)
    left_parts, right_parts = [], []
    for kind, left_start, left_stop, right_start, right_stop in _differences(words(old), words(new)):
        left_parts.append(_wrap("".join(left[left_start:left_stop]), "u" if kind != "equal" else ""))
        right_parts.append(_wrap("".join(right[right_start:right_stop]), "mark" if kind != "equal" else ""))
    return "".join(left_parts).strip(), "".join(right_parts).strip()


def _differences(old: list[str], new: list[str]) -> Sequence[tuple[str, int, int, int, int]]:
    """SequenceMatcher's opcodes. Of texts that go round in loops only what they begin with counts as equal."""
    count = Counter(old)
    if sum(count[word] for word in new) <= MAX_EQUAL_PAIRS:
        return SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    return [("equal", 0, same, 0, same), ("replace", same, len(old), same, len(new))]


def _wrap(text: str, tag: str) -> str:
    """The escaped text, without its leading white space inside the tag."""
    body = text.lstrip()
    if not (tag and body):
        return escape(text)
    return f"{text[: len(text) - len(body)]}<{tag}>{escape(body)}</{tag}>"
