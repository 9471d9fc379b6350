"""The jobs of a rehearsal: how long they may be, how they are waited for, and the one that probes the nodes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.config.launch_rules import ranks_per_node, seconds_of
from harness.config.launch_schema import SlurmConfig
from harness.config.schema import RunConfig
from harness.io.atomic import read_json, write_json
from harness.launch import scheduler
from harness.launch.batch_script import Place, training_script
from harness.launch.preflight import Finding, input_files
from harness.launch.probe import Facts
from harness.launch.probe_job import HOSTS_FILE
from harness.launch.probe_report import judge
from harness.launch.scheduler import Job
from harness.plan.plan import Plan

_POLL_S, _LONGEST_POLL_S = 1.0, 15.0
_LATE_FILES_S = 10.0  # a shared file system may show here late what a node has written
_LAST_LINES = 3

TIME_LIMIT = "00:20:00"
_SIGNAL_BEFORE_S = 120

Say = Callable[[str], None]


def shortened(slurm: SlurmConfig, nodes: int | None) -> SlurmConfig:
    """The job of a rehearsal: one run on `nodes` (None: as many as the real one), no longer than it needs."""
    nodes = nodes or slurm.nodes
    changes: dict[str, Any] = {
        "nodes": nodes,
        "first_node_memory": slurm.first_node_memory if nodes > 1 else None,
        "time": min(slurm.time, TIME_LIMIT, key=seconds_of),
        "signal_before_s": min(slurm.signal_before_s, _SIGNAL_BEFORE_S),
        "sweep": {},
        "max_parallel": None,
    }
    return slurm.model_copy(update=changes)


def probe_nodes(plan: Plan, nodes: int | None, directory: Path, say: Say) -> Iterator[Finding]:
    """Submit the script of the run with a probe in place of the training, wait for it, and judge what it has found.

    `nodes`: how many, None for those of the run. `directory` must not be there yet.
    """
    assert plan.config.slurm is not None
    slurm = shortened(plan.config.slurm, nodes)
    config = plan.config.model_copy(update={"slurm": slurm})
    directory.mkdir(parents=True)
    request = {
        "output_dir": str(Path(config.output_dir).absolute()),
        "node_local_dir": config.launch.node_local_dir,
        "files": [str(path) for path in input_files(config)],
        "interface": config.launch.interface,
        "slurm": slurm.model_dump(mode="json"),
    }
    write_json(directory / "request.json", request)
    command = [sys.executable, "-m", "harness.launch.probe_job", str(directory)]
    place = Place(command=command, run_dir=str(directory), directory=str(Path.cwd()))
    job_id = scheduler.submit(training_script(config, place, "probe"))
    job = wait_for(job_id, say, lambda job: None)
    facts = _facts(directory, slurm.nodes)
    if len(facts) < slurm.nodes:
        yield _silent_nodes(directory, job, facts, config)
    else:
        host_bytes = ranks_per_node(config) * sum((plan.memory or {"host": {}})["host"].values())
        yield from judge(facts, config, host_bytes=host_bytes)


def wait_for(job_id: int, say: Say, look: Callable[[Job], None]) -> Job:
    """Wait for the end of a job, which is cancelled if we are interrupted; `look` is called now and then."""
    told, sleep_s = "", _POLL_S
    try:
        while True:
            job = scheduler.find_jobs(job_id)[0]
            state = job.state + (f" ({job.reason})" if job.reason != "None" and not job.is_over else "")
            if state != told:
                say(f"job {job_id}: {state}{f' on {job.nodes}' if job.nodes else ''}")
                told, sleep_s = state, _POLL_S
            if job.is_over:
                return job
            look(job)
            time.sleep(sleep_s)
            if job.state == "PENDING":
                sleep_s = min(sleep_s * 1.1, _LONGEST_POLL_S)
    except BaseException:
        scheduler.cancel(job_id)
        raise


def _facts(directory: Path, count: int) -> dict[int, Facts]:
    """What nodes have left, by number."""
    deadline = time.monotonic() + _LATE_FILES_S
    while True:
        found = {
            node: json.loads(path.read_text())
            for node in range(count)
            if (path := directory / f"facts-{node}.json").is_file()
        }
        if len(found) == count or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_S)


def _silent_nodes(directory: Path, job: Job, facts: dict[int, Facts], config: RunConfig) -> Finding:
    """Why nodes have left no facts, as far as the job's output tells."""
    slurm = config.slurm
    assert slurm is not None
    output = output_of(directory, job.job_id)
    words = last_words(directory, job.job_id)
    hosts = read_json(directory / HOSTS_FILE) if (directory / HOSTS_FILE).is_file() else None
    if hosts is None and not words:
        what = f"nothing of job {job.job_id}, which ended as {job.state} on {job.nodes}, is to be seen in {directory}"
        return Finding(what, "set output_dir to a directory of a file system that this machine and all nodes share")
    if hosts is None:
        keys = " or ".join(f"slurm.{key}" for key in ("modules", "setup") if getattr(slurm, key)) or "the environment"
        change = f"mend {keys}: the script ends at the first line that fails; all it said is in {output}"
        return Finding(f"the job's script failed on {job.nodes} before the run began: {words}", change)
    silent = ", ".join(host for number, host in enumerate(hosts) if number not in facts)
    if "request.json" in words:
        what = f"{silent} does not see the run directory as the others do"
        return Finding(what, "set output_dir to a directory of a file system that all nodes share")
    change = "make this Python and the checkout visible on every node under the same path."
    if slurm.container:
        change = f"slurm.container must work on every node: is `{slurm.container[0]}` installed, and the image there?"
    return Finding(f"the probe did not run on {silent}: {words}", f"{change} All it said is in {output}")


def output_of(run_dir: Path, job_id: int) -> Path:
    return run_dir / f"slurm-{job_id}.out"


def last_words(run_dir: Path, job_id: int) -> str:
    """The last lines that the job printed."""
    path = output_of(run_dir, job_id)
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return "; ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:])
