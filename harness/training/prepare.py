"""From the user's files to encoded rows on disk; done by one process, before any rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import ClassificationConfig, DataSource, LossConfig, RunConfig
from harness.data.cache import Prepared, load_rows, prepare_rows, write_reports
from harness.data.encoded import EncodedRows
from harness.data.leakage import held_out_sources
from harness.data.rows import Row
from harness.data.sources import as_source, existing_file, read_rows
from harness.errors import ConfigError
from harness.io.atomic import read_json, sha256_file, write_json
from harness.models.load import base_fingerprint, load_family, load_matching_tokenizer, tokenizer_fingerprint
from harness.tasks.causal_lm import CausalTask
from harness.tasks.classification import ClassificationTask, with_labels_of
from harness.tasks.task import Task
from harness.tasks.translation import TranslationTask

CACHE_DIRECTORY = ".cache"
LABELS_FILE = "labels.json"


@dataclass(frozen=True)
class RowSets:
    """Encoded rows of the run; a set the run file does not name is None."""

    train: EncodedRows
    validation: EncodedRows | None
    test: EncodedRows | None


def build_task(config: RunConfig) -> Task:
    """The task with the tokeniser of the run's model. Raises DataError if the two do not fit.

    The labels of a classification must be known: see `with_labels`.
    """
    return _TASKS[config.task](config)


def _translation(config: RunConfig) -> TranslationTask:
    family, tokenizer = load_family(model_source(config))
    for name in ("max_source_length", "max_target_length"):
        family.check_length(getattr(config.data, name), f"data.{name}")
    if config.evaluation and config.evaluation.max_target_length:
        family.check_length(config.evaluation.max_target_length, "evaluation.max_target_length")
    return TranslationTask(tokenizer, family, config.data, config.loss)


def _causal_lm(config: RunConfig) -> CausalTask:
    tokenizer = load_matching_tokenizer(model_source(config), "causal_lm")
    in_one_row = config.model.attention == "flash_attention_2"
    stop_strings = tuple(config.evaluation.stop_strings) if config.evaluation else ()
    return CausalTask(tokenizer, config.data, config.loss, in_one_row, stop_strings)


def _classification(config: RunConfig) -> ClassificationTask:
    return ClassificationTask.from_config(load_matching_tokenizer(model_source(config), "classification"), config)


_TASKS: dict[str, Callable[[RunConfig], Task]] = {
    "translation": _translation,
    "causal_lm": _causal_lm,
    "classification": _classification,
}


def with_labels(config: RunConfig) -> RunConfig:
    """The run with what a classification leaves to its training rows: their labels, the weights of balanced ones."""
    if config.task != "classification":
        return config
    rows = (row for source in config.data.train for row in read_rows(source, config.data) if isinstance(row, Row))
    return with_labels_of(config, rows)


def with_prepared_labels(config: RunConfig, run_dir: Path) -> RunConfig:
    """`with_labels` without reading the rows again: what `prepare` has found."""
    if config.task != "classification":
        return config
    found = read_json(run_dir / LABELS_FILE)
    parts = {"classification": ClassificationConfig(**found["classification"]), "loss": LossConfig(**found["loss"])}
    return config.model_copy(update=parts)


def model_source(config: RunConfig) -> str:
    """Directory or hub name the model comes from."""
    return config.model.path or config.model.config or ""


def evaluation_sources(config: RunConfig) -> dict[str, DataSource]:
    """The evaluation sets that the run file names."""
    named = {"validation": config.data.validation, "test": config.data.test}
    return {name: as_source(source) for name, source in named.items() if source is not None}


def base_digest(config: RunConfig) -> str:
    """`base_fingerprint` of a base whose frozen weights are in no checkpoint; "" where all weights are in it, or follow
    from the seed."""
    is_partly_frozen = config.adapter is not None or bool(config.freeze)
    return base_fingerprint(config.model.path) if is_partly_frozen and config.model.path else ""


def prepare(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Clean, encode and cache all sets, write the reports into `run_dir`.

    Returns what every rank must know: the directory of each set, and `base_digest`.
    """
    if config.adapter is not None and config.model.path is None:
        hint = "name a pretrained model in model.path"
        raise ConfigError("an adapter belongs to a base with weights", where="model.config", hint=hint)
    config = with_labels(config)
    prepared = prepare_sets(config, build_task(config), run_dir)
    write_reports(run_dir, prepared.values())
    if config.classification is not None:
        sections = {"classification": config.classification, "loss": config.loss}
        write_json(run_dir / LABELS_FILE, {name: section.model_dump() for name, section in sections.items()})
    directories = {name: str(one.rows.directory) for name, one in prepared.items()}
    return {"sets": directories, "base_digest": base_digest(config)}


def prepare_sets(config: RunConfig, task: Task, report_dir: Path | None = None) -> dict[str, Prepared]:
    """`train` and the evaluation sets, cleaned and encoded, or found in the cache."""
    sets = evaluation_sources(config)
    held_out = held_out_sources(sets.values(), config.data)
    cache_root = Path(config.output_dir) / CACHE_DIRECTORY
    places: dict[str, Any] = {"cache_root": cache_root, "report_dir": report_dir}
    for_training, for_scores = encoding(config, task, is_training=True), encoding(config, task, is_training=False)
    train = prepare_rows("train", config.data.train, config.data, held_out=held_out, **for_training, **places)
    others = {name: prepare_rows(name, [source], config.data, **for_scores, **places) for name, source in sets.items()}
    return {"train": train, **others}


def encoding(config: RunConfig, task: Task, *, is_training: bool) -> dict[str, Any]:
    """What `prepare_rows` must know of the task: how rows become numbers, and a hash of all that decides it."""
    labels = config.classification and config.classification.model_dump_json()
    few_shot = config.data.few_shot and sha256_file(existing_file(Path(config.data.few_shot.path)))
    return {
        "is_training": is_training,
        "encode": task.encode_for_training if is_training else task.encode_for_scores,
        "fingerprint": f"{config.task} {tokenizer_fingerprint(model_source(config))} {labels} {few_shot}",
        "float_labels": config.classification is not None and config.classification.problem == "regression",
    }


def open_sets(directories: dict[str, str]) -> RowSets:
    """Open what `prepare` has left, on any rank."""
    rows = {name: load_rows(Path(directory)) for name, directory in directories.items()}
    return RowSets(rows["train"], rows.get("validation"), rows.get("test"))
