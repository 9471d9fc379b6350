"""`launch.backend`: the machines of a run, and one start of its ranks on them."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.cluster.allocation import slurm_nodes
from harness.cluster.ssh import run_over_ssh, ssh_nodes
from harness.config.load import load_run_config
from harness.config.schema import RunConfig
from harness.io.accelerator import num_devices
from harness.launch.environment import local_ranks
from harness.launch.failures import Outcome
from harness.launch.nodes import Node
from harness.launch.supervisor import supervise
from harness.plan.plan import Plan, make_plan


def plan_run(run_file: Path, overrides: Sequence[str], *, world_size: int | None = None) -> Plan:
    """The checked plan of a run file for `world_size` ranks; default: what the file's `launch` section says."""
    config = load_run_config(run_file, overrides)
    return make_plan(config, world_size=world_size or sum(node.num_ranks for node in nodes_of(config)))


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
