"""``python -m harness.launch.task RUN_DIR``: a task of a Slurm step becomes the rank that Slurm's variables make it."""

from __future__ import annotations

import os
import sys

from harness.launch.environment import STORE_VARIABLE, RankEnvironment, read_rank_environment

_OF_OTHER_LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "OMPI_", "PMI_", "MPI_LOCAL", STORE_VARIABLE)  # name starts


def main() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_OTHER_LAUNCHERS)}
    place = read_rank_environment(environment)
    command = [sys.executable, "-m", "harness.training.rank", *sys.argv[1:]]
    os.execve(sys.executable, command, environment | place.variables() | _threads(place))


def _threads(place: RankEnvironment) -> dict[str, str]:
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0)) // place.local_world_size
    return {"OMP_NUM_THREADS": str(max(1, cores))}


if __name__ == "__main__":
    main()
