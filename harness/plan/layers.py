"""Where a parameter stands in a transformers model: which layer of which stack.

Read off the names, so it holds for any family and under PEFT's prefixes. A stack is a numbered list of modules called
`layers` (mBART, Llama), `layer` (BERT), `block` (T5), `blocks` (MPT) or `h` (GPT-2); an inner one counts as part of
its layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

ENCODER, DECODER, ONLY = "encoder", "decoder", "layers"
_STACKS = ("layers", "layer", "block", "blocks", "h")


class Place(NamedTuple):
    """A layer: `stack` is encoder or decoder, or "layers" in a model that has one stack; the lowest is number 0."""

    stack: str
    number: int


def layer_places(names: Iterable[str]) -> dict[str, Place]:
    """The layer of each parameter that lies in one."""
    found = {name: place for name in names if (place := _place(name)) is not None}
    if len({place.stack for place in found.values()}) == 1:  # BERT's `encoder`, OPT's `decoder`: there is no other
        return {name: Place(ONLY, place.number) for name, place in found.items()}
    return found


def _place(name: str) -> Place | None:
    parts = name.split(".")
    for position, (part, following) in enumerate(itertools.pairwise(parts)):
        if part in _STACKS and following.isdigit():
            above = parts[:position]
            return Place(DECODER if DECODER in above else ENCODER if ENCODER in above else ONLY, int(following))
    return None
