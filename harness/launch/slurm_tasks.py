"""`slurm.tasks: device`: the ranks themselves are the tasks of one step, one for each device, placed by Slurm."""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from harness.config.launch_schema import LaunchConfig, SlurmConfig
from harness.errors import ExitCode
from harness.launch import failures
from harness.launch.allocation import Allocation
from harness.launch.environment import configured_variables
from harness.launch.failures import Failure, NodeEnd, Outcome, RankEnd
from harness.launch.node import free_port, interface_addresses
from harness.launch.nodes import Node
from harness.launch.signals import SENT_TO_RANKS, StopRequests, received_signals

_DEATH_PATIENCE_S = 60.0  # Slurm's own, after which it gives a node up
_FIRST_PORT, _NUM_PORTS = 20000, 10000


def supervise_tasks(
    within: Sequence[str],
    allocation: Allocation,
    nodes: Sequence[Node],
    *,
    run_dir: Path,
    launch: LaunchConfig,
    slurm: SlurmConfig,
) -> Outcome:
    """Run one rank per task; `within`: the words of Python on a node. Signals as in `supervisor.supervise`, but that
    one which is repeated changes nothing. What ranks print is printed; Slurm ends all tasks when one fails."""
    num_ranks = sum(node.num_ranks for node in nodes)
    failures.set_aside_records(run_dir, range(num_ranks))
    command = [*_srun(allocation, nodes, slurm), *within, "-m", "harness.launch.task", str(run_dir.absolute())]
    environment = os.environ | configured_variables(launch) | _meeting_point(allocation, launch)
    requests, is_killed = StopRequests(may_insist=False), False
    with received_signals() as wakeups, selectors.DefaultSelector() as selector:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, start_new_session=True)
        selector.register(wakeups, selectors.EVENT_READ)
        deadline = float("inf")
        while process.poll() is None:
            timeout = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
            selector.select(timeout)
            for number in map(signal.Signals, _read(wakeups)):
                if requests.answer_to(number) == "stop":
                    process.send_signal(SENT_TO_RANKS[number])  # srun passes it on to every task
                    deadline = time.monotonic() + launch.stop_grace_s
            if time.monotonic() >= deadline:
                process.send_signal(signal.SIGKILL if is_killed else signal.SIGQUIT)  # srun's request to end the step
                is_killed, deadline = True, time.monotonic() + _DEATH_PATIENCE_S
    end = NodeEnd(
        failure=step_failure(process.returncode, run_dir, num_ranks, requests.sent_to_ranks),
        is_interrupted=process.returncode == ExitCode.INTERRUPTED,
        is_killed=is_killed,
        is_requested=requests.first is not None,
    )
    return failures.outcome([end], run_dir, num_ranks=num_ranks)


def _srun(allocation: Allocation, nodes: Sequence[Node], slurm: SlurmConfig) -> list[str]:
    components = sorted({host.component for host in allocation.hosts if host.component is not None})
    groups = [f"--het-group={','.join(map(str, components))}"] if components else []
    size = [] if components else [f"--nodes={len(nodes)}", f"--ntasks={sum(node.num_ranks for node in nodes)}"]
    cores = os.environ.get("SLURM_CPUS_PER_TASK")  # srun no longer takes this from sbatch by itself
    return [
        "srun", "--export=ALL", "--mpi=none", "--kill-on-bad-exit=1", "--overlap", *groups, *size,
        f"--ntasks-per-node={nodes[0].num_ranks}", *([f"--cpus-per-task={cores}"] if cores else []),
        *(word for line in slurm.srun_options for word in shlex.split(line)),
    ]  # fmt: skip


def _meeting_point(allocation: Allocation, launch: LaunchConfig) -> dict[str, str]:
    """Where the ranks meet: on the first node, which is this one in a batch job."""
    address = allocation.hosts[0].name
    if launch.interface is not None:
        address = interface_addresses().get(launch.interface, address)
    return {"MASTER_ADDR": address, "MASTER_PORT": str(free_port(_FIRST_PORT + allocation.job_id % _NUM_PORTS))}


def step_failure(status: int, run_dir: Path, num_ranks: int, requested: signal.Signals | None) -> Failure | None:
    """What the ranks have recorded; else srun's own exit code, which is that of the worst task."""
    now = time.time()
    ends = [RankEnd(rank, ExitCode.OTHER, now, is_killed_by_us=True) for rank in range(num_ranks)]
    recorded = failures.first_failure(ends, run_dir, requested=requested)
    is_cause = recorded is not None and not recorded.is_echo
    if is_cause or status in (ExitCode.DONE, ExitCode.INTERRUPTED):
        return recorded
    if requested is not None and status == 128 + requested:
        return Failure(ExitCode.INTERRUPTED, f"stopped by {requested.name} while starting", now)
    what = f"srun ended with exit code {status}"
    if 128 < status < 192:
        what = f"a rank was killed by {signal.Signals(status - 128).name}"
    return Failure(ExitCode.OTHER, f"{what}: see what it printed", now, is_restartable=status > 128 or status < 0)


def _read(wakeups: int) -> bytes:
    try:
        return os.read(wakeups, 4096)
    except BlockingIOError:
        return b""
