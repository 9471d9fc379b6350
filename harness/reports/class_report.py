"""The files of classified rows: predictions.jsonl, confusion.tsv, scores.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.reports.class_page import render_class_page
from harness.reports.report import finite, write_directory
from harness.scoring.classification import (
    Floats,
    Hot,
    LabelScores,
    Problem,
    Reliability,
    answers,
    chosen,
    confidences,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    hot_labels,
    label_scores,
    probabilities,
    reliability,
)
from harness.scoring.scores import one_line


@dataclass(frozen=True)
class Predictions:
    """Rows and what was predicted of them, row i at index i. `second`: the other text of a pair, else None.

    `logits_NK` are the model's own; `gold` as in `class_scores`.
    """

    where: Sequence[str]
    texts: Sequence[str]
    second: Sequence[str | None]
    labels: Sequence[str]
    problem: Problem
    logits_NK: NDArray[np.float64]
    gold: NDArray[Any]

    @cached_property
    def scored(self) -> Floats:
        """[N, K]: probabilities, of a number itself."""
        return probabilities(self.logits_NK, self.problem)

    @cached_property
    def gold_hot(self) -> Hot:
        return hot_labels(self.gold, len(self.labels))

    @cached_property
    def predicted_hot(self) -> Hot:
        return chosen(self.scored, self.problem)

    @cached_property
    def answers(self) -> list[Any]:
        return answers(self.scored, self.labels, self.problem)

    @cached_property
    def gold_answers(self) -> list[Any]:
        gold = self.gold[:, None] if self.problem == "regression" else self.gold_hot.astype(np.float64)
        return answers(gold, self.labels, self.problem)

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """[K, K], of single-label rows."""
        return confusion_matrix(self.gold_hot, self.predicted_hot)

    @cached_property
    def label_scores(self) -> LabelScores:
        return label_scores(self.gold_hot, self.predicted_hot)

    @cached_property
    def reliability(self) -> Reliability:
        return reliability(*confidences(self.scored, self.gold_hot, self.problem))

    @cached_property
    def calibration(self) -> dict[str, float]:
        """The temperature that suits these rows best, and the calibration error without and with it."""
        temperature = fit_temperature(self.logits_NK, self.gold, self.problem)
        cooled_NK = probabilities(self.logits_NK, self.problem, temperature)
        after = expected_calibration_error(reliability(*confidences(cooled_NK, self.gold_hot, self.problem)))
        return {"temperature": temperature, "ece": expected_calibration_error(self.reliability), "ece_after": after}


def write_predictions(
    directory: Path,
    predictions: Predictions,
    scores: Mapping[str, float],
    *,
    seconds: float,
    losses: Mapping[str, float],
    title: str | None = None,
) -> None:
    """Write the directory as a whole, as `write_directory` does. `losses` (loss, nll) are per row."""
    summary: dict[str, Any] = {
        **scores,
        **finite(losses),
        "signatures": {},
        "sentences": len(predictions.texts),
        "decode_seconds": round(seconds, 3),
        "problem": predictions.problem,
    }
    if predictions.problem != "regression":
        columns = zip(*predictions.label_scores, strict=True)
        summary["labels"] = {
            label: dict(zip(LabelScores._fields, (value.item() for value in values), strict=True))
            for label, values in zip(predictions.labels, columns, strict=True)
        }
        summary["calibration"] = predictions.calibration
    files = {
        "predictions.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in _lines(predictions)),
        "report.html": render_class_page(title or directory.name, summary, predictions),
    }
    if predictions.problem == "single_label":
        names = [one_line(label).replace("\t", " ") for label in predictions.labels]
        table = [
            ["", *names],
            *([name, *map(str, row)] for name, row in zip(names, predictions.confusion, strict=True)),
        ]
        files["confusion.tsv"] = "".join("\t".join(line) + "\n" for line in table)
    write_directory(directory, summary, files)


def _lines(predictions: Predictions) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for row, where in enumerate(predictions.where):
        line: dict[str, Any] = {"where": where, "text": predictions.texts[row]}
        if predictions.second[row] is not None:
            line["text_pair"] = predictions.second[row]
        line |= {"gold": predictions.gold_answers[row], "predicted": predictions.answers[row]}
        if predictions.problem != "regression":
            line["probabilities"] = rounded(predictions.labels, predictions.scored[row])
        lines.append(line)
    return lines


def rounded(labels: Sequence[str], probabilities_K: Floats) -> dict[str, float]:
    return {label: round(float(p), 6) for label, p in zip(labels, probabilities_K, strict=True)}
