"""What `scontrol` prints, as Slurm 22.05 printed it on the test cluster, and what is handed to sbatch."""

from __future__ import annotations

import pytest

from harness.cluster import scheduler
from harness.cluster.scheduler import parse_job, parse_time, submitting_environment
from harness.errors import ConfigError

RUNNING = (
    "JobId=4 JobName=a name with State=x UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901756 Nice=0 "
    "Account=(null) QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "Reboot=0 ExitCode=0:0 RunTime=00:00:07 TimeLimit=00:05:00 TimeMin=N/A SubmitTime=2026-11-22T11:19:19 "
    "EligibleTime=2026-11-22T11:19:19 AccrueTime=2026-11-22T11:19:19 StartTime=2026-11-22T11:19:22 "
    "EndTime=2026-11-22T11:24:22 Deadline=N/A PreemptEligibleTime=2026-11-22T11:19:22 PreemptTime=2026-11-22T11:19:30 "
    "SuspendTime=None SecsPreSuspend=0 Scheduler=Main Partition=low AllocNode:Sid=head:0 ReqNodeList=(null) "
    "NodeList=node[1-3] BatchHost=node1 NumNodes=3 NumCPUs=3 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
    "TRES=cpu=3,mem=300M,node=3,billing=3 Socks/Node=* NtasksPerN:B:S:C=1:0:*:* Command=/data/my job.sh A=b "
    "WorkDir=/work StdOut=/data/low-4.out Power= "
)
PENDING = (
    "JobId=8 ArrayJobId=7 ArrayTaskId=1-3%2 ArrayTaskThrottle=2 JobName=x JobState=PENDING Reason=Dependency Requeue=0 "
    "Restarts=0 BatchFlag=1 StartTime=Unknown EndTime=Unknown PreemptTime=None NodeList=(null) Power= "
)


def test_running_job() -> None:
    job = parse_job(RUNNING)
    assert (job.job_id, job.state, job.reason, job.restarts) == (4, "RUNNING", "None", 2)
    assert (job.is_batch, job.may_requeue, job.is_over, job.nodes) == (True, True, False, "node[1-3]")
    assert job.start_time == 1795346362.0
    assert job.end_time == job.start_time + 300
    assert job.preempt_time == job.start_time + 8
    assert job.array_task is None


def test_pending_array() -> None:
    job = parse_job(PENDING)
    assert (job.job_id, job.state, job.reason, job.array_task) == (8, "PENDING", "Dependency", "1-3%2")
    assert (job.start_time, job.end_time, job.preempt_time, job.may_requeue, job.nodes) == (None, None, None, False, "")


@pytest.mark.parametrize("text", ["Unknown", "N/A", "None", "", "NONE", "2026-11-22", "12:00", "2026-13-01T00:00:00"])
def test_what_is_no_time(text: str) -> None:
    assert parse_time(text) is None


def test_a_new_job_inherits_nothing_of_the_one_it_is_submitted_in() -> None:
    environ = {
        "SLURM_JOB_ID": "3",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_CONF": "/etc/x",
        "SBATCH_ACCOUNT": "a",
        "PATH": "p",
    }
    assert submitting_environment(environ) == {"SLURM_CONF": "/etc/x", "SBATCH_ACCOUNT": "a", "PATH": "p"}


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not on this machine"):
        scheduler.submit("#!/bin/sh\n")
