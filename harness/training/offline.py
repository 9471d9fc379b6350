"""A trained model outside of its run: scored on a file, made to translate.

python -m harness.training.offline SCRATCH     one of several ranks that `score` has started
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.config.schema import DataSource, RunConfig
from harness.data.cache import load_rows, prepare_rows
from harness.data.encoded import EncodedRows
from harness.data.rows import Row
from harness.data.sources import as_source
from harness.engine.processes import Processes, find_device, find_store, join, leave
from harness.errors import ConfigError, ExitCode, HarnessError
from harness.evaluation.evaluate import evaluate
from harness.evaluation.partial import Partial
from harness.evaluation.result import EvaluationInterrupted
from harness.evaluation.settings import beam_settings
from harness.evaluation.translate import Translator
from harness.io import heartbeat
from harness.io.atomic import read_json, write_json
from harness.launch.environment import RankEnvironment, local_ranks, read_rank_environment
from harness.launch.supervisor import supervise
from harness.models.assemble import load_base, load_with_adapter
from harness.models.ensemble import Ensemble
from harness.models.load import as_dtype
from harness.models.precision import in_precision
from harness.reports.changes import read_baseline
from harness.reports.report import refuse_other_files
from harness.tasks.task import DecodingTask
from harness.tasks.translation import TranslationTask
from harness.training.prepare import build_task, encoding
from harness.training.rank import record_and_exit
from harness.training.stop import StopRequest
from harness.training.subject import Member, Subject

OPTIONS = {  # key of the run file -> option of the commands
    "data.source_language": "--source-language",
    "data.target_language": "--target-language",
    "evaluation.max_target_length": "--max-length",
}


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
    fingerprint: str  # of the models

    def to_json(self) -> dict[str, Any]:
        others = [(config.model_dump(mode="json"), adapter) for config, adapter in self.others]
        return {**vars(self), "config": self.config.model_dump(mode="json"), "others": others}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Job:
        others = tuple(Member(RunConfig.model_validate(config), adapter) for config, adapter in content["others"])
        return cls(**{**content, "config": RunConfig.model_validate(content["config"]), "others": others})


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

    `baseline` is the directory of an evaluation of the same rows, which the page compares with. On a request to stop
    raises Interrupted; the rows decoded by then are kept beside `directory`, for the next call.
    """
    refuse_other_files(directory)
    config = subject.config
    with tempfile.TemporaryDirectory(prefix="harness-evaluate-") as scratch, languages_named_as_options():
        stop = StopRequest(Path(scratch))
        with stop.listening():
            with stop.at_once():
                rows = number_rows(config, name, source, Path(scratch))
                members = (Member(config, subject.adapter), *subject.others)
                job = Job(
                    config, subject.adapter, subject.others, str(rows.directory), str(directory.absolute()), num_rows,
                    None if baseline is None else str(baseline.absolute()),
                    " ".join(member.fingerprint for member in members),
                )  # fmt: skip
            if processes == 1:
                score_on_rank(job, Processes(0, 0, 1, find_device(0), dist.HashStore()), stop)
                return ExitCode.DONE
        write_json(Path(scratch) / "job.json", job.to_json())
        command = [sys.executable, "-m", "harness.training.offline", scratch]
        outcome = supervise(command, local_ranks(processes), run_dir=Path(scratch), launch=config.launch)
        if outcome.exit_code is ExitCode.INTERRUPTED:
            raise EvaluationInterrupted
        return outcome.report()


def number_rows(config: RunConfig, name: str, source: DataSource | str, scratch: Path) -> EncodedRows:
    """The rows of a set as numbers, in files below `scratch`."""
    return prepare_rows(
        name, [as_source(source)], config.data,
        **encoding(config, build_task(config), is_training=False), cache_root=scratch / "rows",
    ).rows  # fmt: skip


def score_on_rank(job: Job, processes: Processes, stop: StopRequest) -> None:
    """This rank's share of a job; rank 0 writes the evaluation. Of several ranks none may leave before all agree."""
    task, rows = build_task(job.config), load_rows(Path(job.rows))
    baseline = read_baseline(Path(job.baseline), rows.texts("target")[: job.num_rows]) if job.baseline else None
    with stop.at_once() if processes.world_size == 1 else nullcontext():
        model = load_together(Member(job.config, job.adapter), job.others, processes.device)
    directory = Path(job.directory)
    partial = Partial(directory.with_name(f".{directory.name}.partial"), job.fingerprint, processes)
    result = evaluate(
        model, rows, task, processes,
        config=job.config, num_rows=job.num_rows, stop_wanted=stop.wanted, partial=partial,
    )  # fmt: skip
    if processes.is_first:
        result.write(directory, baseline)
        partial.remove()


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
        else:  # whether the prompt of a language model can be written
            task.encode_sources([Row("", "", "", config.data.source_language, config.data.target_language)])
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


def main(scratch: Path, environment: RankEnvironment) -> None:
    heartbeat.start()
    stop = StopRequest(scratch)
    stop.listen()
    job = Job.from_json(read_json(scratch / "job.json"))
    rank, local_rank, world_size = environment.rank, environment.local_rank, environment.world_size
    store = find_store(rank=rank, world_size=world_size, store_path=environment.store_path)
    processes = Processes(rank, local_rank, world_size, find_device(local_rank), store)
    join(processes, timeout_s=job.config.launch.collective_timeout_s)
    heartbeat.beat("load")
    score_on_rank(job, processes, stop)
    leave()
    heartbeat.stop()


if __name__ == "__main__":
    place = read_rank_environment()
    try:
        main(Path(sys.argv[1]), place)
    except BaseException as error:
        record_and_exit(error, Path(sys.argv[1]), place.rank)
