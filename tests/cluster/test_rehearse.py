"""`harness rehearse` on a real Slurm: a right run file passes; of a planted mistake the user is told what to change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.cluster.cluster import HEAD, Cluster
from tests.runs import REPOSITORY, harness, tiny_run, with_changes, write_pairs, write_run

pytestmark = pytest.mark.cluster

SLURM = {"nodes": 2, "gpus_per_node": 2, "cpus_per_node": 2, "time": "00:10:00", "signal_before_s": 60}
# The clusters of users have `module`, this one has not: a function that bash takes over from the environment.
MODULE = '() { [ "$2" = cuda/12 ] || { echo "The following modules are unknown: $2" >&2; return 1; }; }'

Plant = Callable[[Cluster, Path], None]


def rehearse(cluster: Cluster, run_file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(REPOSITORY), "BASH_FUNC_module%%": MODULE}
    command = (sys.executable, "-m", "harness", "rehearse", run_file, *options)
    done = cluster.run(HEAD, *command, check=False, timeout_s=280, **variables)
    print(done.stdout, done.stderr)
    return done


@pytest.fixture
def run(tmp_path: Path, tiny_models: dict[str, Path]) -> dict[str, Any]:
    slurm = SLURM | {"modules": ["cuda/12"], "setup": ["export OMP_NUM_THREADS=1"]}
    return tiny_run(tmp_path, tiny_models["mbart"], name="real", launch={"processes": 1}, slurm=slurm)


def test_right_run_file_is_rehearsed_to_its_end(cluster: Cluster, run: dict[str, Any], tmp_path: Path) -> None:
    """The job is probed, interrupted, requeued, exported, scored, and nothing is left of it."""
    pairs = str(write_pairs(tmp_path / "held-out.tsv"))
    run["data"] |= {"validation": pairs, "test": pairs}
    run["evaluation"] = {"every_steps": 10, "beam_size": 2, "metrics": ["chrf"]}
    run["slurm"]["evaluation"] = {"time": "00:10:00"}
    done = rehearse(cluster, write_run(run))
    assert done.returncode == 0
    assert "problem " not in done.stdout
    assert "requeued, and went on to its end" in done.stdout
    assert "no step was lost" in done.stdout
    assert "exported and scored on the test set" in done.stdout
    assert "the evaluation job started after it" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held-out.tsv", "pairs.tsv", "real.yaml"]


def test_where_there_is_no_cluster_one_is_made(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """What this machine cannot have, a partition and modules, is left out, and nothing is left running."""
    slurm = SLURM | {"partition": "gpu", "account": "mine", "modules": ["cuda/12"]}
    run = tiny_run(tmp_path, tiny_models["mbart"], name="real", launch={"processes": 1}, slurm=slurm)
    done = harness("rehearse", str(write_run(run)), "--private", "--probe-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every node reaches every node" in done.stdout
    left = [process for process in psutil.process_iter() if "slurmctld" in process.name()]
    assert not [process for process in left if "harness-cluster-" in process.environ().get("CLUSTER_DIR", "")]


@dataclass(frozen=True)
class Mistake:
    """Keys of the run file (`{tmp}` is the test's directory), what is done to the cluster, and what must be told."""

    told: str
    change: str
    keys: dict[str, Any] = field(default_factory=dict)
    plant: Plant = lambda cluster, tmp_path: None
    heal: Plant = lambda cluster, tmp_path: None


def slow_steps(cluster: Cluster, tmp_path: Path) -> None:
    """The run has trained before, a step in 10 s."""
    steps = [{"event": "step", "step": step, "time_s": 10.0 * step} for step in range(1, 9)]
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def rows_on_some_nodes(cluster: Cluster, tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.tsv")
    for host in (HEAD, "node1"):
        cluster.run(host, "cp", rows, "/tmp/rows.tsv")


def file_in_the_way(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("node2", "touch", "/tmp/scratch")


def blocked(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("node2", "ip", "route", "add", "unreachable", "10.77.0.13/32")


def unblocked(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("node2", "ip", "route", "del", "unreachable", "10.77.0.13/32")


def runs_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    cluster.run("node2", "mount", "-t", "tmpfs", "tmpfs", tmp_path / "runs")


def runs_of_all(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("node2", "umount", tmp_path / "runs")


MISTAKES: dict[str, Mistake] = {
    "partition": Mistake("invalid partition", "slurm.partition", {"slurm__partition": "gpu"}),
    "more GPUs than a node has": Mistake(
        "configuration is not available", "slurm.gpus_per_node", {"slurm__gpus_per_node": 16}
    ),
    "more memory than a node has": Mistake("configuration is not available", "memory", {"slurm__memory": "900G"}),
    "feature": Mistake("nvalid feature", "slurm.constraint", {"slurm__constraint": "h100"}),
    "time limit of the partition": Mistake(
        "time limit is invalid", "slurm.time", {"slurm__partition": "debug", "slurm__time": "01:00:00"}
    ),
    "time limit below one checkpoint": Mistake(
        "no checkpoint within one start", "lower checkpoint.every_steps", {"checkpoint__every_steps": 100}, slow_steps
    ),
    "no room for checkpoints": Mistake("checkpoints of", "keep_last", {"checkpoint__keep_last": 10**9}),
    "missing data": Mistake("missing.tsv is not there", "mend the path", {"data__test": "/missing.tsv"}),
    "output_dir below a file": Mistake("Not a directory", "output_dir", {"output_dir": "/etc/hostname/runs"}),
    "output_dir on one machine only": Mistake("is to be seen in", "nodes share", {"output_dir": "/tmp/private-runs"}),
    "output_dir that a node has for itself": Mistake(
        "node2 does not see the run directory",
        "all nodes share",
        {"output_dir": "{tmp}/runs"},
        runs_of_its_own,
        runs_of_all,
    ),
    "module": Mistake("modules are unknown: cuda/99", "slurm.modules", {"slurm__modules": ["cuda/99"]}),
    "setup": Mistake("/no/venv/bin/activate", "slurm.setup", {"slurm__setup": ["source /no/venv/bin/activate"]}),
    "container": Mistake("apptainer", "slurm.container", {"slurm__container": ["/opt/apptainer", "exec"]}),
    "data on some nodes only": Mistake(
        "/tmp/rows.tsv cannot be read on node2", "every node", {"data__test": "/tmp/rows.tsv"}, rows_on_some_nodes
    ),
    "no node-local directory on a node": Mistake(
        "cannot be used on node2: ", "every node", {"launch__node_local_dir": "/tmp/scratch"}, file_in_the_way
    ),
    "GPUs that the step does not get": Mistake(
        "gives the job 1 GPUs", "slurm.gpus_per_node", {"slurm__srun_options": ["--gpus-per-node=1"]}
    ),
    "interface": Mistake("launch.interface ib0 does not exist", "eth0", {"launch__interface": "ib0"}),
    "open files": Mistake("allows 256 open files", "ulimit -n 1024", {"slurm__setup": ["ulimit -n 256"]}),
    "nodes that do not reach each other": Mistake(
        "node2 cannot reach node3", "open TCP", {"slurm__nodes": 3}, blocked, unblocked
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_told_with_what_to_change(
    name: str, cluster: Cluster, run: dict[str, Any], tmp_path: Path
) -> None:
    mistake = MISTAKES[name]
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(with_changes(run, mistake.keys)).replace("{tmp}", str(tmp_path)))
    mistake.plant(cluster, tmp_path)
    try:
        done = rehearse(cluster, run_file, "--probe-only")
    finally:
        mistake.heal(cluster, tmp_path)
    assert done.returncode == 2
    problems = [part.partition("\nok ")[0] for part in done.stdout.split("problem ")[1:]]
    assert any(mistake.told in problem and mistake.change in problem for problem in problems)
