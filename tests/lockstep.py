"""Ranks as threads of one process, each with its own copy of a model, that add numbers up with each other."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any


def decode_in_step(
    model: Any, parts: list[str], hands: list[list[int]], decode: Callable[..., dict[int, Any]]
) -> tuple[list[list[str]], list[dict[int, Any]]]:
    """Which of the submodules `parts` each rank ran, in order, and what it found of its hand of rows.

    `decode` is called with a rank's model and the options that tell it of the others.
    """
    barrier, numbers = threading.Barrier(len(hands)), {}
    calls: list[list[str]] = [[] for _ in hands]
    found: list[dict[int, Any]] = [{} for _ in hands]

    def run(rank: int) -> None:
        mine = copy.deepcopy(model)
        for name in parts:
            mine.get_submodule(name).register_forward_hook(lambda *_, name=name: calls[rank].append(name))

        def agree(values: list[float]) -> list[float]:
            numbers[rank] = values
            barrier.wait(30)
            total = [sum(column) for column in zip(*numbers.values(), strict=True)]
            barrier.wait(30)
            return total

        found[rank] = decode(mine, rows=hands[rank], synced=True, agree=agree)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(hands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return calls, found
