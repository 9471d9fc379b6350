"""A trained model outside of its run: opened from a model or run directory, scored on a file, made to translate.

python -m harness.training.offline SCRATCH     one of several ranks that `score` has started
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from harness.config.evaluation_schema import EvaluationConfig, forget_search_of_preset
from harness.config.load import with_overrides
from harness.config.schema import DataSource, RunConfig
from harness.data.cache import load_rows, prepare_rows
from harness.data.encoded import EncodedRows
from harness.data.sources import as_source
from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.errors import ConfigError, DataError, ExitCode, HarnessError
from harness.evaluation.evaluate import evaluate
from harness.evaluation.settings import beam_settings
from harness.evaluation.translate import Translator
from harness.io import heartbeat
from harness.io.atomic import read_json, write_json
from harness.launch.environment import RankEnvironment, local_ranks, read_rank_environment
from harness.launch.supervisor import supervise
from harness.models.assemble import load_base, load_with_adapter
from harness.models.ensemble import Ensemble
from harness.models.heads import stored_labels
from harness.models.load import as_dtype, is_decoder, model_directory
from harness.models.precision import in_precision
from harness.models.screen import base_of_adapter, is_adapter, screen_model_directory, types_of_base
from harness.plan.parameters import position_limit
from harness.plan.plan import Plan
from harness.reports.changes import read_baseline
from harness.tasks.task import DecodingTask
from harness.tasks.translation import TranslationTask
from harness.training.prepare import build_task, encoding, evaluation_sources, with_prepared_labels
from harness.training.rank import record_and_exit

DEFAULT_MAX_TOKENS = 4096
DEFAULT_MAX_LENGTH = 256
DEFAULT_PROMPT_LENGTH = 1024  # of a language model, examples included
OPTIONS = {  # key of the run file -> option of the commands
    "data.source_language": "--source-language",
    "data.target_language": "--target-language",
    "evaluation.max_target_length": "--max-length",
}
Sections = Mapping[str, Mapping[str, Any]]


class Member(NamedTuple):
    """A further model of an ensemble."""

    config: RunConfig
    adapter: str | None


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


@dataclass(frozen=True)
class Job:
    """A set to be scored, as the ranks are told."""

    config: RunConfig
    adapter: str | None
    others: tuple[Member, ...]
    rows: str
    directory: str
    num_rows: int | None
    baseline: str | None

    def to_json(self) -> dict[str, Any]:
        others = [(config.model_dump(mode="json"), adapter) for config, adapter in self.others]
        return {**vars(self), "config": self.config.model_dump(mode="json"), "others": others}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Job:
        others = tuple(Member(RunConfig.model_validate(config), adapter) for config, adapter in content["others"])
        return cls(**{**content, "config": RunConfig.model_validate(content["config"]), "others": others})


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
            return Subject(run_dir.name, with_changes(_default_config(model_or_run, row_format), changes))
        config = with_changes(_default_config(base_of_adapter(run_dir), row_format), {"model": types_of_base(run_dir)})
        return Subject(run_dir.name, with_changes(config, changes), str(run_dir.absolute()))
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
    """`config` with {section: {key: value}} put over it; a preset brings its own beams and length penalty."""
    content = config.model_dump(mode="json")
    content["evaluation"] = content["evaluation"] or EvaluationConfig().model_dump(mode="json")
    if "preset" in changes.get("evaluation", {}):
        forget_search_of_preset(content["evaluation"])
    for section, values in changes.items():
        content[section] |= values
    return RunConfig.model_validate(content)


def named_set(subject: Subject) -> tuple[str, DataSource, int | None]:
    """(name, file, number of rows scored) of the run's test set, else of its validation set."""
    sources = evaluation_sources(subject.config) if subject.run_dir else {}
    for name in ("test", "validation"):
        if name in sources:
            assert subject.config.evaluation is not None
            return name, sources[name], subject.config.evaluation.max_rows if name == "validation" else None
    what = "the run has neither a test nor a validation set" if subject.run_dir else "there is nothing to score"
    raise ConfigError(what, where=subject.name, hint="name a file: --data FILE")


def score(
    subject: Subject,
    name: str,
    source: DataSource | str,
    directory: Path,
    *,
    num_rows: int | None,
    processes: int,
    baseline: Path | None = None,
) -> ExitCode:
    """Decode and score a set on `processes` ranks of this machine, and write the evaluation to `directory`.

    `baseline` is the directory of an evaluation of the same rows, which the page compares with.
    """
    config = subject.config
    with tempfile.TemporaryDirectory(prefix="harness-evaluate-") as scratch, languages_named_as_options():
        rows = number_rows(config, name, source, Path(scratch))
        job = Job(
            config, subject.adapter, subject.others, str(rows.directory), str(directory.absolute()), num_rows,
            None if baseline is None else str(baseline.absolute()),
        )  # fmt: skip
        if processes == 1:
            score_on_rank(job, Processes(0, 0, 1, find_device(0), dist.HashStore()))
            return ExitCode.DONE
        write_json(Path(scratch) / "job.json", job.to_json())
        command = [sys.executable, "-m", "harness.training.offline", scratch]
        return supervise(command, local_ranks(processes), run_dir=Path(scratch), launch=config.launch).report()


def number_rows(config: RunConfig, name: str, source: DataSource | str, scratch: Path) -> EncodedRows:
    """The rows of a set as numbers, in files below `scratch`."""
    return prepare_rows(
        name, [as_source(source)], config.data,
        **encoding(config, build_task(config), is_training=False), cache_root=scratch / "rows",
    ).rows  # fmt: skip


def score_on_rank(job: Job, processes: Processes) -> None:
    """This rank's share of a job; rank 0 writes the evaluation."""
    task, rows = build_task(job.config), load_rows(Path(job.rows))
    baseline = read_baseline(Path(job.baseline), rows.texts("target")[: job.num_rows]) if job.baseline else None
    model = load_together(Member(job.config, job.adapter), job.others, processes.device)
    result = evaluate(model, rows, task, processes, config=job.config, num_rows=job.num_rows)
    if processes.is_first:
        result.write(Path(job.directory), baseline)


def load_for_inference(config: RunConfig, adapter: str | None, device: torch.device) -> Any:
    """The model, perhaps with an adapter, in `model.dtype`: the type in which a run evaluates."""
    model = load_base(config) if adapter is None else load_with_adapter(config, Path(adapter))
    return as_dtype(model, getattr(torch, config.model.dtype)).to(device).eval()


def load_together(first: Member, others: Sequence[Member], device: torch.device) -> Any:
    """The first model, or all as one ensemble."""
    models = [load_for_inference(*member, device) for member in (first, *others)]
    return Ensemble(models) if others else models[0]


def open_translator(subject: Subject) -> Translator:
    """Everything to translate lines with the languages of `config.data`. Raises DataError for a missing language."""
    config, device = subject.config, find_device(0)
    options = config.evaluation
    assert options is not None
    with languages_named_as_options():
        task = build_task(config)
        if not isinstance(task, DecodingTask):
            raise ConfigError(f"the run's task is {config.task}: it has nothing to translate", where=config.name)
        if isinstance(task, TranslationTask) and task.family.has_languages:
            task.family.language_id(task.tokenizer, config.data.source_language, "source")
            task.family.language_id(task.tokenizer, config.data.target_language, "target")
    max_tokens = options.max_tokens_per_device or config.batch.max_tokens_per_device
    model = load_together(Member(config, subject.adapter), subject.others, device)
    model = in_precision(model, options.precision)
    return Translator(model, task, beam_settings(config, task), max_tokens, device)


@contextmanager
def languages_named_as_options() -> Iterator[None]:
    """An error that names a key of the run file names the command's option instead."""
    try:
        yield
    except HarnessError as error:
        if error.where in OPTIONS:
            hint = error.hint.replace(f"{error.where}=", f"{OPTIONS[error.where]} ")
            raise type(error)(error.what, where=OPTIONS[error.where], hint=hint) from error
        raise


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


def main(scratch: Path, environment: RankEnvironment) -> None:
    heartbeat.start()
    job = Job.from_json(read_json(scratch / "job.json"))
    rank, local_rank, world_size = environment.rank, environment.local_rank, environment.world_size
    store = find_store(rank=rank, world_size=world_size, store_path=environment.store_path)
    processes = Processes(rank, local_rank, world_size, find_device(local_rank), store)
    join(processes, timeout_s=job.config.launch.collective_timeout_s)
    heartbeat.beat("load")
    score_on_rank(job, processes)
    leave()
    heartbeat.stop()


if __name__ == "__main__":
    place = read_rank_environment()
    try:
        main(Path(sys.argv[1]), place)
    except BaseException as error:
        record_and_exit(error, Path(sys.argv[1]), place.rank)
