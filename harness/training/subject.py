"""What MODEL_OR_RUN names on a command line: a model, an adapter or a run's export, and the settings to use it with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from harness.config.evaluation_schema import forget_search_of_preset
from harness.config.load import with_overrides
from harness.config.messages import explain
from harness.config.schema import DataSource, RunConfig
from harness.errors import ConfigError, DataError
from harness.io.atomic import read_json, sha256_file
from harness.models.heads import stored_labels
from harness.models.load import base_fingerprint, is_decoder, model_directory, tokenizer_fingerprint
from harness.models.screen import ADAPTER_CONFIG, base_of_adapter, is_adapter, screen_model_directory, types_of_base
from harness.plan.parameters import position_limit
from harness.plan.plan import Plan
from harness.training.prepare import build_task, evaluation_sources, model_source, with_prepared_labels

DEFAULT_MAX_TOKENS = 4096
DEFAULT_MAX_LENGTH = 256
DEFAULT_PROMPT_LENGTH = 1024  # of a language model, examples included
Sections = Mapping[str, Mapping[str, Any]]


class Member(NamedTuple):
    """A model of an ensemble, or the only one."""

    config: RunConfig
    adapter: str | None

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what the model computes: its files, and how they are read."""
        base = model_source(self.config)
        parts = [self.config.model.model_dump_json(), tokenizer_fingerprint(base), base_fingerprint(base)]
        if self.adapter is not None:
            parts += [sha256_file(Path(self.adapter) / ADAPTER_CONFIG), base_fingerprint(self.adapter)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Subject:
    """What MODEL_OR_RUN names: `config.model.path` is the model, the rest of `config` are the settings to use.

    `adapter` is the directory of an adapter, of which `config.model.path` is the base. `run_dir` and `step` are None
    for a model that is no run's. `others` decode with it as one ensemble.
    """

    name: str
    config: RunConfig
    adapter: str | None = None
    run_dir: Path | None = None
    step: int | None = None
    others: tuple[Member, ...] = ()


def open_ensemble(model_or_run: str, others: Sequence[str], changes: Sections, overrides: Sequence[str]) -> Subject:
    """`open_subject`, with further models that decode with it. `overrides` are `key.path=value`, after `changes`.

    Raises DataError if a tokeniser differs.
    """
    subject = open_subject(model_or_run, changes)
    subject = replace(subject, config=with_overrides(subject.config, overrides))
    members = []
    for other in others:
        opened = open_subject(other, {"model": changes.get("model", {})})
        _check_same_tokens(subject.config, opened.config, other)
        members.append(Member(opened.config, opened.adapter))
    return replace(subject, others=tuple(members))


def _check_same_tokens(config: RunConfig, other: RunConfig, name: str) -> None:
    where = f"--ensemble {name}"
    if config.task != other.task:
        raise DataError(f"its task is {other.task}, not {config.task}", where=where)
    ours, theirs = (build_task(one).tokenizer.get_vocab() for one in (config, other))
    if ours != theirs:
        token = next(iter(dict(ours.items() ^ theirs.items())))
        what = f"its tokeniser is another one: {token!r} is {theirs.get(token)} in it, and {ours.get(token)} in ours"
        raise DataError(what, where=where, hint="an ensemble is made of checkpoints that share a tokeniser")


def open_subject(model_or_run: str, changes: Sections) -> Subject:
    """The model of a run with the run's settings, or any other model with defaults; `changes` as in `with_changes`."""
    run_dir = Path(model_or_run)
    if not (run_dir / "plan.json").is_file():
        row_format = changes.get("data", {}).get("format")
        if not is_adapter(run_dir):
            return Subject(run_dir.resolve().name, with_changes(_default_config(model_or_run, row_format), changes))
        config = with_changes(_default_config(base_of_adapter(run_dir), row_format), {"model": types_of_base(run_dir)})
        return Subject(run_dir.resolve().name, with_changes(config, changes), str(run_dir.absolute()))
    export, summary = run_dir / "export", run_dir / "summary.json"
    if not export.is_dir() or not summary.is_file():
        hint = f"wait for its end, or write a checkpoint as a model: harness export {run_dir} DIRECTORY"
        raise DataError("the run has not come to its end: it has no exported model yet", where=str(run_dir), hint=hint)
    config = with_prepared_labels(Plan.from_json(read_json(run_dir / "plan.json")).config, run_dir)
    adapter = str(export.absolute()) if is_adapter(export) else None
    model = {"path": config.model.path if adapter else str(export), "config": None, "gradient_checkpointing": False}
    config = with_changes(with_changes(config, {"model": model}), changes)
    return Subject(run_dir.resolve().name, config, adapter, run_dir, int(read_json(summary)["exported_step"]))


def with_changes(config: RunConfig, changes: Sections) -> RunConfig:
    """`config` with {section: {key: value}} put over it; a preset brings its own beams and length penalty.

    Raises ConfigError if a value cannot be.
    """
    content = config.model_dump(mode="json")
    content["evaluation"] = content["evaluation"] or {}  # defaults of the task
    if "preset" in changes.get("evaluation", {}):
        forget_search_of_preset(content["evaluation"])
    for section, values in changes.items():
        content[section] |= values
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        (key, what), *_ = explain(error, content)
        raise ConfigError(what, where=".".join(key)) from error


def named_set(subject: Subject) -> tuple[str, DataSource, int | None]:
    """(name, file, number of rows scored) of the run's test set, else of its validation set."""
    sources = evaluation_sources(subject.config) if subject.run_dir else {}
    for name in ("test", "validation"):
        if name in sources:
            assert subject.config.evaluation is not None
            return name, sources[name], subject.config.evaluation.max_rows if name == "validation" else None
    what = "the run has neither a test nor a validation set" if subject.run_dir else "there is nothing to score"
    raise ConfigError(what, where=subject.name, hint="name a file: --data FILE")


def _default_config(model: str, row_format: str | None) -> RunConfig:
    """A run file of defaults around a model, for rows of a format; its training part is never read."""
    directory = model_directory(model)
    content, labels = screen_model_directory(directory, weights=True), stored_labels(directory)
    positions = position_limit(content) or DEFAULT_PROMPT_LENGTH + DEFAULT_MAX_LENGTH
    length = min(DEFAULT_MAX_LENGTH, positions)
    dtype = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    if dtype != "bfloat16" and not (dtype == "float16" and torch.cuda.is_available()):
        dtype = "float32"
    task = "classification" if labels else "causal_lm" if is_decoder(directory) else "translation"
    return RunConfig.model_validate({
        "name": "offline",
        "task": task,
        "classification": labels and labels.model_dump(),
        "model": {"path": model, "dtype": dtype},
        "data": {"train": [{"path": ""}], "packing": False}
        | ({"format": row_format} if row_format else {})
        | dict.fromkeys(("max_source_length", "max_target_length", "max_length"), length)
        | ({"max_length": max(length, min(DEFAULT_PROMPT_LENGTH, positions - length))} if task == "causal_lm" else {}),
        "batch": {"tokens_per_step": DEFAULT_MAX_TOKENS, "max_tokens_per_device": DEFAULT_MAX_TOKENS},
        "optimizer": {"lr": 1.0},
        "schedule": {"steps": 1},
    })  # fmt: skip
