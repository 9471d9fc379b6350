"""Scores of classified rows, and calibration, in numpy and float64.

Shapes: N rows, K labels. `gold_NK` and `predicted_NK` are boolean: which labels a row has and gets (exactly one of
each when single-label). Scores are fractions. `Problem` as in `classification.problem` of the run file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Problem = Literal["single_label", "multi_label", "regression"]
Floats = NDArray[np.float64]
Hot = NDArray[np.bool_]

NUM_BINS = 15
TEMPERATURES = (0.01, 100.0)  # the limits of a fit


def probabilities(logits_NK: ArrayLike, problem: Problem, temperature: float = 1.0) -> Floats:
    """Of each label, [N, K]: a softmax over labels, or each label's own sigmoid; of a number, the number itself."""
    scaled_NK = np.asarray(logits_NK, dtype=np.float64) / temperature
    if problem == "regression":
        return np.asarray(logits_NK, dtype=np.float64)
    if problem == "multi_label":
        return np.exp(-np.logaddexp(0.0, -scaled_NK))
    return np.exp(scaled_NK - _log_sum_exp(scaled_NK)[:, None])


def chosen(probabilities_NK: Floats, problem: Problem) -> Hot:
    """Which labels are predicted: the likeliest (the first of several), or each of more than one half."""
    if problem == "multi_label":
        return probabilities_NK > 0.5
    return one_hot(probabilities_NK.argmax(axis=1), probabilities_NK.shape[1])


def answers(probabilities_NK: Floats, labels: Sequence[str], problem: Problem) -> list[Any]:
    """What is predicted of each row: a label, a list of labels, or a number."""
    if problem == "regression":
        return [float(value) for value in probabilities_NK[:, 0]]
    named = [[labels[index] for index in np.flatnonzero(row_K).tolist()] for row_K in chosen(probabilities_NK, problem)]
    return named if problem == "multi_label" else [one for (one,) in named]


def one_hot(labels_N: ArrayLike, num_labels: int) -> Hot:
    hot_NK: Hot = np.asarray(labels_N)[:, None] == np.arange(num_labels)
    return hot_NK


def class_scores(logits_NK: ArrayLike, gold: ArrayLike, problem: Problem, metrics: Sequence[str]) -> dict[str, float]:
    """The metrics of a set by name. `gold`: label ids [N], 0 and 1 [N, K], or numbers [N]. N must not be 0."""
    scored = probabilities(logits_NK, problem)
    if problem == "regression":
        numbers_N = np.asarray(gold, dtype=np.float64)
        regression = {"rmse": rmse, "pearson": pearson, "spearman": spearman}
        return {name: regression[name](numbers_N, scored[:, 0]) for name in metrics}
    gold_NK = hot_labels(gold, scored.shape[1])
    predicted_NK = chosen(scored, problem)
    sides = (gold_NK, predicted_NK) if problem == "single_label" else (_yes_or_no(gold_NK), _yes_or_no(predicted_NK))
    functions: dict[str, Any] = {
        "accuracy": lambda: accuracy(gold_NK, predicted_NK),
        "macro_f1": lambda: macro_f1(gold_NK, predicted_NK),
        "micro_f1": lambda: micro_f1(gold_NK, predicted_NK),
        "mcc": lambda: matthews_correlation(*sides),
        "ece": lambda: expected_calibration_error(reliability(*confidences(scored, gold_NK, problem))),
    }
    return {name: functions[name]() for name in metrics}


def hot_labels(gold: ArrayLike, num_labels: int) -> Hot:
    """Label ids [N], or 0 and 1 [N, K], as booleans [N, K]."""
    labels = np.asarray(gold)
    return one_hot(labels, num_labels) if labels.ndim == 1 else labels.astype(bool)


def accuracy(gold_NK: Hot, predicted_NK: Hot) -> float:
    """Share of rows of which every label is right (multi-label: an exact match)."""
    return float((gold_NK == predicted_NK).all(axis=1).mean())


class LabelScores(NamedTuple):
    """Of each label, [K]; 0 where there is nothing to divide by. `support`: the rows that have it."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: NDArray[np.int64]


def label_scores(gold_NK: Hot, predicted_NK: Hot) -> LabelScores:
    hits, num_gold, num_predicted = (x.sum(axis=0) for x in (gold_NK & predicted_NK, gold_NK, predicted_NK))
    return LabelScores(
        _ratio(hits, num_predicted), _ratio(hits, num_gold), _ratio(2 * hits, num_gold + num_predicted), num_gold
    )


def macro_f1(gold_NK: Hot, predicted_NK: Hot) -> float:
    """Mean F1 of the labels that occur, in rows or in predictions; 0 if none does."""
    occurs_K = (gold_NK | predicted_NK).any(axis=0)
    return float(label_scores(gold_NK, predicted_NK).f1[occurs_K].mean()) if occurs_K.any() else 0.0


def micro_f1(gold_NK: Hot, predicted_NK: Hot) -> float:
    """F1 of all (row, label) decisions together; single-label: the accuracy."""
    return float(_ratio(2 * (gold_NK & predicted_NK).sum(), gold_NK.sum() + predicted_NK.sum()))


def matthews_correlation(gold_NK: Hot, predicted_NK: Hot) -> float:
    """MCC of single-label rows (Gorodkin 2004: R_K); 0 if one side has a single label throughout."""
    gold, predicted = gold_NK - gold_NK.mean(axis=0), predicted_NK - predicted_NK.mean(axis=0)
    return _correlation(gold.ravel(), predicted.ravel())


def confusion_matrix(gold_NK: Hot, predicted_NK: Hot) -> NDArray[np.int64]:
    """Rows of label i (line) that were called label j (column), [K, K]; of single-label rows."""
    return gold_NK.T.astype(np.int64) @ predicted_NK.astype(np.int64)


class Reliability(NamedTuple):
    """Of each bin of confidence, [bins]: decisions, their mean confidence, the share that is right (0 if empty)."""

    size: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats


def confidences(probabilities_NK: Floats, gold_NK: Hot, problem: Problem) -> tuple[Floats, Hot]:
    """Confidence of each decision and whether it is right: one decision a row, or (multi-label) one a label."""
    right_NK: Hot = chosen(probabilities_NK, problem) == gold_NK
    if problem == "multi_label":
        return np.maximum(probabilities_NK, 1.0 - probabilities_NK).ravel(), right_NK.ravel()
    return np.asarray(probabilities_NK.max(axis=1)), np.asarray(right_NK.all(axis=1))


def reliability(confidence_N: Floats, correct_N: Hot, num_bins: int = NUM_BINS) -> Reliability:
    """Bins of equal width, bin m holding ((m - 1) / M, m / M] (Guo et al. 2017, arXiv:1706.04599, section 2)."""
    bin_N = np.clip(np.ceil(confidence_N * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    size = np.bincount(bin_N, minlength=num_bins)
    confidence = np.bincount(bin_N, weights=confidence_N, minlength=num_bins)
    correct = np.bincount(bin_N, weights=correct_N, minlength=num_bins)
    return Reliability(size, _ratio(confidence, size), _ratio(correct, size))


def expected_calibration_error(bins: Reliability) -> float:
    """Mean distance of confidence and accuracy, over decisions (Guo et al. 2017, equation 3)."""
    return float((bins.size * np.abs(bins.accuracy - bins.confidence)).sum() / bins.size.sum())


def fit_temperature(logits_NK: ArrayLike, gold: ArrayLike, problem: Problem) -> float:
    """The T that gives softmax(logits / T) the least negative log-likelihood (Guo et al. 2017, section 4.2).

    Multi-label: sigmoid instead of softmax. The likelihood is concave in 1 / T: its derivative is bisected, within
    TEMPERATURES. Without any mistake there is nothing to fit, the colder the better: then T is 1.
    """
    logits = np.asarray(logits_NK, dtype=np.float64)
    gold_NK = hot_labels(gold, logits.shape[1])
    if problem == "multi_label":
        logits, gold_NK = np.stack([np.zeros(logits.size), logits.ravel()], axis=1), _yes_or_no(gold_NK)
    gold_logits_N = logits[gold_NK]
    if (gold_logits_N == logits.max(axis=1)).all():
        return 1.0
    cold, hot = (np.log(limit) for limit in TEMPERATURES)
    while hot - cold > 1e-9:
        middle = (cold + hot) / 2
        mean_logits_N = (probabilities(logits, "single_label", float(np.exp(middle))) * logits).sum(axis=1)
        if (mean_logits_N - gold_logits_N).sum() > 0.0:  # more confident than right
            cold = middle
        else:
            hot = middle
    return float(np.exp((cold + hot) / 2))


def rmse(gold_N: Floats, predicted_N: Floats) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((gold_N - predicted_N) ** 2)))


def pearson(gold_N: Floats, predicted_N: Floats) -> float:
    """Linear correlation; 0 if one side is constant."""
    if np.ptp(gold_N) == 0.0 or np.ptp(predicted_N) == 0.0:
        return 0.0
    return _correlation(gold_N - gold_N.mean(), predicted_N - predicted_N.mean())


def spearman(gold_N: Floats, predicted_N: Floats) -> float:
    """Correlation of ranks, equal values sharing their mean rank; 0 if one side is constant."""
    return pearson(_ranks(gold_N), _ranks(predicted_N))


def _ranks(values_N: Floats) -> Floats:
    _, group_N, sizes = np.unique(values_N, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return np.asarray((ends - (sizes - 1) / 2)[group_N])


def _yes_or_no(labels_NK: Hot) -> Hot:
    """Every (row, label) decision as a row of two labels: no, yes."""
    return np.stack([~labels_NK.ravel(), labels_NK.ravel()], axis=1)


def _correlation(left: Floats, right: Floats) -> float:
    """Of two centred vectors."""
    return float(_ratio((left * right).sum(), np.sqrt((left**2).sum() * (right**2).sum())))


def _ratio(part: Any, whole: Any) -> Floats:
    """part / whole, 0 where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.asarray(np.divide(part, whole, out=np.zeros_like(part), where=whole != 0.0))


def _log_sum_exp(values_NK: Floats) -> Floats:
    largest_N = values_NK.max(axis=1)
    return np.asarray(largest_N + np.log(np.exp(values_NK - largest_N[:, None]).sum(axis=1)))
