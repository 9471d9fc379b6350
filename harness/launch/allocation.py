"""The nodes that Slurm has given to the job this process runs in."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.config.launch_rules import ranks_per_node
from harness.config.launch_schema import LaunchConfig
from harness.config.schema import RunConfig
from harness.errors import ConfigError
from harness.io.accelerator import num_devices
from harness.launch import scheduler
from harness.launch.nodes import Node

_VARIABLE = "SLURM_JOB_NODELIST"


@dataclass(frozen=True)
class Host:
    """A node; `component`: its number in a heterogeneous job."""

    name: str
    component: int | None = None

    def options(self) -> list[str]:
        """Options of srun for one task here, beside whatever else the job runs."""
        component = [] if self.component is None else [f"--het-group={self.component}"]
        return [*component, "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--nodelist={self.name}", "--overlap"]


@dataclass(frozen=True)
class Allocation:
    """`requeues`: how often Slurm has started the job before; `num_gpus`: of this node, None if none were asked for."""

    job_id: int
    requeues: int
    hosts: Sequence[Host]
    num_gpus: int | None

    def nodes(self, launch: LaunchConfig) -> list[Node]:
        """Each node with its ranks: `launch.processes`, else the GPUs of this node."""
        per_node = (self.num_gpus or num_devices()) if launch.processes == "auto" else launch.processes
        return [Node(host.name, per_node) for host in self.hosts]


def slurm_nodes(config: RunConfig) -> list[Node]:
    """The nodes of the job this process runs in; outside of one those that the run file asks for, as yet unnamed."""
    if _VARIABLE in os.environ:
        return current_allocation().nodes(config.launch)
    count = config.slurm.nodes if config.slurm is not None else 1
    return [Node(f"node{number}", ranks_per_node(config)) for number in range(1, count + 1)]


def current_allocation(environ: Mapping[str, str] = os.environ) -> Allocation:
    """That of this process. Raises ConfigError outside of a job."""
    if _VARIABLE not in environ:
        raise ConfigError(
            "this is not a job of Slurm",
            where="launch.backend",
            hint="submit the run: harness submit RUN.yaml (or start it within salloc)",
        )
    lists: list[tuple[int | None, str]] = [(None, environ[_VARIABLE])]
    if "SLURM_HET_SIZE" in environ:
        components = range(int(environ["SLURM_HET_SIZE"]))
        lists = [(number, environ[f"SLURM_JOB_NODELIST_HET_GROUP_{number}"]) for number in components]
    return Allocation(
        job_id=int(environ["SLURM_JOB_ID"]),
        requeues=int(environ.get("SLURM_RESTART_COUNT", "0")),
        hosts=[Host(name, number) for number, node_list in lists for name in scheduler.hostnames(node_list)],
        num_gpus=_number(environ.get("SLURM_GPUS_ON_NODE")),
    )


def _number(text: str | None) -> int | None:
    """`8`, or the last number of a list like `tesla:4`."""
    match = re.search(r"(\d+)$", text or "")
    return int(match[1]) if match else None
