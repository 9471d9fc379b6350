"""Layer numbers as the run file writes them."""

from __future__ import annotations

import re

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def layer_numbers(text: str) -> frozenset[int] | None:
    """``0-9``, ``0,2,4`` or both as a set; ``all`` is None. Raises ValueError for anything else."""
    if text.strip() == "all":
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"'{part.strip()}' is not a layer or a range of layers")
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(numbers)
