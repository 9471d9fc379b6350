"""`launch.backend`: the machines of a run, and one start of its ranks on them."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from harness.config.schema import RunConfig
from harness.io.accelerator import num_devices
from harness.launch.allocation import slurm_nodes
from harness.launch.environment import local_ranks
from harness.launch.failures import Outcome
from harness.launch.nodes import Node
from harness.launch.ssh import run_over_ssh, ssh_nodes
from harness.launch.supervisor import supervise


def nodes_of(config: RunConfig) -> list[Node]:
    """The machines that the run file names, with the ranks of each."""
    launch = config.launch
    if launch.backend == "ssh":
        return ssh_nodes(launch)
    if launch.backend == "slurm":
        return slurm_nodes(config)
    return [Node(socket.gethostname(), num_devices() if launch.processes == "auto" else launch.processes)]


def start_ranks(config: RunConfig, run_dir: Path) -> Outcome:
    """Start the ranks of the plan in `run_dir` once; tells how they ended."""
    command = [sys.executable, "-m", "harness.training.rank", str(run_dir.absolute())]
    nodes, launch = nodes_of(config), config.launch
    if launch.backend == "ssh":
        return run_over_ssh(nodes, command, run_dir=run_dir, launch=launch)
    return supervise(command, local_ranks(nodes[0].num_ranks), run_dir=run_dir, launch=launch)
