"""Classified rows and what was predicted of them, with everything that follows from these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
