"""How `evaluation:` of a run file is searched."""

from __future__ import annotations

from harness.config.evaluation_schema import EvaluationConfig
from harness.decoding.beam import BeamSettings
from harness.decoding.constraints import Constraints


def beam_settings(options: EvaluationConfig, max_target_length: int, num_hypotheses: int = 1) -> BeamSettings:
    """The search that `evaluation:` asks for; `max_target_length` is the limit where it names none."""
    constraints = Constraints(options.min_target_length, options.no_repeat_ngram, options.repetition_penalty)
    return BeamSettings(
        options.beam_size,
        options.length_penalty,
        options.max_target_length or max_target_length,
        options.max_length_ratio,
        num_hypotheses,
        options.preset,
        constraints=None if constraints == Constraints() else constraints,
    )
