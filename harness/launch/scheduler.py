"""What Slurm's commands say of jobs, as typed values; their own sentence when they refuse."""

from __future__ import annotations

import calendar
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.errors import ConfigError, HarnessError

_PATIENCE_S = 30.0
_FINAL_STATES = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "REVOKED",
)  # fmt: skip
_UNIFORM = {"LC_ALL": "C", "TZ": "UTC", "SLURM_TIME_FORMAT": "standard"}
_CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # all others of that name describe a job


class SlurmError(HarnessError):
    """Slurm did not answer, or not with yes."""


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array. `state` is PENDING, RUNNING, ..., `reason` Slurm's for it.

    Times are seconds since the epoch, None while Slurm does not know them; `restarts` counts requeues.
    """

    job_id: int
    state: str
    reason: str
    restarts: int
    is_batch: bool
    may_requeue: bool
    start_time: float | None
    end_time: float | None
    preempt_time: float | None
    nodes: str
    array_task: str | None

    @property
    def is_over(self) -> bool:
        return self.state in _FINAL_STATES


def submit(script: str, *, options: Sequence[str] = ()) -> int:
    """Submit a script; gives the number of its job. ConfigError with Slurm's reason if it refuses."""
    answer = _sbatch(["--parsable", *options], script)
    match = re.match(r"(\d+)(;|$)", answer.stdout.strip())
    if match is None:
        raise SlurmError(f"sbatch answered {answer.stdout.strip()!r}, which is not a job", where="sbatch")
    return int(match[1])


def test_only(script: str) -> str:
    """When and where Slurm would start a script, in its own words. ConfigError with its reason if it would not."""
    return _sbatch(["--test-only"], script).stderr.strip().removeprefix("sbatch: ")


def find_jobs(job_id: int | str) -> list[Job]:
    """The job, or every task of an array; nothing if Slurm knows it no more. SlurmError if it does not answer."""
    answer = _run(["scontrol", "--oneliner", "show", "job", str(job_id)])
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return []
        raise SlurmError(_sentence(answer), where="scontrol show job")
    return [parse_job(line) for line in answer.stdout.splitlines() if line.startswith("JobId=")]


def requeue(job_id: int) -> None:
    """Put a running job back into the queue, which ends it. SlurmError if Slurm does not want to."""
    answer = _run(["scontrol", "requeue", str(job_id)])
    if answer.returncode:
        raise SlurmError(_sentence(answer), where="scontrol requeue")


def cancel(job_id: int, *, signal: str | None = None) -> None:
    """End a job, or send `signal` to its batch script only. SlurmError if Slurm does not want to."""
    options = [] if signal is None else ["--batch", f"--signal={signal}"]
    answer = _run(["scancel", *options, str(job_id)])
    if answer.returncode:
        raise SlurmError(_sentence(answer), where="scancel")


def hostnames(node_list: str) -> list[str]:
    """`gpu[03-04],cpu1` -> gpu03, gpu04, cpu1."""
    answer = _run(["scontrol", "show", "hostnames", node_list])
    if answer.returncode:
        raise SlurmError(_sentence(answer), where="scontrol show hostnames")
    return answer.stdout.split()


def parse_job(line: str) -> Job:
    """A line of `scontrol --oneliner show job` with times in UTC."""
    # A value may hold blanks and even `=`: a field begins at a blank before a name that Slurm could have written.
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(?:^|(?<=\s))([A-Z][A-Za-z:/]*)=(.*?)(?=\s+[A-Z][A-Za-z:/]*=|\s*$)", line):
        fields.setdefault(name, value)
    return Job(
        job_id=int(fields["JobId"]),
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", "0")),
        is_batch=fields.get("BatchFlag", "0") != "0",
        may_requeue=fields.get("Requeue") == "1",
        start_time=parse_time(fields.get("StartTime", "")),
        end_time=parse_time(fields.get("EndTime", "")),
        preempt_time=parse_time(fields.get("PreemptTime", "")),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        array_task=fields.get("ArrayTaskId"),
    )


def parse_time(text: str) -> float | None:
    """`2026-11-22T12:00:00` in UTC as seconds since the epoch; None for Unknown, N/A, None and whatever else."""
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return None


def submitting_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Our variables less those of a job that we may be running in: sbatch would hand them down to the new one."""
    return {
        name: value for name, value in environ.items() if not name.startswith("SLURM_") or name in _CLIENT_VARIABLES
    }


def _sbatch(options: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    answer = _run(["sbatch", *options], stdin=script, environment=submitting_environment())
    if answer.returncode:
        raise ConfigError(_sentence(answer), where="sbatch", hint="mend this in the `slurm` section of the run file")
    return answer


def _run(
    command: Sequence[str], *, stdin: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=os.environ | _UNIFORM if environment is None else environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            check=False,
        )
    except FileNotFoundError as error:
        what = f"{command[0]} is not on this machine"
        raise ConfigError(what, hint="use a login node of the cluster, or a job of it") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"no answer within {_PATIENCE_S:.0f} s", where=" ".join(command[:3])) from error


def _sentence(answer: subprocess.CompletedProcess[str]) -> str:
    """What Slurm wrote, without the name of its command."""
    lines = [re.sub(r"^(\w+: )?(error: )?", "", line).strip() for line in answer.stderr.splitlines()]
    return "; ".join(line for line in lines if line) or f"exit code {answer.returncode} and no reason"
