"""Outputs of the same rows in other batches, compared."""

from __future__ import annotations

from harness.decoding.decode import Hypothesis
from harness.training.invariance import differences


def test_each_output_of_a_row_is_compared() -> None:
    a, b, c = Hypothesis([5, 6], -1.0), Hypothesis([5], -2.0), Hypothesis([7], -2.0)
    first = {0: [a, b], 1: [a, b], 2: [a, b], 3: [a]}
    other = {3: [a], 2: [a], 1: [a, c], 0: [a, b._replace(score=-2.5)]}
    assert differences(first, other) == {1: (b, c), 2: (b, Hypothesis([], 0.0))}
    assert list(differences(first, other)) == [1, 2]
    assert differences(first, first) == differences(first, {}) == {}
