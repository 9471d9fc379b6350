"""Score a set of rows on all ranks. The same code serves training and `harness evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harness.config.schema import RunConfig
from harness.data.encoded import EncodedRows
from harness.engine.processes import Processes
from harness.errors import DataError
from harness.evaluation.classified import classify_and_score
from harness.evaluation.decoded import decode_and_score
from harness.evaluation.forward import forward_rows
from harness.evaluation.partial import Partial
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
    partial: Partial | None = None,
) -> Evaluation:
    """Loss and scores of one set, on every rank. `config.evaluation` must be set.

    Raises EvaluationInterrupted when a stop is asked for. Rows that are decoded by then are kept in `partial` and not
    decoded again; the caller removes it when the result is written.
    """
    assert config.evaluation is not None
    started = time.monotonic()
    max_tokens = config.batch.max_tokens_per_device
    if isinstance(task, ClassificationTask):
        return classify_and_score(
            model, rows, task, processes, config=config, num_rows=num_rows, stop_wanted=stop_wanted
        )
    losses = measure_loss(
        model, rows, task, processes, max_tokens=max_tokens, num_rows=num_rows, stop_wanted=stop_wanted
    )
    if isinstance(task, DecodingTask) and config.evaluation.metrics:
        return decode_and_score(
            model, rows, task, processes,
            config=config, losses=losses, num_rows=num_rows, synced=synced, stop_wanted=stop_wanted,
            partial=partial,
        )  # fmt: skip
    return Evaluation(losses, len(rows.sizes[:num_rows]), time.monotonic() - started)


def measure_loss(
    model: Any,
    rows: EncodedRows,
    task: Task,
    processes: Processes,
    *,
    max_tokens: int,
    num_rows: int | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """`loss` (the objective) and `nll` per target over the first `num_rows` rows, without dropout.

    Raises DataError if no row has a target.
    """
    if not rows.target_sizes[:num_rows].any():
        hint = "rows of more tokens lose their end: raise it"
        raise DataError("no row of the set has a token to be scored", where="data.max_length", hint=hint)
    sums = [0.0, 0.0, 0.0]
    forwarded = forward_rows(
        model, rows, task, processes, max_tokens=max_tokens, num_rows=num_rows, stop_wanted=stop_wanted
    )
    for _, batch, logits in forwarded:
        sums = [total + float(term) for total, term in zip(sums, task.loss(logits, batch), strict=True)]
    loss_sum, nll_sum, num_targets = processes.sum(sums)
    return {"loss": loss_sum / num_targets, "nll": nll_sum / num_targets}
