"""Scores of classified rows against scikit-learn and scipy, and calibration against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk

from harness.scoring.classification import (
    LabelScores,
    chosen,
    class_scores,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    label_scores,
    one_hot,
    probabilities,
    reliability,
)

EXACT = {"rel": 1e-12, "abs": 1e-12}
SINGLE = ["accuracy", "macro_f1", "micro_f1", "mcc", "ece"]


def single_label_rows(num_rows: int, num_labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right about half of the time, and label ids of unequal frequency."""
    random = np.random.default_rng(seed)
    frequencies = np.arange(1, num_labels + 1) / np.arange(1, num_labels + 1).sum()
    gold = random.choice(num_labels, size=num_rows, p=frequencies)
    return random.normal(size=(num_rows, num_labels)) + 1.5 * one_hot(gold, num_labels), gold


def multi_label_rows(num_rows: int, num_labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    gold = (random.random((num_rows, num_labels)) < np.linspace(0.1, 0.6, num_labels)).astype(np.int32)
    return random.normal(size=gold.shape) + 2.0 * gold - 1.0, gold


@pytest.mark.parametrize(("num_rows", "num_labels"), [(1, 2), (7, 5), (200, 2), (1000, 11)])
def test_single_label_scores_are_those_of_scikit_learn(num_rows: int, num_labels: int) -> None:
    logits, gold = single_label_rows(num_rows, num_labels, seed=num_rows)
    predicted = logits.argmax(axis=1)
    scores = class_scores(logits, gold, "single_label", SINGLE)
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted), **EXACT)
    assert scores["macro_f1"] == pytest.approx(sk.f1_score(gold, predicted, average="macro", zero_division=0), **EXACT)
    assert scores["micro_f1"] == pytest.approx(sk.f1_score(gold, predicted, average="micro", zero_division=0), **EXACT)
    assert scores["mcc"] == pytest.approx(sk.matthews_corrcoef(gold, predicted), **EXACT)


@pytest.mark.parametrize(("num_rows", "num_labels"), [(7, 5), (1000, 11)])
def test_confusions_and_scores_of_each_label_are_those_of_scikit_learn(num_rows: int, num_labels: int) -> None:
    logits, gold = single_label_rows(num_rows, num_labels, seed=3)
    hot, predicted = one_hot(gold, num_labels), chosen(probabilities(logits, "single_label"), "single_label")
    ids = np.arange(num_labels)
    expected = sk.confusion_matrix(gold, logits.argmax(axis=1), labels=ids)
    assert (confusion_matrix(hot, predicted) == expected).all()
    ours = label_scores(hot, predicted)
    theirs = sk.precision_recall_fscore_support(gold, logits.argmax(axis=1), labels=ids, zero_division=0)
    for name, value in zip(LabelScores._fields, theirs, strict=True):
        np.testing.assert_allclose(getattr(ours, name), value, rtol=1e-12, atol=1e-12)


def test_multi_label_scores_are_those_of_scikit_learn() -> None:
    logits, gold = multi_label_rows(500, 6, seed=1)
    predicted = (expit(logits) > 0.5).astype(int)
    scores = class_scores(logits, gold, "multi_label", SINGLE)
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted), **EXACT)
    assert scores["macro_f1"] == pytest.approx(sk.f1_score(gold, predicted, average="macro"), **EXACT)
    assert scores["micro_f1"] == pytest.approx(sk.f1_score(gold, predicted, average="micro"), **EXACT)
    assert scores["mcc"] == pytest.approx(sk.matthews_corrcoef(gold.ravel(), predicted.ravel()), **EXACT)


def test_a_label_that_never_occurs_is_left_out_of_macro_f1() -> None:
    logits, gold = np.array([[9.0, 0, 0], [9, 0, 0], [0, 9, 0]]), np.array([0, 1, 1])
    ours = class_scores(logits, gold, "single_label", ["macro_f1"])["macro_f1"]
    assert ours == pytest.approx(sk.f1_score(gold, [0, 0, 1], average="macro"), **EXACT)


def test_a_model_that_always_says_the_same_has_no_correlation() -> None:
    logits = np.tile([0.0, 1.0, 0.0], (4, 1))
    assert class_scores(logits, [0, 1, 2, 1], "single_label", ["mcc"]) == {"mcc": 0.0}
    assert class_scores([[0.1]] * 3, [1.0, 2.0, 4.0], "regression", ["pearson", "spearman"]) == {
        "pearson": 0.0,
        "spearman": 0.0,
    }


def test_numbers_are_scored_as_by_scipy() -> None:
    random = np.random.default_rng(0)
    gold = random.integers(0, 6, size=300) / 2  # many ties
    predicted = gold + random.normal(size=300).round(1)
    scores = class_scores(predicted[:, None], gold, "regression", ["rmse", "pearson", "spearman"])
    assert scores["rmse"] == pytest.approx(sk.root_mean_squared_error(gold, predicted), **EXACT)
    assert scores["pearson"] == pytest.approx(pearsonr(gold, predicted).statistic, **EXACT)
    assert scores["spearman"] == pytest.approx(spearmanr(gold, predicted).statistic, **EXACT)


def test_probabilities_are_those_of_scipy_even_for_huge_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 500
    np.testing.assert_allclose(probabilities(logits, "single_label"), softmax(logits, axis=1), rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(probabilities(logits, "multi_label"), expit(logits), rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(probabilities(logits, "single_label", 250.0), softmax(logits / 250, axis=1), rtol=1e-11)


def test_calibration_error_is_that_of_the_definition() -> None:
    """Guo et al. 2017: bins ((m - 1) / M, m / M], written out decision by decision."""
    random = np.random.default_rng(5)
    confidence = np.concatenate([random.random(400), np.arange(1, 16) / 15, [1e-300]])
    correct = random.random(len(confidence)) < confidence**2
    expected = 0.0
    for m in range(1, 16):
        members = [i for i, value in enumerate(confidence) if (m - 1) / 15 < value <= m / 15]
        if members:
            gap = sum(correct[i] for i in members) / len(members) - sum(confidence[i] for i in members) / len(members)
            expected += len(members) / len(confidence) * abs(gap)
    assert expected_calibration_error(reliability(confidence, correct)) == pytest.approx(expected, **EXACT)


def test_calibration_error_of_a_sure_and_wrong_model_is_one() -> None:
    assert class_scores([[60.0, 0.0]] * 5, [1] * 5, "single_label", ["ece"])["ece"] == pytest.approx(1.0)


@pytest.mark.parametrize("stretch", [0.3, 1.0, 4.0])
def test_temperature_has_the_least_negative_log_likelihood(stretch: float) -> None:
    logits, gold = single_label_rows(400, 5, seed=2)
    logits *= stretch

    def negative_log_likelihood(log_temperature: float) -> float:
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(400), gold].mean()

    best = minimize_scalar(negative_log_likelihood, bounds=(-4, 4), options={"xatol": 1e-9})
    ours = fit_temperature(logits, gold, "single_label")
    assert negative_log_likelihood(np.log(ours)) <= best.fun + 1e-12
    assert ours == pytest.approx(np.exp(best.x), rel=1e-5)


def test_temperature_of_several_labels() -> None:
    logits, gold = multi_label_rows(400, 3, seed=4)

    def negative_log_likelihood(log_temperature: float) -> float:
        return np.logaddexp(0, np.where(gold, -1, 1) * logits / np.exp(log_temperature)).mean()

    best = minimize_scalar(negative_log_likelihood, bounds=(-4, 4), options={"xatol": 1e-9})
    assert fit_temperature(logits, gold, "multi_label") == pytest.approx(np.exp(best.x), rel=1e-5)


def test_temperature_of_a_model_without_mistakes_is_one() -> None:
    assert fit_temperature([[5.0, 0.0], [0.0, 5.0]], [0, 1], "single_label") == 1.0
