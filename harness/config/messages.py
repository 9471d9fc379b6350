"""pydantic's errors in the user's words, with the nearest name for an unknown key."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from harness.config.launch_schema import PATTERNS
from harness.config.nearest import did_you_mean, nearest
from harness.config.schema import RunConfig

KeyPath = tuple[str, ...]

# What other trainers call a thing -> our key.
SYNONYMS: dict[str, str] = {
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clipping": "optimizer.clip_norm",
    "batch_size": "batch.tokens_per_step",
    "per_device_train_batch_size": "batch.max_tokens_per_device",
    "gradient_accumulation_steps": "batch.tokens_per_step",
    "max_tokens": "batch.max_tokens_per_device",
    "max_steps": "schedule.steps",
    "max_update": "schedule.steps",
    "num_train_epochs": "schedule.epochs",
    "num_epochs": "schedule.epochs",
    "warmup": "schedule.warmup_steps",
    "warmup_updates": "schedule.warmup_steps",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "num_beams": "evaluation.beam_size",
    "beam": "evaluation.beam_size",
    "eval_steps": "evaluation.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "monitor.log_every_steps",
    "model_name_or_path": "model.path",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "precision": "model.dtype",
    "src_lang": "data.source_language",
    "tgt_lang": "data.target_language",
    "num_gpus": "launch.processes",
    "zero_stage": "deepspeed.preset",
    "stage": "deepspeed.preset",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "peft_type": "adapter.method",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization.type",
    "bnb_4bit_use_double_quant": "model.quantization.double",
    "bnb_4bit_compute_dtype": "model.quantization.compute_dtype",
    "bnb_4bit_quant_storage": "model.quantization.storage_dtype",
    "neftune_noise_alpha": "model.neftune_alpha",
    "max_seq_length": "data.max_length",
    "block_size": "data.max_length",
    "cutoff_len": "data.max_length",
    "num_labels": "classification.labels",
    "problem_type": "classification.problem",
}


def explain(error: ValidationError, document: dict[str, Any]) -> list[tuple[KeyPath, str]]:
    """(key path, message) of every error; alternatives of one value are joined to one message."""
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        by_key.setdefault(_key_path(details, document), []).append(details)
    around = {key[:length] for key in by_key for length in range(len(key))}
    explained = []
    for key, found in by_key.items():
        if key in around and isinstance(found[0]["input"], dict | list):
            continue  # "must be a string" beside an error inside the section or list that was written
        complaints = " or ".join(dict.fromkeys(_complaint(details, key) for details in found))
        explained.append((key, complaints + _got(found[0])))
    return explained


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened, with its kind where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{value[:60]}'"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return str(value)[:60]


def _key_path(details: ErrorDetails, document: Any) -> KeyPath:
    """The error's location without pydantic's names of union members, which are not keys of the document."""
    path: list[str] = []
    location = details["loc"]
    for position, part in enumerate(location):
        is_last = position + 1 == len(location)
        is_key = isinstance(document, dict) and part in document
        if is_key or (isinstance(document, list) and isinstance(part, int) and part < len(document)):
            document = document[part]
        elif not (is_last and details["type"] == "missing"):
            continue
        path.append(str(part))
    return tuple(path)


def _complaint(details: ErrorDetails, key: KeyPath) -> str:
    kind, value = details["type"], details["input"]
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        return f"unknown key{_suggestion(key)}"
    if kind in ("model_type", "dict_type"):
        return "must be a section (`key: value` lines)"
    if kind == "invalid_key":
        return "a key must be text (put it in quotes)"
    if kind == "string_pattern_mismatch":
        name = "must start with a letter or digit and hold only letters, digits, '.', '_' and '-'"
        return PATTERNS.get(details["ctx"]["pattern"], name)
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "must be text (put it in quotes)"
    text = details["msg"].replace("Input should be", "must be").replace("a valid string", "text")
    if kind == "literal_error" and isinstance(value, str):
        text += did_you_mean(value, details["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return text


def _got(details: ErrorDetails) -> str:
    return "" if details["type"] in ("missing", "extra_forbidden") else f", got {shown(details['input'])}"


def _suggestion(key: KeyPath) -> str:
    *section, name = key
    known = _all_keys()
    inside = ".".join(part for part in section if not part.isdigit())
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == inside]
    if sibling := nearest(name, siblings):
        return f" (did you mean `{'.'.join([*section, sibling])}`?)"
    if name in SYNONYMS:
        return f" (did you mean `{SYNONYMS[name]}`?)"
    by_leaf: dict[str, str] = {}
    for path in known:
        by_leaf.setdefault(path.rpartition(".")[2], path)
    if elsewhere := nearest(name, by_leaf):
        return f" (did you mean `{by_leaf[elsewhere]}`?)"
    return f"; keys here: {', '.join(siblings)}" if siblings else ""


@cache
def _all_keys() -> list[str]:
    """Key paths of the whole schema, without list indices."""
    return list(dict.fromkeys(_keys(RunConfig, "")))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in sections_of(info.annotation):
            yield from _keys(section, f"{prefix}{name}.")


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The models inside a field's annotation (optional, union or list)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in sections_of(argument)]
