"""Backend `ssh`: a supervisor on each host of a hostfile, started by plain ssh."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.config.launch_schema import LaunchConfig
from harness.launch.failures import Outcome
from harness.launch.fleet import Way, supervise_nodes
from harness.launch.hostfile import chosen_nodes, read_hostfile
from harness.launch.nodes import Node

_OPTIONS = (  # a host that loses its power is missed after 15 s
    "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
)  # fmt: skip


def ssh_nodes(launch: LaunchConfig) -> list[Node]:
    """The hosts of `launch.hostfile` that its filters leave, with as many ranks as slots or `launch.processes`."""
    assert launch.hostfile is not None
    nodes = chosen_nodes(read_hostfile(Path(launch.hostfile)), include=launch.include, exclude=launch.exclude)
    if launch.processes == "auto":
        return nodes
    return [Node(node.name, launch.processes, node.devices) for node in nodes]


def run_over_ssh(nodes: Sequence[Node], rank_command: Sequence[str], *, run_dir: Path, launch: LaunchConfig) -> Outcome:
    """One start of a run on `nodes`."""
    ways = [Way(_ssh_command(node.name, number), [number]) for number, node in enumerate(nodes)]
    return supervise_nodes(ways, nodes, rank_command, run_dir=run_dir, launch=launch)


def _ssh_command(host: str, number: int) -> list[str]:
    """All else that the node must know is sent to it later, where nothing needs quoting."""
    command = [sys.executable, "-m", "harness.launch.node", str(number)]
    if "PYTHONPATH" in os.environ:
        command = ["env", f"PYTHONPATH={os.environ['PYTHONPATH']}", *command]
    return ["ssh", *_OPTIONS, host, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"]
