"""The files of classified rows: predictions.jsonl, confusion.tsv, scores.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.reports.class_page import render_class_page
from harness.reports.predictions import Predictions
from harness.reports.report import finite, write_directory
from harness.scoring.classification import Floats, LabelScores
from harness.scoring.scores import one_line


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
