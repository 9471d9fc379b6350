"""Classify rows on all ranks and score the predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import RunConfig
from harness.data.encoded import EncodedRows
from harness.engine.processes import Processes
from harness.evaluation.forward import forward_rows
from harness.evaluation.result import Evaluation
from harness.reports.class_report import write_predictions
from harness.reports.confusion import MAX_LABELS, confusion_image
from harness.reports.predictions import Predictions
from harness.scoring.classification import class_scores
from harness.scoring.significance import WrittenEvaluation
from harness.tasks.classification import ClassificationTask


@dataclass(frozen=True)
class Classified(Evaluation):
    """Scores of the rows, and their predictions."""

    scores: dict[str, float]
    predictions: Predictions

    @property
    def values(self) -> dict[str, float]:
        return {**self.losses, **self.scores}

    def samples(self) -> Iterator[tuple[str, str, str]]:
        shown = self.predictions
        return zip(shown.texts, map(str, shown.gold_answers), map(str, shown.answers), strict=True)

    def images(self) -> dict[str, NDArray[np.uint8]]:
        shown = self.predictions
        if shown.problem != "single_label" or len(shown.labels) > MAX_LABELS:
            return {}
        return {"confusion": confusion_image(shown.confusion, shown.labels)}

    def write(self, directory: Path, baseline: WrittenEvaluation | None = None) -> None:
        write_predictions(directory, self.predictions, self.scores, seconds=self.seconds, losses=self.losses)


def classify_and_score(
    model: Any,
    rows: EncodedRows,
    task: ClassificationTask,
    processes: Processes,
    *,
    config: RunConfig,
    num_rows: int | None,
    stop_wanted: Callable[[], bool],
) -> Classified:
    """Loss, predictions and scores of the first `num_rows` rows, on every rank."""
    started = time.monotonic()
    sums, found = [0.0, 0.0, 0.0], []
    forwarded = forward_rows(
        model, rows, task, processes,
        max_tokens=config.batch.max_tokens_per_device, num_rows=num_rows, stop_wanted=stop_wanted,
    )  # fmt: skip
    for ids, batch, logits in forwarded:
        sums = [total + float(term) for total, term in zip(sums, task.loss(logits, batch), strict=True)]
        found += list(zip(ids, logits.float().tolist(), strict=False))  # a batch of no rows has logits of one
    loss_sum, nll_sum, count = processes.sum(sums)
    everyone = sorted((tuple(pair) for part in processes.gather(found) for pair in part), key=lambda pair: pair[0])
    logits_NK = np.array([logits for _, logits in everyone], dtype=np.float64)
    assert [row for row, _ in everyone] == list(range(len(rows.sizes[:num_rows]))), "every row is scored exactly once"
    gold = task.gold(rows.take(range(len(logits_NK))))
    assert config.evaluation is not None
    return Classified(
        losses={"loss": loss_sum / count, "nll": nll_sum / count},
        num_rows=len(logits_NK),
        seconds=time.monotonic() - started,
        scores=class_scores(logits_NK, gold, task.kind.problem, config.evaluation.metrics),
        predictions=Predictions(
            where=rows.texts("where")[:num_rows],
            texts=rows.texts("source")[:num_rows],
            second=rows.texts("source_pair")[:num_rows],
            labels=list(task.label_ids),
            problem=task.kind.problem,
            logits_NK=logits_NK,
            gold=gold,
        ),
    )
