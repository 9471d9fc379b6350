"""`harness submit`: a run file, or each combination of its sweep, checked as if it started now, as jobs of Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.launch_rules import ranks_per_node
from harness.config.load import load_run_config
from harness.config.schema import RunConfig
from harness.errors import ConfigError
from harness.io.atomic import write_text
from harness.launch import scheduler
from harness.launch.batch_script import Place, evaluation_script, sweep_overrides, training_script
from harness.launch.run_directory import completed, owner, refuse_changes
from harness.plan.plan import Plan, make_plan

JOBS_FILE = "jobs.jsonl"


@dataclass(frozen=True)
class Submission:
    """What would be submitted. `plans`: of the runs that are not complete; `tasks`: their numbers in the sweep;
    `results`: what the others came to."""

    config: RunConfig
    run_dir: Path  # of a sweep: that of the runs without their index
    plans: list[Plan]
    tasks: list[int]
    results: list[str]
    training: str
    evaluation: str | None


def prepare(run_file: Path, overrides: Sequence[str]) -> Submission:
    """Check the run file and everything the jobs will do at their start. Raises ConfigError."""
    config = _load(run_file, overrides)
    if config.slurm is None:
        hint = "say what the job needs, as in `slurm: {nodes: 2, gpus_per_node: 8, time: 24:00:00}`"
        raise ConfigError("the run file has no section `slurm`", where=str(run_file), hint=hint)
    sweep = sweep_overrides(config)
    world_size = config.slurm.nodes * ranks_per_node(config)
    configs = [_load(run_file, [*overrides, *more]) for more in sweep] or [config]
    plans = [make_plan(one, world_size=world_size) for one in configs]
    results = [completed(plan) for plan in plans]
    open_tasks = [index for index, result in enumerate(results) if result is None]
    for index in open_tasks:
        _check_startable(plans[index])
    run_dir = (Path(config.output_dir) / config.name).absolute()
    place = Place(command=[sys.executable, "-m", "harness"], run_dir=str(run_dir), directory=str(Path.cwd()))
    training = training_script(config, place, str(run_file), overrides, open_tasks)
    _check_syntax(training)
    return Submission(
        config=config,
        run_dir=run_dir,
        plans=[plans[index] for index in open_tasks],
        tasks=open_tasks,
        results=[result for result in results if result is not None],
        training=training,
        evaluation=None if config.slurm.evaluation is None else evaluation_script(config, place, open_tasks),
    )


def evaluation_dependency(submission: Submission, job: int | str) -> str:
    """The option that starts the evaluation after the training job; in an array each task after its own."""
    assert submission.config.slurm is not None
    kind = "aftercorr" if submission.config.slurm.sweep else "afterok"
    return f"--dependency={kind}:{job}"


def submit(submission: Submission) -> dict[str, int]:
    """Submit the jobs and note them in the run directory; gives their numbers by `training`, `evaluation`.

    Raises ConfigError when an earlier job of the run has not ended, or Slurm refuses.
    """
    _refuse_second_job(submission.run_dir)
    try:
        for directory in [submission.run_dir, *(Path(plan.run_dir) for plan in submission.plans)]:
            directory.mkdir(parents=True, exist_ok=True)
        write_text(submission.run_dir / "job.sbatch", submission.training)
        if submission.evaluation is not None:
            write_text(submission.run_dir / "evaluation.sbatch", submission.evaluation)
    except OSError as error:
        what = f"cannot write the run directory: {error.strerror}"
        raise ConfigError(what, where=str(submission.run_dir), hint="set another `output_dir`") from error
    jobs = {"training": scheduler.submit(submission.training)}
    _note_job(submission, "training", jobs["training"])
    if submission.evaluation is not None:
        dependency = evaluation_dependency(submission, jobs["training"])
        jobs["evaluation"] = scheduler.submit(submission.evaluation, options=[dependency])
        _note_job(submission, "evaluation", jobs["evaluation"])
    return jobs


def submitted_jobs(run_dir: Path) -> list[dict[str, Any]]:
    """The records of jobs.jsonl, oldest first: time (s since the epoch), kind, job_id (of an array's task `12_0`)."""
    path = run_dir / JOBS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def _load(run_file: Path, overrides: Sequence[str]) -> RunConfig:
    """The run file as it will be read in the job: what this machine trains on does not count."""
    overrides = [*overrides, "launch.backend=slurm"]
    config = load_run_config(run_file, overrides, accelerator="cuda")
    if config.slurm is not None and config.slurm.gpus_per_node is None:
        return load_run_config(run_file, overrides, accelerator="cpu")
    return config


def _check_startable(plan: Plan) -> None:
    refuse_changes(plan)
    if (working := owner(Path(plan.run_dir))) is not None:
        hint = "wait for it, end it with `harness stop`, or give this run another name"
        raise ConfigError(f"{working} works in this run directory", where=plan.run_dir, hint=hint)


def _check_syntax(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if checked.returncode:
        why = checked.stderr.strip().splitlines()[-1]
        raise ConfigError(f"is not complete shell code: {why}", where="slurm.setup")


def _refuse_second_job(run_dir: Path) -> None:
    for record in submitted_jobs(run_dir):
        for job in scheduler.find_jobs(record["job_id"]):
            if not job.is_over:
                why = "" if job.reason == "None" else f" ({job.reason})"
                what = f"job {record['job_id']}, the {record['kind']} of this run, is {job.state}{why}"
                raise ConfigError(what, where=str(run_dir), hint=f"wait for it, or end it: scancel {record['job_id']}")


def _note_job(submission: Submission, kind: str, job_id: int) -> None:
    """In the run directory; in that of each run of a sweep its task."""
    _append_record(submission.run_dir, kind, job_id)
    for index, plan in zip(submission.tasks, submission.plans, strict=True):
        if plan.run_dir != str(submission.run_dir):
            _append_record(Path(plan.run_dir), kind, f"{job_id}_{index}")


def _append_record(run_dir: Path, kind: str, job_id: int | str) -> None:
    with (run_dir / JOBS_FILE).open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps({'time': time.time(), 'kind': kind, 'job_id': job_id})}\n")
