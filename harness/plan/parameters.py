"""Tensors of a model by arithmetic on its config.json: no torch, no weights.

They are the trainable parameters as ``transformers`` builds the model (tied tensors once), by name; a test compares
every family with the real modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from harness.config.schema import ClassificationConfig, Task
from harness.errors import DataError
from harness.io.atomic import read_json
from harness.plan import encoder_decoders
from harness.plan.decoders import DECODERS
from harness.plan.encoders import ENCODERS
from harness.plan.tensors import ModelJson, Tensors

_TRANSLATORS: dict[str, Callable[[ModelJson], Tensors]] = {
    "mbart": encoder_decoders.mbart,
    "m2m_100": encoder_decoders.m2m_100,
    "marian": encoder_decoders.marian,
    "t5": encoder_decoders.t5,
    "mt5": encoder_decoders.t5,
}
_CLASSIFIERS: dict[str, Callable[[ModelJson, int], Tensors | None]] = {
    **ENCODERS,
    **{family: decoder.classifier for family, decoder in DECODERS.items()},
    "mbart": encoder_decoders.mbart_classifier,
    "t5": encoder_decoders.t5_classifier,
    "mt5": encoder_decoders.t5_classifier,
}

# Families with a table of positions -> its rows that no token can have.
_POSITION_TABLES = {
    "mbart": 0, "marian": 0, "bert": 0, "distilbert": 0, "roberta": 2, "xlm-roberta": 2,
    "gpt2": 0, "gpt_bigcode": 0, "gpt_neo": 0, "gptj": 0, "codegen": 0, "opt": 0, "biogpt": 0,
}  # fmt: skip


def model_json(name_or_directory: str) -> ModelJson | None:
    """config.json of a model directory, or of a hub model if it was downloaded before; else None. Raises DataError."""
    directory = Path(name_or_directory)
    path = directory / "config.json" if directory.is_dir() else _cached_hub_file(name_or_directory)
    if path is None:
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError("must hold a JSON object", where=str(path))
    return content


def model_tensors(
    model: ModelJson, task: Task = "translation", classification: ClassificationConfig | None = None
) -> Tensors | None:
    """Every parameter of the model that ``task`` trains, by name; None for a family whose shapes are not known here.

    A classifier whose labels are not listed is counted with two. Raises DataError for a family that cannot do the task,
    or a missing size.
    """
    family = model.get("model_type")
    if not isinstance(family, str):
        raise DataError("config.json has no `model_type`", hint="it must be the config.json of a transformers model")
    _check_task(family, task)
    try:
        if task == "translation":
            return _TRANSLATORS[family](model)
        if task == "causal_lm":
            return DECODERS[family].language_model(model) if family in DECODERS else None
        build = _CLASSIFIERS.get(family)
        return build(model, _num_labels(classification)) if build else None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"config.json of a {family} model lacks a usable size: {error}") from error


def position_limit(model: ModelJson) -> int | None:
    """Longest input in tokens, for families with a table of positions."""
    unused = _POSITION_TABLES.get(str(model.get("model_type")))
    limit = model.get("max_position_embeddings", model.get("n_positions"))
    return None if unused is None or limit is None else int(limit) - unused


def trained_length(model: ModelJson) -> int | None:
    """Longest input that a model with relative or rotary positions was trained on, as far as config.json says."""
    limit = model.get("max_position_embeddings")
    return int(limit) if isinstance(limit, int) and position_limit(model) is None else None


def _check_task(family: str, task: Task) -> None:
    known = {"translation": list(_TRANSLATORS), "causal_lm": list(DECODERS), "classification": list(_CLASSIFIERS)}
    elsewhere = {name for names in known.values() for name in names}
    if family not in known[task] and (task == "translation" or family in elsewhere):
        hint = f"supported: {', '.join(known[task])}"
        raise DataError(f"model_type {family!r} is not supported by task {task}", hint=hint)


def _num_labels(classification: ClassificationConfig | None) -> int:
    if classification is not None and classification.problem == "regression":
        return 1
    return len(classification.labels) if classification and classification.labels else 2


def _cached_hub_file(name: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    model = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    try:
        snapshot = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = model / "snapshots" / snapshot / "config.json"
    return path if path.is_file() else None
