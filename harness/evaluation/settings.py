"""How `evaluation:` of a run file is searched."""

from __future__ import annotations

from harness.config.evaluation_schema import EvaluationConfig
from harness.config.schema import RunConfig
from harness.decoding.beam import BeamSettings, MinimumRisk
from harness.decoding.constraints import Constraints
from harness.decoding.sampling import Sampling
from harness.tasks.task import DecodingTask


def beam_settings(config: RunConfig, task: DecodingTask) -> BeamSettings:
    """The search that `evaluation:` asks for. Draws follow from the run's seed, and have no beams."""
    options = config.evaluation or EvaluationConfig()
    constraints = Constraints(
        options.min_target_length,
        options.no_repeat_ngram,
        options.repetition_penalty,
        _bad_words(options, task),
        options.min_length_ratio,
    )
    drawing, risk = options.sampling, options.minimum_risk
    sampling = Sampling(seed=config.seed) if risk and not drawing else None
    if drawing:
        sampling = Sampling(drawing.temperature, drawing.top_k, drawing.top_p, config.seed)
    return BeamSettings(
        1 if sampling else options.beam_size,
        options.length_penalty,
        options.max_target_length or config.data.max_target_length,
        options.max_length_ratio,
        options.num_hypotheses,
        options.preset,
        options.early_stopping,
        options.beam_groups,
        options.diversity_penalty,
        None if constraints == Constraints() else constraints,
        sampling,
        MinimumRisk(risk.utility, risk.samples) if risk else None,
    )


def _bad_words(options: EvaluationConfig, task: DecodingTask) -> tuple[tuple[int, ...], ...]:
    """Token sequences of the texts as they are written at the start of a line and after a space, and <unk>."""
    found = [way for bad in options.bad_words for way in task.ways_to_write(bad)]
    unknown = task.tokenizer.unk_token_id
    if not options.allow_unknown and unknown is not None:
        found.append((unknown,))
    return tuple(dict.fromkeys(found))
