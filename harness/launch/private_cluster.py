"""A Slurm of this machine alone, for rehearsals where there is no cluster: that of our tests, from a checkout only."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import harness
from harness.config.launch_rules import num_gpus, ranks_per_node
from harness.config.schema import RunConfig
from harness.errors import ConfigError

_SCRIPT = Path(harness.__file__).parents[1] / "tests" / "cluster" / "cluster.sh"
_MEMORY_MIB = 1 << 20  # what each node pretends to have, enough for any run file
ITS_OWN = (  # it has none of these
    "slurm.account=null", "slurm.partition=null", "slurm.qos=null", "slurm.constraint=null", "slurm.reservation=null",
    "slurm.options=[]", "slurm.modules=[]",
)  # fmt: skip


@contextmanager
def private_cluster(config: RunConfig, num_nodes: int) -> Iterator[Sequence[str]]:
    """The words before a command that run it on the head of a cluster whose nodes pretend to have what the run wants.

    Nothing but Slurm's packages is left of it at the end. Raises ConfigError if this machine cannot have one.
    """
    if not _SCRIPT.is_file() or os.geteuid() != 0:
        hint = "use a login node of a cluster, or be root in a checkout of harness on a Debian machine"
        raise ConfigError("no private cluster can be made here", where="--private", hint=hint)
    slurm = config.slurm
    assert slurm is not None
    with tempfile.TemporaryDirectory(prefix="harness-cluster-") as directory:
        environment = os.environ | {
            "CLUSTER_DIR": directory,
            "CLUSTER_SHARED": str(Path(directory).parent),
            "NODE_CPUS": str(slurm.cpus_per_node or ranks_per_node(config)),
            "NODE_GPUS": str(max(1, num_gpus(slurm.gpus_per_node))),
            "NODE_MEMORY_MB": str(_MEMORY_MIB),
        }
        holder = subprocess.Popen(
            [str(_SCRIPT), "hold", str(num_nodes)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        assert holder.stdout is not None
        try:
            if not holder.stdout.readline():
                raise ConfigError("the private cluster does not start: see above", where="--private")
            yield ["env", f"CLUSTER_DIR={directory}", str(_SCRIPT), "exec", "head"]
        finally:
            holder.communicate()
