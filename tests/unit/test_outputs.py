"""What is kept of the hypotheses of a row."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from harness.decoding.beam import BeamSettings, MinimumRisk
from harness.decoding.decode import Hypothesis
from harness.decoding.sampling import Sampling
from harness.evaluation.outputs import outputs_of
from harness.tasks.task import Output

WORDS: Any = SimpleNamespace(to_text=lambda ids: " ".join("word" * (index + 1) for index in ids))
RISK = BeamSettings(1, 1.0, 3, num_hypotheses=2, sampling=Sampling(), minimum_risk=MinimumRisk("chrf", 4))


@pytest.mark.parametrize("settings", [BeamSettings(2, 1.0, 9), RISK])
def test_a_row_without_a_finite_score_has_an_empty_output(settings: BeamSettings) -> None:
    assert outputs_of([], WORDS, settings, None) == [Output("", -math.inf)]


def test_the_least_risky_samples_say_whether_they_were_cut_off() -> None:
    cut_off, whole = Hypothesis([0, 1, 2], -3.0, is_at_limit=True), Hypothesis([3, 3], -1.0)
    found = outputs_of([cut_off, whole, cut_off], WORDS, RISK, None)
    assert {one.text: one.is_at_limit for one in found} == {
        WORDS.to_text([0, 1, 2]): True, WORDS.to_text([3, 3]): False,
    }  # fmt: skip
