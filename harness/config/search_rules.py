"""Contradictions between the keys of `evaluation` that say how outputs are searched or drawn."""

from __future__ import annotations

from collections.abc import Iterator

from harness.config.deepspeed import Problem
from harness.config.evaluation_schema import EvaluationConfig
from harness.config.schema import RunConfig
from harness.config.task_rules import decodes


def search_problems(config: RunConfig) -> Iterator[Problem]:
    """What no search can do."""
    options = config.evaluation
    if options is None:
        return
    yield from _kind(options)
    if config.data.constraints_column and decodes(config):
        yield from _constraints(options)
    yield from _groups(options)
    yield from _lengths(options, options.max_target_length or config.data.max_target_length)
    if any(not text.strip() for text in options.bad_words):
        yield "evaluation.bad_words", "an empty text would forbid every output: remove it"


def _kind(options: EvaluationConfig) -> Iterator[Problem]:
    """Beams or draws, and how many outputs are kept."""
    if options.early_stopping and options.preset != "hf":
        yield "evaluation.early_stopping", f"is a rule of preset hf; {options.preset} has its own: remove it"
    if options.draws:
        what = "minimum_risk" if options.minimum_risk else "sampling"
        for key in ("early_stopping", "beam_groups"):
            if getattr(options, key) != EvaluationConfig.model_fields[key].default:
                yield f"evaluation.{key}", f"has no meaning with `evaluation.{what}`, which draws outputs: remove it"
    if options.num_hypotheses > options.num_outputs:
        more = "minimum_risk.samples" if options.minimum_risk else "beam_size"
        yield (
            "evaluation.num_hypotheses",
            f"{options.num_hypotheses} outputs cannot be kept of {options.num_outputs}: "
            f"raise `evaluation.{more}` to {options.num_hypotheses}",
        )


def _constraints(options: EvaluationConfig) -> Iterator[Problem]:
    """Phrases that outputs must have need beams, in banks."""
    key = "data.constraints_column"
    if options.draws or options.beam_groups > 1:
        yield key, "is for a beam search: remove `evaluation.sampling`, `minimum_risk` and `beam_groups`"
    elif options.preset != "hf" or options.beam_size == 1:
        yield key, "needs `evaluation.preset` hf and a `beam_size` of at least 2"


def _groups(options: EvaluationConfig) -> Iterator[Problem]:
    groups = options.beam_groups
    if groups > 1 and options.preset != "hf":
        yield "evaluation.beam_groups", f"are only known to preset hf, not to {options.preset}"
    if groups > 1 and options.diversity_penalty == 0.0:
        yield "evaluation.beam_groups", "all groups would find the same: set `evaluation.diversity_penalty`, like 0.5"
    if groups == 1 and options.diversity_penalty > 0.0:
        yield "evaluation.diversity_penalty", "keeps groups of beams apart, and there is one: set `beam_groups`"
    if options.beam_size % groups and not options.draws:
        yield "evaluation.beam_groups", f"{groups} groups cannot share {options.beam_size} beams: it must divide them"


def _lengths(options: EvaluationConfig, longest: int) -> Iterator[Problem]:
    if options.min_target_length >= longest:
        yield "evaluation.min_target_length", f"must be less than the longest output, {longest} tokens"
    least, most = options.min_length_ratio, options.max_length_ratio
    if least is not None and most is not None and least > most:
        yield "evaluation.min_length_ratio", f"{least:g} is more than `evaluation.max_length_ratio` ({most:g})"
