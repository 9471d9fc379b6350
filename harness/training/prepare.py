"""From the user's files to encoded rows on disk; done by one process, before any rank waits for another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import DataSource, RunConfig
from harness.data.cache import Prepared, load_rows, prepare_rows, write_reports
from harness.data.encoded import EncodedRows
from harness.data.leakage import held_out_sources
from harness.data.sources import as_source
from harness.models.load import load_family, tokenizer_fingerprint
from harness.tasks.translation import TranslationTask

CACHE_DIRECTORY = ".cache"


@dataclass(frozen=True)
class RowSets:
    """Encoded rows of the run; a set the run file does not name is None."""

    train: EncodedRows
    validation: EncodedRows | None
    test: EncodedRows | None


def build_task(config: RunConfig) -> TranslationTask:
    """The task with the tokeniser of the run's model. Raises DataError if the two do not fit."""
    family, tokenizer = load_family(model_source(config))
    for name in ("max_source_length", "max_target_length"):
        family.check_length(getattr(config.data, name), f"data.{name}")
    if config.evaluation and config.evaluation.max_target_length:
        family.check_length(config.evaluation.max_target_length, "evaluation.max_target_length")
    return TranslationTask(tokenizer, family, config.data)


def model_source(config: RunConfig) -> str:
    """Directory or hub name the model comes from."""
    return config.model.path or config.model.config or ""


def evaluation_sources(config: RunConfig) -> dict[str, DataSource]:
    """The evaluation sets that the run file names."""
    named = {"validation": config.data.validation, "test": config.data.test}
    return {name: as_source(source) for name, source in named.items() if source is not None}


def prepare(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Clean, encode and cache all sets, write the reports into `run_dir`; returns the directory of each set."""
    prepared = prepare_sets(config, run_dir)
    write_reports(run_dir, prepared.values())
    return {name: str(one.rows.directory) for name, one in prepared.items()}


def prepare_sets(
    config: RunConfig, report_dir: Path | None = None, *, task: TranslationTask | None = None
) -> dict[str, Prepared]:
    """`train` and the evaluation sets, cleaned and encoded, or found in the cache. `task` saves loading it again."""
    task = task or build_task(config)
    cache_root = Path(config.output_dir) / CACHE_DIRECTORY
    sets = evaluation_sources(config)
    held_out = held_out_sources(sets.values(), config.data)
    common: dict[str, Any] = {
        "encode": task.encode,
        "tokenizer_fingerprint": tokenizer_fingerprint(model_source(config)),
        "cache_root": cache_root,
        "report_dir": report_dir,
    }
    train = prepare_rows("train", config.data.train, config.data, is_training=True, held_out=held_out, **common)
    others = {
        name: prepare_rows(name, [source], config.data, is_training=False, **common) for name, source in sets.items()
    }
    return {"train": train, **others}


def open_sets(directories: dict[str, str]) -> RowSets:
    """Open what `prepare` has left, on any rank."""
    rows = {name: load_rows(Path(directory)) for name, directory in directories.items()}
    return RowSets(rows["train"], rows.get("validation"), rows.get("test"))
