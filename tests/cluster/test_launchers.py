"""One run on several hosts, started by each launcher over real ssh and Slurm: it learns as on one machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.cluster import HEAD, Cluster, HostCommand, wait_until
from tests.cluster.faults import NUM_STEPS, SAVE_EVERY, End, end_of, num_lost_steps, slow_run, wait_for_step
from tests.runs import REPOSITORY, harness, steps_of, tiny_run, write_run

pytestmark = pytest.mark.cluster

PROGRAMS = Path(sys.executable).parent
TRAIN = (REPOSITORY / "launch" / "train.py", "run.yaml")
TIMEOUT_S = 200.0


def new_run(directory: Path, model: Path) -> dict:
    run = tiny_run(
        directory, model, name="run",
        schedule={"name": "constant", "steps": 4}, deepspeed__preset="zero2", launch__processes=2,
    )  # fmt: skip
    write_run(run)
    return run


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, Path]) -> list[float]:
    """Of the run on this machine."""
    run = new_run(tmp_path_factory.mktemp("local"), tiny_models["mbart"])
    finished = harness("train", str(Path(run["output_dir"]) / "run.yaml"))
    assert finished.returncode == 0, finished.stderr
    return [step["loss"] for step in steps_of(run)]


@pytest.fixture
def run(tmp_path: Path, tiny_models: dict[str, Path]) -> dict:
    return new_run(tmp_path, tiny_models["mbart"])


def check(run: dict, losses: list[float]) -> None:
    assert [step["loss"] for step in steps_of(run)] == pytest.approx(losses, rel=1e-5)
    assert (Path(run["output_dir"]) / "run/export/model.safetensors").exists()


def test_deepspeed_hostfile(cluster: Cluster, run: dict, losses: list[float], tmp_path: Path) -> None:
    """From a machine that has no rank; hosts with one and two ranks."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=2\n")
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    cluster.run(HEAD, REPOSITORY / "launch/multinode.sh", hostfile, "run.yaml", cwd=tmp_path, timeout_s=TIMEOUT_S)
    check(run, losses)


def test_torchrun_with_rendezvous(cluster: Cluster, run: dict, losses: list[float], tmp_path: Path) -> None:
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "node1:29511", "--rdzv-id", "test")
    command = (PROGRAMS / "torchrun", "--nnodes", "3", "--nproc-per-node", "1", *meeting, *TRAIN)
    agents = [cluster.start(host, *command, cwd=tmp_path) for host in cluster.hosts]
    outputs = [agent.communicate(timeout=TIMEOUT_S) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0, 0], outputs
    check(run, losses)


def test_mpirun(cluster: Cluster, run: dict, losses: list[float], tmp_path: Path) -> None:
    place = ("-n", "3", "--host", "node1,node2,node3", "-x", "MASTER_ADDR=node1", "--allow-run-as-root")
    carried = ("-x", "DS_ACCELERATOR", "-x", "OMP_NUM_THREADS")
    cluster.run(HEAD, "mpirun", *place, *carried, sys.executable, *TRAIN, cwd=tmp_path, timeout_s=TIMEOUT_S)
    check(run, losses)


def test_srun_with_a_task_per_device(cluster: Cluster, run: dict, losses: list[float], tmp_path: Path) -> None:
    shape = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--kill-on-bad-exit=1", "--mem=2000")
    cluster.run(HEAD, "srun", *shape, sys.executable, *TRAIN, cwd=tmp_path, timeout_s=TIMEOUT_S)
    check(run, losses)


# launch.backend=ssh

OVER_SSH = ("train", "run.yaml", "launch.backend=ssh", "launch.hostfile=hostfile")
HEARTBEAT_S = 6


@pytest.fixture
def slow(tmp_path: Path, tiny_models: dict[str, Path]) -> dict:
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    return slow_run(tmp_path, tiny_models["mbart"], seconds_per_step=0.2, launch__heartbeat_timeout_s=HEARTBEAT_S)


def start(cluster: Cluster, run: dict, step: int) -> HostCommand:
    """`harness train` on head, once it has made `step`."""
    driver = cluster.start(HEAD, PROGRAMS / "harness", *OVER_SSH, cwd=Path(run["output_dir"]))
    wait_for_step(run, step, driver.last_words)
    return driver


def test_ssh_with_a_hostfile(cluster: Cluster, run: dict, losses: list[float], tmp_path: Path) -> None:
    """From a machine that has no rank; hosts with one and two ranks."""
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=2 # two\nnode3 slots=4\n")
    choice = ("launch.processes=auto", "launch.exclude=node3")
    finished = cluster.run(HEAD, PROGRAMS / "harness", *OVER_SSH, *choice, cwd=tmp_path, timeout_s=TIMEOUT_S)
    check(run, losses)
    assert "loss" in finished.stdout


def test_ssh_stops_and_goes_on(cluster: Cluster, slow: dict, undisturbed: End) -> None:
    driver = start(cluster, slow, 13)
    driver.terminate()
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 75, err
    assert not cluster.leftovers(0)
    driver = start(cluster, slow, NUM_STEPS)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    assert end_of(slow) == undisturbed
    assert num_lost_steps(slow) == 0


def test_ssh_killed_rank(cluster: Cluster, slow: dict, undisturbed: End) -> None:
    """The run starts again by itself, on the same hosts."""
    driver = start(cluster, slow, 13)
    [rank] = [one.pid for one in cluster.processes("node2") if "harness.training.rank" in one.arguments]
    cluster.kill("node2", rank)
    _, err = driver.communicate(timeout=90)
    assert driver.returncode == 0, err
    assert "rank 1 was killed by SIGKILL" in err
    assert end_of(slow) == undisturbed
    assert 3 <= num_lost_steps(slow) < SAVE_EVERY


def test_ssh_host_cut_off(cluster: Cluster, slow: dict) -> None:
    """Driver and hosts, the one that is cut off too, end by the heartbeat's time and not by that of TCP."""
    driver = start(cluster, slow, 11)
    cluster.cut_link("node2")
    assert wait_until(lambda: not cluster.processes("node2"), HEARTBEAT_S + 20)
    _, err = driver.communicate(timeout=HEARTBEAT_S + 40)
    assert driver.returncode == 1, err
    assert f"lost node node2 (rank 1): no sign of life for {HEARTBEAT_S} s" in err
    assert "cannot start on node node2" in err
    assert not cluster.leftovers(0)


def test_ssh_driver_killed(cluster: Cluster, slow: dict) -> None:
    driver = start(cluster, slow, 2)
    driver.kill()
    driver.communicate(timeout=10)
    assert not cluster.leftovers(10)
