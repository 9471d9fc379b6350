"""report.html of classified rows, in the style of the page of decoded ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np

from harness.reports.html import NUM_LISTED, NUM_WORST, bar, html_page, search_box, table
from harness.reports.page import cards
from harness.reports.predictions import Predictions
from harness.scoring.classification import NUM_BINS

MAX_MATRIX_LABELS = 30
NUM_CONFUSIONS = 30


def render_class_page(title: str, summary: dict[str, Any], predictions: Predictions) -> str:
    """The whole page. `summary` is scores.json."""
    num, seconds = summary["sentences"], summary["decode_seconds"]
    head = f"<h1>{escape(title)}</h1><p class='soft'>{num:,} rows in {seconds:,.1f} s.</p>{cards(summary)}"
    parts = [head, _by_label(predictions)]
    if predictions.problem == "single_label":
        parts.append(_matrix(predictions) if len(predictions.labels) <= MAX_MATRIX_LABELS else _confusions(predictions))
    if predictions.problem != "regression":
        parts.append(_confidence(predictions))
    worst = _worst(predictions)
    if worst:
        parts += [
            f"<h2 id='worst-heading'>{_worst_title(predictions, len(worst))}</h2>",
            _rows("worst", predictions, worst),
        ]
    return html_page(title, [*parts, *_all_rows(predictions)])


def _by_label(predictions: Predictions) -> str:
    if predictions.problem == "regression":
        return ""
    found = predictions.label_scores
    num_predicted = predictions.predicted_hot.sum(axis=0)
    lines = {
        label: [
            f"{found.support[k]:,}",
            f"{num_predicted[k]:,}",
            *(f"{score[k]:.3f}" for score in (found.precision, found.recall, found.f1)),
        ]
        for k, label in enumerate(predictions.labels)
    }
    return "<h2>By label</h2>" + table(lines, ["Label", "Rows", "Predicted", "Precision", "Recall", "F1"])


def _matrix(predictions: Predictions) -> str:
    matrix = predictions.confusion
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    lines = {
        label: [
            f"<span style='display:block;padding:0 .3rem;background:color-mix(in srgb,var(--accent) {60 * share:.0f}%,"
            f"transparent)'>{count or ''}</span>"
            for count, share in zip(matrix[k].tolist(), shares[k].tolist(), strict=True)
        ]
        for k, label in enumerate(predictions.labels)
    }
    caption = "A line holds the rows of one label, a column what they were called"
    return "<h2>Confusions</h2>" + table(lines, ["Label", *map(escape, predictions.labels)], caption)


def _confusions(predictions: Predictions) -> str:
    """The most frequent ones, where a matrix would be too wide to read."""
    wrong = predictions.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = [divmod(int(place), len(predictions.labels)) for place in np.argsort(-wrong, axis=None, kind="stable")]
    lines = {
        f"{predictions.labels[gold]} was called {predictions.labels[called]}": [f"{wrong[gold, called]:,}"]
        for gold, called in order[:NUM_CONFUSIONS]
        if wrong[gold, called]
    }
    return "<h2>Most frequent confusions</h2>" + table(lines, ["Confusion", "Rows"], "confusion.tsv has all of them")


def _confidence(predictions: Predictions) -> str:
    bins, calibration = predictions.reliability, predictions.calibration
    lines = {
        f"{m / NUM_BINS:.2f} to {(m + 1) / NUM_BINS:.2f}": [
            f"{bins.size[m]:,}",
            f"{bins.confidence[m]:.3f}",
            f"{bins.accuracy[m]:.3f}",
            bar(bins.accuracy[m]),
        ]
        for m in range(NUM_BINS)
        if bins.size[m]
    }
    caption = (
        f"Expected calibration error {calibration['ece']:.4f}; {calibration['ece_after']:.4f} at the temperature "
        f"{calibration['temperature']:.3f}, which suits these rows best"
    )
    heads = ["Confidence", "Decisions", "Mean confidence", "Share that is right", ""]
    return "<h2>Confidence</h2>" + table(lines, heads, caption, kind="bars")


def _worst(predictions: Predictions) -> list[int]:
    """Row ids: the mistakes made with the most confidence; of numbers, the largest errors."""
    if predictions.problem == "regression":
        badness = np.abs(predictions.scored[:, 0] - predictions.gold)
    else:
        of_gold_NK = np.where(predictions.gold_hot, predictions.scored, 1.0 - predictions.scored)
        is_wrong = (predictions.predicted_hot != predictions.gold_hot).any(axis=1)
        badness = np.where(is_wrong, 1.0 - of_gold_NK.min(axis=1), 0.0)
    order = np.argsort(-badness, kind="stable")[:NUM_WORST]
    return [int(row) for row in order if badness[row] > 0.0]


def _worst_title(predictions: Predictions, num: int) -> str:
    return f"The {num} largest errors" if predictions.problem == "regression" else f"The {num} most confident mistakes"


def _all_rows(predictions: Predictions) -> Iterator[str]:
    listed = range(min(NUM_LISTED, len(predictions.texts)))
    some = f" (the first {len(listed):,} of {len(predictions.texts):,})" if len(listed) < len(predictions.texts) else ""
    yield f"<h2 id='all-heading'>All rows{some}</h2>"
    if some:
        yield "<p class='soft'>predictions.jsonl has every row.</p>"
    yield search_box("words or labels")
    yield _rows("all", predictions, listed)


def _rows(name: str, predictions: Predictions, chosen: Sequence[int]) -> str:
    items = []
    for row in chosen:
        gold, predicted = _shown(predictions.gold_answers[row]), _shown(predictions.answers[row])
        tag = "b" if gold == predicted or predictions.problem == "regression" else "mark"
        sure = f" · {predictions.scored[row].max():.3f}" if predictions.problem == "single_label" else ""
        second = predictions.second[row]
        other = "" if second is None else f"<dt>Second</dt><dd dir='auto'>{escape(second)}</dd>"
        items.append(
            f"<li><p class='about'>{escape(predictions.where[row])}{sure}</p><dl><dt>Text</dt><dd dir='auto'>"
            f"{escape(predictions.texts[row])}</dd>{other}<dt>Label</dt><dd>{escape(gold)}</dd>"
            f"<dt>Predicted</dt><dd><{tag}>{escape(predicted)}</{tag}></dd></dl></li>"
        )
    return f"<ol role='list' class='sentences' id='{name}' aria-labelledby='{name}-heading'>{''.join(items)}</ol>"


def _shown(answer: Any) -> str:
    if isinstance(answer, list):
        return ", ".join(answer) or "(none)"
    return answer if isinstance(answer, str) else f"{answer:.4g}"
