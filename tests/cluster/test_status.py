"""`harness status` of a run that is a job."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import HEAD, Cluster
from tests.runs import REPOSITORY

pytestmark = pytest.mark.cluster


def test_status_tells_what_slurm_says_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nsleep 1000\n")
    (tmp_path / "plan.json").write_text("{}")

    def job_line(job_id: str) -> str:
        record = {"time": 0.0, "kind": "training", "job_id": int(job_id)}
        (tmp_path / "jobs.jsonl").write_text(json.dumps(record) + "\n")
        command = (sys.executable, "-m", "harness", "status", tmp_path)
        shown = cluster.run(HEAD, *command, PYTHONPATH=str(REPOSITORY)).stdout
        [line] = [line for line in shown.splitlines() if line.startswith("job ")]
        return line.removeprefix("job").strip()

    running = cluster.sbatch(script, "--nodes=2", "--time=90", "--output=/dev/null")
    cluster.wait_job(running, {"RUNNING"})
    assert re.fullmatch(rf"{running} is RUNNING on node\[1-2\], time limit in (89|90) min", job_line(running))
    waiting = cluster.sbatch(script, "--begin=now+1hour", "--time=60")
    assert job_line(waiting) == f"{waiting} is PENDING (BeginTime)"
    assert job_line("999999") == "999999 is over: Slurm no longer knows it"
    cluster.run(HEAD, "scancel", running, waiting)
