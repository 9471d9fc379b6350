"""Contradictions between `task` and what the run file says of rows, labels, loss and scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from harness.config.deepspeed import Problem
from harness.config.evaluation_schema import ClassMetric, DecodedMetric
from harness.config.prompt_rules import prompt_problems
from harness.config.schema import RunConfig
from harness.config.section import Section

DECODED_METRICS: tuple[str, ...] = get_args(DecodedMetric)
_REGRESSION_METRICS = ("rmse", "pearson", "spearman")
_LABEL_METRICS = tuple(name for name in get_args(ClassMetric) if name not in _REGRESSION_METRICS)
_LEAST_P = 0.001  # of evaluation/significance.py's 1,000 resamplings

_WRITTEN = "pairs written as prompts"  # `pairs` of causal_lm
_CONVERSATIONS = ("prompt", "messages", _WRITTEN)
_FORMATS: dict[str, tuple[str, ...]] = {
    "translation": ("pairs",),
    "causal_lm": ("text", "prompt", "messages", "pairs"),
    "classification": ("labelled",),
}
# Key of `data` -> the formats that have a use for it.
_FORMATS_OF_KEY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("source_column", "target_column", "source_language", "target_language"), ("pairs", _WRITTEN)),
    "constraints_column": ("pairs", _WRITTEN),
    **dict.fromkeys(("source_prefix", "max_source_length"), ("pairs",)),
    "max_target_length": ("pairs", *_CONVERSATIONS),
    "text_column": ("text", "labelled"),
    **dict.fromkeys(("text_pair_column", "label_column"), ("labelled",)),
    **dict.fromkeys(("prompt_column", "completion_column"), ("prompt",)),
    "messages_column": ("messages",),
    **dict.fromkeys(("prompt_template", "few_shot"), (_WRITTEN,)),
    "system_prompt": _CONVERSATIONS,
    "max_length": ("text", *_CONVERSATIONS, "labelled"),
    "packing": ("text", *_CONVERSATIONS),
}
# Other keys, of one task or of the tasks that decode.
_LABEL_KEYS = ("classification", "loss.focal_gamma", "loss.class_weights")
_BEAM_KEYS = (
    "preset", "beam_size", "length_penalty", "max_target_length", "max_length_ratio", "min_target_length",
    "no_repeat_ngram", "repetition_penalty", "max_tokens_per_device", "early_stopping", "num_hypotheses",
    "beam_groups", "diversity_penalty", "sampling", "minimum_risk", "min_length_ratio", "bad_words", "allow_unknown",
    "precision",
)  # fmt: skip
_TASKS_OF_KEY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LABEL_KEYS, ("classification",)),
    **dict.fromkeys((f"evaluation.{key}" for key in _BEAM_KEYS), ("translation", "causal_lm")),
    "evaluation.stop_strings": ("causal_lm",),
}


def task_problems(config: RunConfig) -> list[Problem]:
    """Every contradiction between the task and the rest of the run file."""
    return [
        *foreign_keys(config),
        *_format(config),
        *_classification(config),
        *metric_problems(config),
        *_significance(config),
        *prompt_problems(config),
    ]


def decodes(config: RunConfig) -> bool:
    """Whether scoring the run means decoding."""
    evaluation = config.evaluation
    return evaluation is not None and any(metric in DECODED_METRICS for metric in evaluation.metrics)


def is_set(section: Section, key: str) -> bool:
    """Whether ``key`` has another value than its default."""
    default: Any = type(section).model_fields[key].get_default(call_default_factory=True)
    return bool(getattr(section, key) != default)


def foreign_keys(config: RunConfig) -> Iterator[Problem]:
    """Keys that the task or the rows' format has no use for."""
    data = config.data
    row_format = _WRITTEN if config.task == "causal_lm" and data.format == "pairs" else data.format
    for key, formats in _FORMATS_OF_KEY.items():
        if row_format not in formats and is_set(data, key):
            yield f"data.{key}", f"has no meaning with `data.format` {data.format} (task {config.task}): remove it"
    for path, tasks in _TASKS_OF_KEY.items():
        section: Any = config
        *parents, key = path.split(".")
        for parent in parents:
            section = getattr(section, parent)
        if config.task not in tasks and isinstance(section, Section) and is_set(section, key):
            yield path, f"has no meaning with task {config.task}, only with {' and '.join(tasks)}: remove it"


def _format(config: RunConfig) -> Iterator[Problem]:
    formats = _FORMATS[config.task]
    if config.data.format not in formats:
        wanted = " or ".join(formats)
        yield "data.format", f"{config.data.format} does not fit task {config.task}: set it to {wanted}"


def _classification(config: RunConfig) -> Iterator[Problem]:
    classification, loss = config.classification, config.loss
    if classification is None:
        return
    labels = classification.labels
    if labels is not None and len(set(labels)) < len(labels):
        yield "classification.labels", "names a label twice"
    if classification.problem == "regression":
        if labels is not None:
            yield "classification.labels", "a regression has no labels: remove them, or change `problem`"
        for key in ("focal_gamma", "class_weights", "label_smoothing"):
            if is_set(loss, key):
                yield f"loss.{key}", "a regression has a squared error and no labels: remove it"
    weights = loss.class_weights if isinstance(loss.class_weights, dict) else {}
    if labels is not None and (unknown := sorted(set(weights) - set(labels))):
        yield "loss.class_weights", f"{', '.join(unknown)} is not in `classification.labels`: {', '.join(labels)}"
    if any(weight <= 0 for weight in weights.values()):
        yield "loss.class_weights", "a weight must be greater than 0: leave the rows of that label out instead"


def _significance(config: RunConfig) -> Iterator[Problem]:
    stopping, key = config.early_stopping, "early_stopping.significance"
    if stopping is None or stopping.significance is None:
        return
    if stopping.metric not in DECODED_METRICS:
        yield key, f"compares the outputs of {', '.join(DECODED_METRICS)}, and {stopping.metric} has none: remove it"
    elif stopping.significance < _LEAST_P:
        yield key, f"a paired bootstrap gives no p below {_LEAST_P}: raise it to that or more"


def metric_problems(config: RunConfig) -> Iterator[Problem]:
    """Scores that cannot be had."""
    if config.evaluation is None:
        return
    for metric in config.evaluation.metrics:
        if reason := _no_metric(config, metric):
            yield "evaluation.metrics", f"{metric} {reason}"


def _no_metric(config: RunConfig, metric: str) -> str | None:
    if config.task != "classification":
        if metric not in DECODED_METRICS:
            return f"scores labels, and task {config.task} has none: use {', '.join(DECODED_METRICS)}, or []"
        if config.data.format == "text":
            return "compares an answer with the row's own, and plain text has none: use [], the loss is always scored"
        return None
    problem = config.classification.problem if config.classification is not None else "single_label"
    known = _REGRESSION_METRICS if problem == "regression" else _LABEL_METRICS
    if metric in known:
        return None
    if metric in _REGRESSION_METRICS:
        return f"scores numbers, and these are labels: use {', '.join(known)}, or set `classification.problem`"
    return f"does not score {'numbers' if problem == 'regression' else 'labels'}: use {', '.join(known)}"
