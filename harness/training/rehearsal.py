"""The small run that stands for a real one: the same run file with a narrow model, a few rows and a few steps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.config.launch_rules import seconds_of
from harness.config.launch_schema import SlurmConfig
from harness.config.schema import DataConfig, DataSource, RunConfig
from harness.data.clean import fault_of
from harness.data.sources import Row, as_source, read_rows
from harness.errors import DataError
from harness.io.atomic import read_json, write_text
from harness.launch import scheduler
from harness.launch.preflight import Finding
from harness.launch.rehearsal import TIME_LIMIT, Say, last_words, output_of, shortened, wait_for
from harness.launch.restarts import read_launches
from harness.launch.scheduler import Job
from harness.launch.submission import Submission, submit
from harness.models.shrink import shrink_model
from harness.training.metrics_file import read_metrics
from harness.training.prepare import model_source, with_labels

STEPS = 200
_SAVE_EVERY, _SCORE_EVERY = 50, 100
_NUM_TRAIN_ROWS, _NUM_SCORED_ROWS = 64, 4
_LONGEST_OUTPUT, _ADAPTER_RANK = 32, 8


def small_run(config: RunConfig, directory: Path, *, nodes: int | None) -> RunConfig:
    """A run like `config` within `directory`, for which a model and rows are written there; on `nodes` (None: as many).

    All of `launch`, `slurm` and `deepspeed` that decides where and how ranks are started stays as it is.
    Raises DataError if model or rows cannot be read.
    """
    config = with_labels(config)
    shrink_model(model_source(config), directory / "model", config.task, seed=config.seed)
    data = config.data
    is_translation = config.task == "translation"
    longest = max(data.max_source_length, data.max_target_length) if is_translation else data.max_length
    sources = [
        _few_rows(source, data, directory / f"train-{number}.jsonl", _NUM_TRAIN_ROWS)
        for number, source in enumerate(data.train)
    ]
    scored = {
        name: _few_rows(as_source(source), data, directory / f"{name}.jsonl", _NUM_SCORED_ROWS)
        for name, source in (("validation", data.validation), ("test", data.test))
        if source is not None
    }
    changes: dict[str, Any] = {
        "name": directory.name,
        "output_dir": str(directory),
        "model": {"path": str(directory / "model"), "config": None},
        "data": {"train": sources, **scored},
        "batch": {"tokens_per_step": 4 * longest, "max_tokens_per_device": longest},
        "schedule": {"steps": STEPS, "epochs": None, "warmup_steps": min(config.schedule.warmup_steps, STEPS)},
        "early_stopping": None,
        "checkpoint": {"every_steps": _SAVE_EVERY},
    }
    if config.adapter is not None:
        changes["adapter"] = {"rank": min(config.adapter.rank, _ADAPTER_RANK)}
    if config.evaluation is not None:
        every = _SCORE_EVERY if data.validation is not None else None
        limits = {"max_target_length": _LONGEST_OUTPUT, "max_tokens_per_device": None}
        changes["evaluation"] = {"every_steps": every, **limits}
    if config.slurm is not None:
        changes["slurm"] = _small_jobs(config.slurm, data, directory, nodes)
    return RunConfig.model_validate(_merged(config.model_dump(mode="json"), changes))


def interrupted_run(submission: Submission, say: Say) -> Iterator[Finding]:
    """Submit a small run, send it the signal that comes before a time limit, and follow it to its end."""
    run_dir, asked = submission.run_dir, False

    def interrupt(job: Job) -> None:
        nonlocal asked
        if not asked and job.state == "RUNNING" and _records(run_dir, "step"):
            scheduler.cancel(job.job_id, signal="USR2")
            asked = True
            say("asked to save and stop (USR2)")

    jobs = submit(submission)
    job_id = jobs["training"]
    job = wait_for(job_id, say, interrupt)
    launches = read_launches(run_dir)
    starts = [record for record in launches if record["event"] == "start"]
    reasons = [record.get("reason") for record in launches if record["event"] == "end"]
    if job.state != "COMPLETED":
        change = f"mend what stands there: harness logs {run_dir}, and {output_of(run_dir, job_id)}"
        why = reasons[-1] if reasons else last_words(run_dir, job_id)
        yield Finding(f"the small run ended as {job.state}: {why}", change)
        return
    if len(starts) < 2:
        what = "the small run was not interrupted, or did not come back"
        change = f"see {output_of(run_dir, job_id)}; Slurm must let a job requeue itself (scontrol requeue)"
        yield Finding(what, change)
        return
    yield Finding(f"job {job_id} was asked to stop ({reasons[0]}), requeued, and went on to its end")
    yield _steps_lost(run_dir)
    is_scored = bool(read_json(run_dir / "summary.json")["test"])
    yield Finding(f"exported{' and scored on the test set' if is_scored else ''}")
    if "evaluation" in jobs:
        evaluation = wait_for(jobs["evaluation"], say, lambda job: None)
        if evaluation.state != "COMPLETED":
            change = f"mend what stands in {output_of(run_dir, evaluation.job_id)}"
            yield Finding(f"the evaluation job ended as {evaluation.state}", change)
        else:
            yield Finding("the evaluation job started after it and scored the model")


def _small_jobs(slurm: SlurmConfig, data: DataConfig, directory: Path, nodes: int | None) -> dict[str, Any]:
    """The section `slurm` of a small run; where the evaluation has rows of its own, the first of them."""
    section: dict[str, Any] = shortened(slurm, nodes).model_dump(mode="json")
    if (job := slurm.evaluation) is not None:
        section["evaluation"]["time"] = min(job.time, TIME_LIMIT, key=seconds_of)
        if job.data is not None:
            rows = _few_rows(as_source(job.data), data, directory / "scored.jsonl", _NUM_SCORED_ROWS)
            section["evaluation"]["data"] = rows["path"]
    return section


def _few_rows(source: DataSource, data: DataConfig, path: Path, count: int) -> dict[str, Any]:
    """The first good rows of `source`, written to `path`; gives the source that reads them. Raises DataError if there
    is none."""
    found = (row for row in read_rows(source, data) if isinstance(row, Row))
    rows = (row for row in found if not fault_of(row, data.cleaning, data.format))
    lines = [json.dumps(_fields(row, data), ensure_ascii=False) + "\n" for row in itertools.islice(rows, count)]
    if not lines:
        raise DataError("no row of it can be used", where=source.path or str(source.source))
    write_text(path, "".join(lines))
    return source.model_dump(mode="json") | {"path": str(path), "source": None, "target": None}


def _steps_lost(run_dir: Path) -> Finding:
    stopped = _records(run_dir, "stop")
    resumed = _records(run_dir, "restart")
    if not stopped or not resumed:
        return Finding("the small run has not recorded its stop", f"harness logs {run_dir} tells more")
    before, after = stopped[0]["step"], resumed[0]["step"]
    if after < before:
        change = "see the first start in the job's output: the save did not end before the ranks were killed"
        return Finding(f"{before - after} steps were lost: stopped at step {before}, went on from {after}", change)
    return Finding(f"no step was lost: stopped and went on at step {after}")


def _records(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == event]


def _fields(row: Row, data: DataConfig) -> dict[str, Any]:
    """A row as an object that `data.format` reads as that row again."""
    if data.format == "pairs":
        texts = {data.source_column: row.source, data.target_column: row.target}
        return texts | {"source_language": row.source_language, "target_language": row.target_language}
    if data.format == "prompt":
        return {data.prompt_column: row.source, data.completion_column: row.target}
    if data.format == "messages":
        return {data.messages_column: list(row.messages)}
    fields: dict[str, Any] = {data.text_column: row.source}
    if data.format == "labelled":
        fields[data.label_column] = row.target
        if data.text_pair_column:
            fields[data.text_pair_column] = row.source_pair
    return fields


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `changes` in their place, section by section."""
    merged = dict(values)
    for key, change in changes.items():
        section = merged.get(key)
        merged[key] = section | change if isinstance(section, dict) and isinstance(change, dict) else change
    return merged
