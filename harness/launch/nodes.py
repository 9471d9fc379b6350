"""The machines of a run and the ranks on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine: its name as the others reach it, and its ranks; `devices`: those of its accelerators that they use."""

    name: str
    num_ranks: int
    devices: tuple[int, ...] | None = None


def first_ranks(nodes: Sequence[Node]) -> list[int]:
    """The number of the first rank on each node."""
    return [sum(node.num_ranks for node in nodes[:index]) for index in range(len(nodes))]
