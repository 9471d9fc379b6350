"""Ranks as threads of one process that add numbers up and hand values around, in place of a process group."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from harness.engine.processes import Processes


class Meeting:
    """Where `num_ranks` threads give a value each and get those of all, in rank order."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier = threading.Barrier(num_ranks)
        self.values: dict[int, Any] = {}

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(30)
        everyone = [self.values[number] for number in sorted(self.values)]
        self.barrier.wait(30)
        return everyone

    def sum(self, rank: int, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.exchange(rank, values), strict=True)]


@dataclass(frozen=True)
class Threads(Processes):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def sum(self, values: Sequence[float]) -> list[float]:
        return self.meeting.sum(self.rank, values)

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value)


def on_ranks(num_ranks: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What `work` gives on each rank; None where it raised."""
    meeting, found = Meeting(num_ranks), [None] * num_ranks

    def run(rank: int) -> None:
        found[rank] = work(Threads(rank, rank, num_ranks, torch.device("cpu"), dist.HashStore(), meeting))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def decode_in_step(
    model: Any, parts: list[str], hands: list[list[int]], decode: Callable[..., dict[int, Any]]
) -> tuple[list[list[str]], list[dict[int, Any]]]:
    """Which of the submodules `parts` each rank ran, in order, and what it found of its hand of rows.

    `decode` is called with a rank's model and the options that tell it of the others.
    """
    calls: list[list[str]] = [[] for _ in hands]

    def run(processes: Threads) -> dict[int, Any]:
        mine = copy.deepcopy(model)
        for name in parts:
            mine.get_submodule(name).register_forward_hook(lambda *_, name=name: calls[processes.rank].append(name))
        return decode(mine, rows=hands[processes.rank], synced=True, agree=processes.sum)

    return calls, on_ranks(len(hands), run)
