"""Contradictions between keys of a run file that are each right on their own.

Each rule yields (key path, message); a message says the cause and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.config.deepspeed import Problem, document_problems, merged_document, zero_stage
from harness.config.schema import DataSource, RunConfig
from harness.io.accelerator import Accelerator

_DECODED_METRICS = ("bleu", "chrf", "ter")


def contradictions(config: RunConfig, accelerator: Accelerator) -> list[Problem]:
    """Every contradiction of ``config`` on a machine with ``accelerator``."""
    deepspeed = document_problems(config)
    problems = [
        *_model(config, accelerator),
        *_sources(config),
        *_batch(config),
        *_schedule(config),
        *_evaluation(config),
        *_early_stopping(config),
        *deepspeed,
    ]
    if not deepspeed:
        problems += _optimizer(config)
    return problems


def _model(config: RunConfig, accelerator: Accelerator) -> Iterator[Problem]:
    model = config.model
    if model.path is None and model.config is None:
        yield "model", "needs `path` (a pretrained model) or `config` (a config.json, weights drawn at random)"
    if model.path is not None and model.config is not None:
        yield "model.config", "contradicts `model.path`: keep the one you mean (null switches a key off)"
    if model.dtype == "float16" and accelerator == "cpu":
        yield "model.dtype", "float16 training is not possible on a CPU: use bfloat16 or float32"
    if model.attention == "flash_attention_2":
        if accelerator == "cpu":
            yield "model.attention", "flash_attention_2 runs on GPUs only: use sdpa"
        if model.dtype == "float32":
            yield "model.attention", "flash_attention_2 has no float32: set `model.dtype` to bfloat16, or use sdpa"


def _sources(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    named = [(f"data.train.{index}", source) for index, source in enumerate(data.train)]
    named += [
        (f"data.{name}", source)
        for name, source in (("validation", data.validation), ("test", data.test))
        if isinstance(source, DataSource)
    ]
    for key, source in named:
        pair = (source.source is not None) + (source.target is not None)
        if source.path is None and pair == 0:
            yield key, "needs `path`, or `source` and `target`"
        elif source.path is not None and pair:
            yield key, "has `path` as well as `source` or `target`: keep `path`, or the pair"
        elif pair == 1:
            yield key, "needs both `source` and `target`"
    for name, text in (("validation", data.validation), ("test", data.test)):
        if text == "":
            yield f"data.{name}", "is empty: name a file, or null"


def _batch(config: RunConfig) -> Iterator[Problem]:
    data, batch = config.data, config.batch
    longest = max(data.max_source_length, data.max_target_length)
    name = "max_source_length" if longest == data.max_source_length else "max_target_length"
    for key in ("max_tokens_per_device", "tokens_per_step"):
        tokens = getattr(batch, key)
        if tokens < longest:
            yield (
                f"batch.{key}",
                f"{tokens} is less than one longest row (`data.{name}` {longest}): raise it to {longest}",
            )


def _schedule(config: RunConfig) -> Iterator[Problem]:
    schedule = config.schedule
    if schedule.steps is None and schedule.epochs is None:
        yield "schedule", "needs `steps` or `epochs`"
    if schedule.steps is not None and schedule.epochs is not None:
        yield "schedule.epochs", "contradicts `schedule.steps`: keep the one you mean (null switches a key off)"
    if schedule.steps is not None and schedule.warmup_steps > schedule.steps:
        yield (
            "schedule.warmup_steps",
            f"{schedule.warmup_steps} is more than `schedule.steps` ({schedule.steps}): lower it",
        )
    if schedule.min_lr > config.optimizer.lr:
        yield (
            "schedule.min_lr",
            f"{schedule.min_lr:g} is above the peak `optimizer.lr` ({config.optimizer.lr:g}): lower it",
        )


def _optimizer(config: RunConfig) -> Iterator[Problem]:
    document = merged_document(config.deepspeed)
    stage = zero_stage(document)
    if config.optimizer.name == "adafactor" and stage > 0:
        yield (
            "optimizer.name",
            f"adafactor factors the second moment of matrices, and ZeRO stage {stage} cuts them into flat pieces: "
            "set `deepspeed.preset` to zero0, or use adamw",
        )


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation, data = config.evaluation, config.data
    if evaluation is None:
        return
    if evaluation.every_steps is not None and data.validation is None:
        yield "evaluation.every_steps", "there are no rows to score: set `data.validation`, or remove it"
    if len(set(evaluation.metrics)) < len(evaluation.metrics):
        yield "evaluation.metrics", "names a metric twice"
    tokens = evaluation.max_tokens_per_device
    needed = evaluation.beam_size * data.max_source_length
    if tokens is not None and tokens < needed:
        yield (
            "evaluation.max_tokens_per_device",
            f"{tokens} is less than one longest row: beam_size {evaluation.beam_size} x `data.max_source_length` "
            f"{data.max_source_length}: raise it to {needed}",
        )


def _early_stopping(config: RunConfig) -> Iterator[Problem]:
    stopping, evaluation = config.early_stopping, config.evaluation
    if stopping is None:
        return
    if config.data.validation is None:
        yield "early_stopping", "needs rows to score: set `data.validation`, or remove this section"
    if evaluation is None:
        yield "early_stopping", "the model is never scored, `evaluation` is null: add that section with `every_steps`"
    elif evaluation.every_steps is None:
        yield "early_stopping", "the model is scored only at the end: set `evaluation.every_steps`"
    elif stopping.metric in _DECODED_METRICS and stopping.metric not in evaluation.metrics:
        yield "early_stopping.metric", f"{stopping.metric} is not scored: add it to `evaluation.metrics`"
