"""``python -m harness.launch.probe DIRECTORY NUMBER``: what one node of a job finds out about itself and the rest.

`harness rehearse` runs it once per node. The nodes write what they find to DIRECTORY, beside the run directory: what
one node does not see of the others there is itself a finding. Nothing is judged here, see `probe_report.py`.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import harness
from harness.launch.node import first_port, free_port, interface_addresses

Facts = dict[str, Any]
PACKAGES = ("torch", "deepspeed", "transformers")
_PATIENCE_S = 30.0  # until the others have come and have reached us; a shared file system may show new files late
_CONNECT_S = 5.0
_POLL_S = 0.2


def main(directory: Path, node: int) -> None:
    """`node`: our number among the hosts of hosts.json."""
    wanted = json.loads((directory / "request.json").read_text())
    hosts = json.loads((directory / "hosts.json").read_text())
    with listener(free_port(first_port())) as meeting, listener(0) as other:
        ports = [server.getsockname()[1] for server in (meeting, other)]
        addresses = interface_addresses()
        hello: Facts = {"host": socket.gethostname(), "ports": ports, "addresses": addresses}
        hello["address"] = addresses.get(wanted["interface"], hosts[node])  # by which the ranks will call us
        write(directory / f"hello-{node}.json", hello)
        facts: Facts = hello | local_facts(wanted)
        hellos = arrivals(directory, "hello", range(len(hosts)))
        facts["seen"] = sorted(hellos)
        unreachable, clock_offset_s = reach(hellos)
        facts["unreachable"], facts["clock_offset_s"] = unreachable, clock_offset_s
        write(directory / f"facts-{node}.json", facts)
        arrivals(directory, "facts", hellos)  # we listen until everybody has tried


def local_facts(wanted: Facts) -> Facts:
    """What this node knows without the others."""
    local = wanted["node_local_dir"]
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "harness": harness.__version__,
        "packages": {name: version_of(name) for name in PACKAGES},
        "run_dir": directory_facts(Path(wanted["output_dir"])),
        "node_local_dir": None if local is None else directory_facts(Path(os.path.expandvars(local)).expanduser()),
        "unreadable": {path: problem for path in wanted["files"] if (problem := read_problem(Path(path)))},
        "gpus": visible_gpus(),
        "memory_bytes": memory_bytes(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def directory_facts(path: Path) -> Facts:
    """Can it be made and written, how much room is there. `problem` is None if all is well."""
    probe = path / f".harness-probe-{socket.gethostname()}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("harness rehearse\n")
        probe.unlink()
        return {"problem": None, "free_bytes": shutil.disk_usage(path).free}
    except OSError as error:
        return {"problem": error.strerror, "free_bytes": None}


def read_problem(path: Path) -> str | None:
    """Why a file cannot be read (a directory: listed), None if it can."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror
    return None


def visible_gpus() -> int:
    """What Slurm gives us (CUDA_VISIBLE_DEVICES), else what nvidia-smi lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(device.strip() not in ("", "-1", "NoDevFiles") for device in visible.split(","))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.splitlines())


def memory_bytes() -> int:
    """Of the machine, or what Slurm gives the job of it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_cpu = int(os.environ.get("SLURM_MEM_PER_CPU", "0")) * int(os.environ.get("SLURM_CPUS_ON_NODE", "0"))
    granted = int(os.environ.get("SLURM_MEM_PER_NODE", per_cpu)) * 2**20
    return min(machine, granted or machine)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def listener(port: int) -> socket.socket:
    """A server that tells everybody the time."""
    server = socket.create_server(("", port), backlog=1024)

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed
                return
            with connection:
                connection.sendall(f"{time.time()}\n".encode())

    threading.Thread(target=answer, daemon=True).start()
    return server


def reach(hellos: dict[int, Facts]) -> tuple[list[tuple[str, int, str]], float | None]:
    """([(`host (address)`, port, why it cannot be reached)], our clock minus that of the first node in seconds)."""
    unreachable, offset = [], None
    targets = [(node, hello, port) for node, hello in sorted(hellos.items()) for port in hello["ports"]]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda target: ask(target[1]["address"], target[2]), targets)
        for (node, hello, port), answer in zip(targets, answers, strict=True):
            if isinstance(answer, str):
                unreachable.append((f"{hello['host']} ({hello['address']})", port, answer))
            elif node == 0:
                offset = answer
    return unreachable, offset


def ask(address: str, port: int) -> float | str:
    """Our clock minus the other one's in seconds, or why there is no answer."""
    before = time.time()
    try:
        with socket.create_connection((address, port), timeout=_CONNECT_S) as connection:
            theirs = float(connection.makefile().readline())
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return (before + time.time()) / 2 - theirs


def arrivals(directory: Path, kind: str, nodes: Collection[int]) -> dict[int, Facts]:
    """The files `KIND-N.json` by N; waits for those of all `nodes`, or until patience ends."""
    deadline = time.monotonic() + _PATIENCE_S
    found: dict[int, Facts] = {}
    while len(found) < len(nodes) and time.monotonic() < deadline:
        for node in set(nodes) - found.keys():
            try:
                found[node] = json.loads((directory / f"{kind}-{node}.json").read_text())
            except (OSError, ValueError):
                continue
        time.sleep(_POLL_S)
    return found


def write(path: Path, content: Facts) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
