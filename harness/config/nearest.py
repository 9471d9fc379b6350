"""The nearest known name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name`` (case and - / _ ignored; letters may be swapped), or None if none is close."""
    by_key = {candidate.lower().replace("-", "_"): candidate for candidate in known}
    key = name.lower().replace("-", "_")
    found = difflib.get_close_matches(key, list(by_key), n=1, cutoff=0.65)
    found += [candidate for candidate in by_key if sorted(candidate) == sorted(key)]
    return by_key[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause `` (did you mean `x`?)`` or the empty string."""
    found = nearest(name, known)
    return f" (did you mean `{found}`?)" if found else ""
