"""``python -m harness.launch.node [NUMBER]``: the supervisor of one machine's ranks, told what to do by the driver.

The driver is at the other end of standard input and output (see `link.py`). Without NUMBER this is a task of a Slurm
step, and Slurm says which node.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import harness
from harness.config.launch_schema import LaunchConfig
from harness.launch.environment import DEFAULT_PORT, RankEnvironment
from harness.launch.link import Link, Order
from harness.launch.output import Terminal
from harness.launch.supervisor import supervise_node

_START_PATIENCE_S = 3600.0  # the slowest other node may take so long to come up
_SIOCGIFADDR = 0x8915  # <linux/sockios.h>
_NUM_PORTS_TRIED = 100


def main() -> None:
    number = int(sys.argv[1] if len(sys.argv) > 1 else os.environ["SLURM_NODEID"])
    writer = os.dup(1)
    os.dup2(2, 1)  # nothing but messages goes to the driver
    link = Link(number, 0, writer)
    link.hello(
        host=socket.gethostname(),
        version=harness.__version__,
        port=free_port(first_port()),
        addresses=interface_addresses(),
    )
    order = _wait_for_start(link)
    if order is not None:
        _supervise(link, order)
    link.close()
    os._exit(0)  # not held up by a thread that writes to a driver that is gone


def _wait_for_start(link: Link) -> Order | None:
    """None when the driver has gone or has changed its mind."""
    deadline = time.monotonic() + _START_PATIENCE_S
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        while time.monotonic() < deadline and not link.is_lost:
            selector.select(deadline - time.monotonic())
            for order in link.orders():
                if order.kind == "start":
                    return order
                if order.kind in ("stop", "kill"):
                    return None
    return None


def _supervise(link: Link, order: Order) -> None:
    wanted = order.content
    os.chdir(wanted["directory"])
    os.environ.update(wanted["environment"])
    link.silence_s = wanted["silence_s"]
    ranks = [RankEnvironment(**rank) for rank in wanted["ranks"]]
    terminal = Terminal(link.output)
    try:
        end = supervise_node(
            wanted["command"],
            ranks,
            run_dir=Path(wanted["run_dir"]),
            terminal=terminal,
            launch=LaunchConfig.model_validate(wanted["launch"]),
            link=link,
        )
    finally:
        terminal.close()
    link.end(end)


def first_port() -> int:
    """From the job's number, so that jobs which share a node begin their search at different ports."""
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    return 20000 + job % 10000 if job else DEFAULT_PORT


def free_port(first: int) -> int:
    """The first port from `first` that nothing on this machine listens to."""
    for port in range(first, first + _NUM_PORTS_TRIED):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {first} to {first + _NUM_PORTS_TRIED - 1}")


def interface_addresses() -> dict[str, str]:
    """IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    main()
