"""The cluster of the tests itself: Slurm and ssh work, faults are real, and nothing outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import HEAD, SCRIPT, Cluster, wait_until
from tests.runs import REPOSITORY

pytestmark = pytest.mark.cluster

HOLD = """
import sys
from pathlib import Path
from tests.cluster.cluster import Cluster
directory = Path(sys.argv[1])
cluster = Cluster(directory / "cluster", directory, 2)
cluster.start("node1", "sleep", "1000")
cluster.power_off("node2")
cluster.power_on("node2")
cluster.start("node2", "setsid", "sleep", "1000")
print("ready", flush=True)
sys.stdin.read()
cluster.close()
"""


def test_slurm_and_ssh_reach_every_node(cluster: Cluster) -> None:
    assert sorted(cluster.run(HEAD, "srun", "-N3", "hostname").stdout.split()) == cluster.hosts
    assert cluster.run("node1", "ssh", "node3", "hostname").stdout.strip() == "node3"
    assert cluster.run(HEAD, "pdsh", "-R", "ssh", "-N", "-w", "node[1-3]", "ls", cluster.shared / "cluster/holder")


def test_job_gets_its_devices(cluster: Cluster) -> None:
    shown = cluster.run(HEAD, "srun", "-N2", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES").stdout
    assert shown.split() == ["0,1", "0,1"]


def test_requeued_job_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\n[ "${SLURM_RESTART_COUNT:-0}" = 1 ] || sleep 1000\n')
    job_id = cluster.sbatch(script, "--nodes=2", "--time=5")
    cluster.wait_job(job_id, {"RUNNING"})
    cluster.run(HEAD, "scontrol", "requeue", job_id)
    job = cluster.wait_job(job_id, {"COMPLETED"})
    assert (job["Restarts"], job["ExitCode"], job["NumNodes"]) == ("1", "0:0", "2")


def test_hosts_can_be_cut_off_and_come_back(cluster: Cluster) -> None:
    def is_there(host: str) -> bool:
        command = ("ssh", "-o", "ConnectTimeout=1", host, "true")
        return cluster.run("node1", *command, check=False).returncode == 0

    cluster.cut_link("node2")
    assert not is_there("node2")
    cluster.restore_link("node2")
    cluster.start("node3", "sleep", "1000")
    cluster.power_off("node3")
    assert is_there("node2")
    assert not is_there("node3")
    cluster.power_on("node3")
    assert is_there("node3")
    assert not cluster.processes("node3")


def test_signals_reach_the_command_and_its_end_is_told(cluster: Cluster) -> None:
    process = cluster.start("node1", "sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(10) == 7
    process = cluster.start("node1", "sleep", "1000")
    assert wait_until(lambda: [one.arguments for one in cluster.processes("node1")] == ["sleep 1000"], 10)
    cluster.kill("node1", cluster.processes("node1")[0].pid)
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("end", ["close", "SIGKILL", "SIGKILL of the holder"])
def test_nothing_outlives_its_owner(end: str, cluster: Cluster, tmp_path: Path) -> None:
    """Orderly or not, no process, link, mount or file of a cluster is left; if its holder dies, files until `down`."""
    links, directory = subprocess.check_output(["ip", "-o", "link"]), tmp_path / "cluster"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    spaces = process_spaces(directory)
    assert len(spaces) == 3
    if end == "SIGKILL":
        owner.kill()
    if end == "SIGKILL of the holder":
        os.kill(int((directory / "holder").read_text()), signal.SIGKILL)
        assert wait_until(lambda: not process_spaces(directory), 10)
        subprocess.run([SCRIPT, "down"], env=os.environ | {"CLUSTER_DIR": str(directory)}, check=True)
    owner.communicate(timeout=30)
    assert wait_until(lambda: not directory.exists(), 20)
    assert subprocess.check_output(["ip", "-o", "link"]) == links
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert not [process for process in psutil.process_iter() if process_space(process) in spaces]
    assert not process_spaces(directory)


def process_spaces(directory: Path) -> set[str]:
    """The process namespaces, other than ours, of the processes that belong to the cluster in `directory`."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("CLUSTER_DIR") == str(directory):
                found.add(process_space(process))
    return found - {process_space(psutil.Process()), ""}


def process_space(process: psutil.Process) -> str:
    try:
        return str(Path(f"/proc/{process.pid}/ns/pid").readlink())
    except OSError:
        return ""
