"""Score a set of rows on all ranks. The same code serves training and `harness evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.data.encoded import EncodedRows
from harness.engine.processes import Processes
from harness.evaluation.classified import classify_and_score
from harness.evaluation.decoded import decode_and_score
from harness.evaluation.forward import forward_rows
from harness.evaluation.result import Evaluation
from harness.tasks.classification import ClassificationTask
from harness.tasks.task import DecodingTask, Task


def evaluate(
    model: Any,
    rows: EncodedRows,
    task: Task,
    processes: Processes,
    *,
    config: RunConfig,
    num_rows: int | None = None,
    synced: bool = False,
    stop_wanted: Callable[[], bool] = lambda: False,
    partial: Path | None = None,
) -> Evaluation:
    """Loss and scores of one set, on every rank. `config.evaluation` must be set.

    Rows that are decoded when a stop is asked for are kept in the directory `partial`, and not decoded again.
    """
    assert config.evaluation is not None
    started = time.monotonic()
    max_tokens = config.batch.max_tokens_per_device
    if isinstance(task, ClassificationTask):
        return classify_and_score(model, rows, task, processes, config=config, num_rows=num_rows)
    losses = measure_loss(model, rows, task, processes, max_tokens=max_tokens, num_rows=num_rows)
    if isinstance(task, DecodingTask) and config.evaluation.metrics:
        return decode_and_score(
            model, rows, task, processes,
            config=config, losses=losses, num_rows=num_rows, synced=synced, stop_wanted=stop_wanted,
            partial=partial,
        )  # fmt: skip
    return Evaluation(losses, len(rows.sizes[:num_rows]), time.monotonic() - started)


def measure_loss(
    model: Any, rows: EncodedRows, task: Task, processes: Processes, *, max_tokens: int, num_rows: int | None = None
) -> dict[str, float]:
    """`loss` (the objective) and `nll` per target over the first `num_rows` rows, without dropout."""
    sums = [0.0, 0.0, 0.0]
    for _, batch, logits in forward_rows(model, rows, task, processes, max_tokens=max_tokens, num_rows=num_rows):
        sums = [total + float(term) for total, term in zip(sums, task.loss(logits, batch), strict=True)]
    loss_sum, nll_sum, num_targets = processes.sum(sums)
    return {"loss": loss_sum / num_targets, "nll": nll_sum / num_targets}
