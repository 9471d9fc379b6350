"""Contradictions between what is loaded, what is trained of it and what is trained beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from harness.config.deepspeed import Problem
from harness.config.layers import layer_numbers
from harness.config.schema import AdapterConfig, FreezeRule, RunConfig
from harness.config.task_rules import is_set
from harness.io.accelerator import Accelerator

# Methods that put virtual tokens in front of the input or of its keys and values.
PROMPT_METHODS = ("prefix_tuning", "prompt_tuning", "p_tuning")

_LOW_RANK = ("rank", "alpha", "dropout", "targets")
_KEYS_OF_METHOD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lora", "rslora", "dora", "pissa", "adalora"), (*_LOW_RANK, "modules_to_save")),
    "ia3": ("targets", "modules_to_save"),
    "prefix_tuning": ("num_virtual_tokens", "modules_to_save"),
    "prompt_tuning": ("num_virtual_tokens", "modules_to_save"),
    "p_tuning": ("num_virtual_tokens", "dropout", "modules_to_save"),
    "bottleneck": ("bottleneck_size", "dropout", "modules_to_save"),
}


def model_problems(config: RunConfig, accelerator: Accelerator) -> list[Problem]:
    """Every contradiction of adapter, quantisation, freezing, recomputation and noise."""
    return [
        *_adapter(config),
        *_quantization(config, accelerator),
        *_precision(config, accelerator),
        *_freeze(config),
        *_activations(config),
    ]


def _adapter(config: RunConfig) -> Iterator[Problem]:
    adapter = config.adapter
    if adapter is None:
        return
    used = _KEYS_OF_METHOD[adapter.method]
    for key in AdapterConfig.model_fields:
        if key != "method" and key not in used and is_set(adapter, key):
            yield f"adapter.{key}", f"{adapter.method} has no use for it: it has {', '.join(used)}"
    if isinstance(adapter.targets, str) and (complaint := _bad_pattern(adapter.targets)):
        yield "adapter.targets", complaint
    if adapter.method in PROMPT_METHODS and config.task == "causal_lm" and config.data.packing:
        yield (
            "adapter.method",
            f"{adapter.method} puts its tokens in front of a sequence, and packing puts several rows into one: "
            "set `data.packing` to false",
        )


def _quantization(config: RunConfig, accelerator: Accelerator) -> Iterator[Problem]:
    quantization, adapter = config.model.quantization, config.adapter
    if quantization is None:
        return
    if adapter is None:
        yield "model.quantization", "weights in 4 or 8 bits cannot be trained: add the section `adapter`"
    elif adapter.method == "pissa":
        yield "adapter.method", "pissa decomposes weights in full precision: use lora, or remove `model.quantization`"
    if quantization.bits == 8:
        for key in ("type", "double", "compute_dtype", "storage_dtype"):
            if is_set(quantization, key):
                yield f"model.quantization.{key}", "is a choice of 4-bit weights: remove it, or set `bits` to 4"
    if quantization.compute_dtype == "float16" and accelerator == "cpu":
        yield "model.quantization.compute_dtype", "float16 is ten times slower on a CPU: use bfloat16 or float32"


def _precision(config: RunConfig, accelerator: Accelerator) -> Iterator[Problem]:
    """What cannot be decoded in int8."""
    if config.evaluation is None or config.evaluation.precision != "int8":
        return
    key, method = "evaluation.precision", config.adapter.method if config.adapter is not None else None
    if accelerator != "cpu":
        yield key, "int8 is for CPUs: set it to bfloat16"
    if config.model.quantization is not None:
        yield key, "the weights are in 4 or 8 bits already (`model.quantization`): remove it"
    if method == "dora":
        yield key, "dora computes with the base's own weights: set it to bfloat16 or model"


def _freeze(config: RunConfig) -> Iterator[Problem]:
    rules = [config.freeze] if isinstance(config.freeze, FreezeRule) else config.freeze
    if rules and config.adapter is not None:
        yield "freeze", "the base is frozen already: `adapter` trains nothing else; remove one of the two"
    for index, rule in enumerate(rules):
        key = "freeze" if isinstance(config.freeze, FreezeRule) else f"freeze.{index}"
        for name, problem in _freeze_rule(config, rule):
            yield f"{key}.{name}" if name else key, problem


def _freeze_rule(config: RunConfig, rule: FreezeRule) -> Iterator[Problem]:
    if not any(is_set(rule, key) for key in FreezeRule.model_fields if key != "until_step"):
        yield "", "freezes nothing: name `encoder`, `decoder`, `layers`, `embeddings` or `patterns`"
    for key in ("encoder", "decoder", "layers"):
        text = getattr(rule, key)
        try:
            if text is not None:
                layer_numbers(text)
        except ValueError as error:
            yield key, f"{error}: write it like 0-9, 0,2,4 or all"
    one_stack, two_stacks = rule.layers is not None, rule.encoder is not None or rule.decoder is not None
    if config.task == "translation" and one_stack:
        yield "layers", "a translation model has two stacks of layers: use `encoder` and `decoder`"
    if config.task == "causal_lm" and two_stacks:
        yield "encoder" if rule.encoder is not None else "decoder", "a language model has one stack: use `layers`"
    for index, pattern in enumerate(rule.patterns):
        if complaint := _bad_pattern(pattern):
            yield f"patterns.{index}", complaint
    steps = config.schedule.steps
    if rule.until_step is not None and steps is not None and rule.until_step >= steps:
        yield "until_step", f"{rule.until_step} is the end of the run (`schedule.steps` {steps}) or later: remove it"


def _activations(config: RunConfig) -> Iterator[Problem]:
    method = config.adapter.method if config.adapter is not None else None
    if method == "prefix_tuning" and config.model.gradient_checkpointing:
        yield (
            "model.gradient_checkpointing",
            "prefix_tuning hands each layer keys and values that recomputing would lose: set it to false",
        )
    if method in ("prompt_tuning", "p_tuning") and config.model.neftune_alpha is not None:
        yield "model.neftune_alpha", f"{method} has its own input embeddings, which get no noise: remove it"


def _bad_pattern(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return f"not a regular expression: {error}"
    return None
