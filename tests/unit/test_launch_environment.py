"""Rank environments as the launchers set them (values recorded from torchrun, deepspeed, Open MPI, MPICH and Slurm)."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config.launch_schema import LaunchConfig
from harness.errors import ConfigError
from harness.launch.environment import (
    RankEnvironment,
    configured_variables,
    local_ranks,
    read_rank_environment,
    share_of_cores,
)

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
SLURM_STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04],cpu1",
}
SLURM_RANK_3 = SLURM_STEP | {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


def place(environ: dict[str, str]) -> tuple[object, ...]:
    found = read_rank_environment(environ)
    assert found.store_path is None
    return (
        found.rank,
        found.local_rank,
        found.world_size,
        found.local_world_size,
        found.master_address,
        found.master_port,
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param(
            MEETING | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            (3, 1, 4, 2, "10.0.0.1", 29501),
            id="torchrun",
        ),
        pytest.param(
            MEETING | {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"},
            (3, 1, 4, 2, "10.0.0.1", 29501),
            id="deepspeed",
        ),
        pytest.param({"RANK": "1", "WORLD_SIZE": "2"}, (1, 1, 2, 2, "127.0.0.1", 29500), id="bare"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"},
            (1, 1, 2, 2, "localhost", 1234),
            id="bare with a loopback address",
        ),
        pytest.param(
            MEETING | {"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1, 1, "10.0.0.1", 29501), id="bare single process"
        ),
        pytest.param(
            MEETING
            | {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            },
            (3, 0, 4, 1, "10.0.0.1", 29501),
            id="Open MPI",
        ),
        pytest.param(
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            (1, 1, 2, 2, "127.0.0.1", 29500),
            id="MPICH on one machine",
        ),
        pytest.param(SLURM_RANK_3, (3, 1, 5, 2, "gpu03", 23456), id="srun"),
        pytest.param(SLURM_RANK_3 | MEETING, (3, 1, 5, 2, "10.0.0.1", 29501), id="srun with MASTER_ADDR"),
        pytest.param(
            SLURM_STEP | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"},
            (4, 0, 5, 1, "gpu03", 23456),
            id="srun, smaller last node",
        ),
        pytest.param(
            SLURM_RANK_3 | {"PMI_RANK": "3", "PMI_SIZE": "5"}, (3, 1, 5, 2, "gpu03", 23456), id="srun --mpi=pmi2"
        ),
        pytest.param(
            SLURM_RANK_3 | MEETING | {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            (7, 3, 8, 4, "10.0.0.1", 29501),
            id="torchrun under srun",
        ),
        pytest.param({}, (0, 0, 1, 1, None, None), id="nothing"),
        pytest.param(
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "5"},
            (0, 0, 1, 1, None, None),
            id="batch script, no step",
        ),
        pytest.param(
            SLURM_RANK_3 | {"SLURM_STEP_ID": "4294967290"}, (0, 0, 1, 1, None, None), id="salloc's interactive step"
        ),
    ],
)
def test_launchers(environ: dict[str, str], expected: tuple[object, ...]) -> None:
    assert place(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but no rank is"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not in 0..1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' is not a whole number"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK='1.0' is not a whole number"),
        ({"RANK": "\u0661", "WORLD_SIZE": "2"}, "is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "rank 2 of 2 on this machine"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "rank 0 of 4 on this machine"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "LOCAL_WORLD_SIZE is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            "MASTER_ADDR is not set",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        (SLURM_RANK_3 | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but SLURM_STEP_NUM_TASKS says 5"),
        (SLURM_RANK_3 | {"SLURM_NODEID": "3"}, "SLURM_NODEID=3"),
        (SLURM_RANK_3 | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "is not a list of counts"),
        (SLURM_RANK_3 | {"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID='x' is not a whole number"),
    ],
)
def test_contradictions(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_rank_environment(environ)
    assert message in str(caught.value)


def test_what_the_supervisor_sets_is_what_the_rank_reads(tmp_path: Path) -> None:
    ranks = local_ranks(3)
    assert [(rank.rank, rank.local_rank) for rank in ranks] == [(0, 0), (1, 1), (2, 2)]
    path = tmp_path / "store"
    stored = [RankEnvironment(rank.rank, rank.local_rank, 3, 3, path) for rank in ranks]
    assert [read_rank_environment(rank.variables()) for rank in stored] == stored
    remote = RankEnvironment(5, 1, 8, 4, None, "10.0.0.1", 29501)
    assert read_rank_environment(remote.variables()) == remote


def test_an_empty_store_is_no_store() -> None:
    assert read_rank_environment({"RANK": "0", "WORLD_SIZE": "1", "HARNESS_STORE": ""}).store_path is None


def test_variables_that_the_run_file_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB", "7")
    launch = LaunchConfig(interface="ib0", node_local_dir="/scratch/$JOB", environment={"GLOO_SOCKET_IFNAME": "eth0"})
    assert configured_variables(launch, {}) == {
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TRITON_CACHE_DIR": "/scratch/7/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/scratch/7/inductor",
        "TORCH_EXTENSIONS_DIR": "/scratch/7/torch_extensions",
    }
    assert "TORCH_EXTENSIONS_DIR" not in configured_variables(launch, {"TORCH_EXTENSIONS_DIR": "/built"})
    assert configured_variables(LaunchConfig(), {}) == {}


@pytest.mark.parametrize(("num_cores", "num_ranks"), [(8, 2), (7, 3), (4, 4), (2, 3), (1, 2)])
def test_cores_are_shared_out(num_cores: int, num_ranks: int) -> None:
    cores = list(range(10, 10 + num_cores))
    shares = [share_of_cores(cores, place) for place in local_ranks(num_ranks)]
    assert {core for share in shares for core in share} == set(cores)
    assert all(list(share) == list(range(share[0], share[0] + len(share))) for share in shares)
    if num_ranks <= num_cores:
        assert sum(map(len, shares)) == num_cores
