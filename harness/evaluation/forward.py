"""Forward passes over a set of rows, dealt to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.data.batches import cut_step
from harness.data.encoded import EncodedRows
from harness.engine.processes import Processes
from harness.evaluation.result import EvaluationInterrupted
from harness.io import heartbeat
from harness.tasks.task import Batch, Task


class Turn(NamedTuple):
    """One batch of one rank; if `counts` is false it only keeps the rank in step and its output is thrown away."""

    rows: list[int]
    counts: bool


def deal(batches: Sequence[list[int]], rank: int, world_size: int) -> list[Turn]:
    """This rank's batches, dealt round robin. All ranks get equally many: the last batch, the cheapest, fills up."""
    num_turns = -(-len(batches) // world_size)
    mine = [rank + turn * world_size for turn in range(num_turns)]
    return [Turn(batches[index], True) if index < len(batches) else Turn(batches[-1], False) for index in mine]


@torch.no_grad()
def forward_rows(
    model: Any,
    rows: EncodedRows,
    task: Task,
    processes: Processes,
    *,
    max_tokens: int,
    num_rows: int | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """(row ids, batch, logits) of this rank's share of the first `num_rows` rows, without dropout.

    Batches are those of one process, dealt to the ranks, so what is computed of a row does not depend on their number.
    A rank short of batches takes part with one of no rows. Raises EvaluationInterrupted on all ranks when one of them
    wants to stop.
    """
    sizes = rows.sizes[:num_rows]
    limit = max(max_tokens, int(sizes.max()))
    batches = cut_step(np.arange(len(sizes)), sizes, max_tokens_per_device=limit, world_size=1)
    was_training = model.training
    model.eval()
    for turn in deal([batch.tolist() for (batch,) in batches], processes.rank, processes.world_size):
        heartbeat.beat("evaluation")
        if any(processes.sum([stop_wanted()])):
            raise EvaluationInterrupted
        ids = turn.rows if turn.counts else []
        batch = task.collate(rows.take(ids), processes.device)
        yield ids, batch, model(**batch.inputs).logits
    model.train(was_training)
