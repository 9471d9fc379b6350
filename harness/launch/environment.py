"""Which rank this process is: read from the variables that launchers set, written for the ranks we start."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

from harness.config.launch_schema import LaunchConfig
from harness.errors import ConfigError

STORE_VARIABLE = "HARNESS_STORE"
DEFAULT_PORT = 29500  # torchrun's and DeepSpeed's default
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # Slurm numbers its batch, extern and interactive steps from the top


@dataclass(frozen=True)
class RankEnvironment:
    """One rank's place in the run, and where the ranks meet: a file on one machine, else rank 0's address and port."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    store_path: Path | None = None
    master_address: str | None = None
    master_port: int | None = None

    def variables(self) -> dict[str, str]:
        """The variables from which `read_rank_environment` reads this back; torch and DeepSpeed read them too."""
        values = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": self.master_port,
            STORE_VARIABLE: self.store_path,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


class _Names(NamedTuple):
    """The variables of one launcher; each field lists alternatives, best first."""

    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]


_TORCH = _Names(("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OPEN_MPI = _Names(
    ("OMPI_COMM_WORLD_RANK",),
    ("OMPI_COMM_WORLD_SIZE",),
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_PMI = _Names(
    ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
)
_SLURM = _Names(
    ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_LOCALID",), ("SLURM_STEP_TASKS_PER_NODE",)
)


def local_ranks(num_processes: int) -> list[RankEnvironment]:
    """The ranks of a run on this machine alone."""
    return [RankEnvironment(rank, rank, num_processes, num_processes) for rank in range(num_processes)]


def configured_variables(launch: LaunchConfig, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that `launch` asks for in every rank of this machine; `launch.environment` has the last word."""
    variables: dict[str, str] = {}
    if launch.interface is not None:
        variables |= {"NCCL_SOCKET_IFNAME": launch.interface, "GLOO_SOCKET_IFNAME": launch.interface}
    if launch.node_local_dir is not None:
        directory = os.path.expandvars(os.path.expanduser(launch.node_local_dir))  # noqa: PTH111 - of this machine
        variables |= {name: f"{directory}/{cache}" for name, cache in _CACHES.items()}
        if environ.get("TORCH_EXTENSIONS_DIR"):
            del variables["TORCH_EXTENSIONS_DIR"]  # the user's own: extensions may be built there already
    return variables | launch.environment


def share_of_cores(cores: Sequence[int], place: RankEnvironment) -> Sequence[int]:
    """This rank's part of the cores that the ranks of its machine may use: neighbours, or one that it shares."""
    first, end = (len(cores) * number // place.local_world_size for number in (place.local_rank, place.local_rank + 1))
    return cores[first : max(end, first + 1)]


def read_rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
    """This process's place in the run; without a launcher, rank 0 of 1.

    The launcher nearest to the process wins: RANK (torchrun, deepspeed, our own), then MPI, then a Slurm step.
    ConfigError for values that are missing, not whole numbers, or contradict each other.
    """
    names = _launcher(environ)
    if names is None:
        if environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"WORLD_SIZE={environ['WORLD_SIZE']} is set but no rank is",
                where="environment",
                hint="set RANK too, or start the ranks with torchrun, deepspeed or srun",
            )
        return RankEnvironment(rank=0, local_rank=0, world_size=1, local_world_size=1)
    rank, world_size = _required(environ, names.rank), _required(environ, names.world_size)
    if environ.get("WORLD_SIZE", str(world_size)) != str(world_size):
        _contradiction(f"WORLD_SIZE={environ['WORLD_SIZE']}, but {names.world_size[0]} says {world_size}")
    local_rank, local_world_size = _local_place(environ, names, rank, world_size)
    if not 0 <= rank < world_size:
        _contradiction(f"{names.rank[0]}={rank} is not in 0..{world_size - 1}")
    if not 0 <= local_rank < local_world_size <= world_size:
        _contradiction(f"rank {local_rank} of {local_world_size} on this machine, {world_size} in all")
    place = RankEnvironment(rank, local_rank, world_size, local_world_size)
    return _with_meeting_point(place, environ, is_slurm=names is _SLURM)


def _launcher(environ: Mapping[str, str]) -> _Names | None:
    is_slurm_step = "SLURM_PROCID" in environ and _first_set(environ, ("SLURM_STEP_ID",)) is not None
    if is_slurm_step:
        is_slurm_step = _required(environ, ("SLURM_STEP_ID",)) < _FIRST_SPECIAL_STEP
    if "RANK" in environ:
        return _TORCH
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _OPEN_MPI
    if "PMI_RANK" in environ and (_first_set(environ, _PMI.local_rank) or not is_slurm_step):
        return _PMI
    return _SLURM if is_slurm_step else None


def _local_place(environ: Mapping[str, str], names: _Names, rank: int, world_size: int) -> tuple[int, int]:
    """(local_rank, local_world_size); all ranks are here if nothing is said and they meet on the loopback address."""
    is_one_machine = world_size == 1 or environ.get("MASTER_ADDR", "127.0.0.1") in _LOOPBACK
    if is_one_machine and _first_set(environ, names.local_rank) is None:
        return rank, world_size
    local_rank = _required(environ, names.local_rank)
    if names is _SLURM:
        return local_rank, _slurm_tasks_here(environ)
    if is_one_machine and _first_set(environ, names.local_world_size) is None:
        return local_rank, world_size
    return local_rank, _required(environ, names.local_world_size)


def _with_meeting_point(place: RankEnvironment, environ: Mapping[str, str], *, is_slurm: bool) -> RankEnvironment:
    if environ.get(STORE_VARIABLE):
        return replace(place, store_path=Path(environ[STORE_VARIABLE]))
    address, port = environ.get("MASTER_ADDR"), DEFAULT_PORT
    if is_slurm:
        address = address or _first_host(environ.get("SLURM_STEP_NODELIST", ""))
        port = 20000 + _required(environ, ("SLURM_JOB_ID",)) % 10000
    if address is None and place.local_world_size == place.world_size:
        address = "127.0.0.1"
    if address is None:
        raise ConfigError(
            "MASTER_ADDR is not set", where="environment", hint="give every rank the address of rank 0's machine"
        )
    if "MASTER_PORT" in environ:
        port = _required(environ, ("MASTER_PORT",))
    if not 0 < port < 65536:
        _contradiction(f"MASTER_PORT={port} is not a port")
    return replace(place, master_address=address, master_port=port)


def _slurm_tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks of this node from Slurm's run-length list: in `4(x2),1` nodes 0 and 1 have 4, node 2 has 1."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            _contradiction(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list of counts")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _required(environ, ("SLURM_NODEID",))
    if node >= len(counts):
        _contradiction(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={text!r}")
    return counts[node]


def _first_host(node_list: str) -> str | None:
    """`gpu[03-07,11],cpu1` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", node_list)
    return match[1] + (match[2] or "") if match else None


def _first_set(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in environ), None)


def _required(environ: Mapping[str, str], names: tuple[str, ...]) -> int:
    name = _first_set(environ, names)
    if name is None:
        raise ConfigError(f"{names[0]} is not set", where="environment", hint="the launcher must set it for every rank")
    if not re.fullmatch(r"[0-9]{1,10}", environ[name]):
        raise ConfigError(f"{name}={environ[name]!r} is not a whole number", where="environment")
    return int(environ[name])


def _contradiction(what: str) -> NoReturn:
    raise ConfigError(
        what, where="environment", hint="the variables of two launchers may be mixed: unset the stale ones"
    )
