"""Contradictions between keys of a run file that are each right on their own.

Each rule yields (key path, message); a message says the cause and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.config.deepspeed import (
    OffloadDevice,
    Problem,
    document_problems,
    merged_document,
    offload_device,
    zero_stage,
)
from harness.config.launch_rules import launch_problems
from harness.config.model_rules import model_problems
from harness.config.schema import DataSource, RunConfig
from harness.config.search_rules import search_problems
from harness.config.task_rules import decodes, task_problems
from harness.io.accelerator import Accelerator

_WHOLE_MATRICES = {
    "adafactor": "factors the second moment of matrices",
    "muon": "orthogonalises the momentum of matrices",
}


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
        *task_problems(config),
        *search_problems(config),
        *model_problems(config, accelerator),
        *launch_problems(config),
        *deepspeed,
    ]
    if not deepspeed:
        problems += stage_problems(config)
    return problems


def stage_problems(config: RunConfig) -> Iterator[Problem]:
    """What cannot be done with the ZeRO stage and offload of a DeepSpeed document that is right in itself."""
    yield from _optimizer(config)
    yield from _adapter(config)


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
        if data.format != "pairs":
            yield from _one_file(key, source, data.format)
        elif source.path is None and pair == 0:
            yield key, "needs `path`, or `source` and `target`"
        elif source.path is not None and pair:
            yield key, "has `path` as well as `source` or `target`: keep `path`, or the pair"
        elif pair == 1:
            yield key, "needs both `source` and `target`"
    for name, text in (("validation", data.validation), ("test", data.test)):
        if text == "":
            yield f"data.{name}", "is empty: name a file, or null"


def _one_file(key: str, source: DataSource, row_format: str) -> Iterator[Problem]:
    if source.path is None or source.source is not None or source.target is not None:
        yield key, f"needs `path`, and only that: with `data.format` {row_format} all of a row is in one file"
    for name in ("source_language", "target_language"):
        if getattr(source, name) is not None:
            yield f"{key}.{name}", f"has no meaning with `data.format` {row_format}: remove it"


def _batch(config: RunConfig) -> Iterator[Problem]:
    data, batch = config.data, config.batch
    names = ("max_source_length", "max_target_length") if config.task == "translation" else ("max_length",)
    name = max(names, key=lambda name: getattr(data, name))
    longest = getattr(data, name)
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
    document, optimizer = merged_document(config.deepspeed), config.optimizer
    offload = offload_device(document, "optimizer")
    if problem := optimizer_problem(optimizer.name, stage=zero_stage(document), offload=offload):
        yield "optimizer.name", problem
    if optimizer.implementation != "auto" and optimizer.name != "adamw":
        yield "optimizer.implementation", f"only adamw has two, and this is {optimizer.name}: remove it"
    if optimizer.head_lr is not None and config.task != "classification":
        yield "optimizer.head_lr", f"only classification makes a new head, and this is {config.task}: remove it"


def optimizer_problem(name: str, *, stage: int, offload: OffloadDevice) -> str | None:
    """Why an optimizer cannot be used at a ZeRO stage, None if it can. What is refused gave wrong steps, or none."""
    if name in _WHOLE_MATRICES and stage > 0:
        return (
            f"{name} {_WHOLE_MATRICES[name]}, and ZeRO stage {stage} cuts them into flat pieces: "
            "set `deepspeed.preset` to zero0, or use adamw"
        )
    if name != "adamw" and offload == "nvme":
        return f"DeepSpeed swaps the states of adamw to NVMe, not those of {name}: use adamw, or offload to cpu"
    return None


def _adapter(config: RunConfig) -> Iterator[Problem]:
    """Adapters that cannot be trained on a quantised base, in a type, or with a ZeRO stage or offload."""
    adapter, quantization = config.adapter, config.model.quantization
    if adapter is None:
        return
    document = merged_document(config.deepspeed)
    if quantization is not None:
        if adapter.method == "dora" and quantization.bits == 8:
            yield (
                "adapter.method",
                "dora needs the norms of the base's columns, which 8-bit weights do not give: use lora",
            )
        elif adapter.method == "dora" and zero_stage(document) == 3:
            yield (
                "adapter.method",
                "dora reads 4-bit weights where ZeRO stage 3 has not gathered them: use zero2, or lora",
            )
        if adapter.method == "ia3" and config.model.dtype != "float32":
            yield "adapter.method", "ia3 on a quantised base gives float32 to layers of another type: use lora"
    if adapter.method == "adalora" and config.model.dtype == "float16":
        yield (
            "adapter.method",
            "adalora compares gradients of many steps, and float16 scales each differently: use bfloat16",
        )
    if adapter.method == "adalora" and offload_device(document, "optimizer") == "nvme":
        yield (
            "adapter.method",
            "adalora keeps its importances in memory, beside moments that are on NVMe: offload to the cpu",
        )


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation, data = config.evaluation, config.data
    if evaluation is None:
        return
    if evaluation.every_steps is not None and data.validation is None:
        yield "evaluation.every_steps", "there are no rows to score: set `data.validation`, or remove it"
    if len(set(evaluation.metrics)) < len(evaluation.metrics):
        yield "evaluation.metrics", "names a metric twice"
    name = "max_source_length" if config.task == "translation" else "max_length"
    tokens, longest = evaluation.max_tokens_per_device, getattr(data, name)
    needed = evaluation.num_outputs * longest
    if tokens is not None and tokens < needed and decodes(config):
        yield (
            "evaluation.max_tokens_per_device",
            f"{tokens} is less than one longest row: {evaluation.num_outputs} outputs x `data.{name}` {longest}: "
            f"raise it to {needed}",
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
    elif stopping.metric not in ("loss", "nll", *evaluation.metrics):
        yield "early_stopping.metric", f"{stopping.metric} is not scored: add it to `evaluation.metrics`"
