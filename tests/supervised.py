"""A supervisor with small scripts as ranks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.runs import REPOSITORY

DRIVER = """
import json, sys
from functools import partial
from pathlib import Path
from harness.config.launch_schema import LaunchConfig
from harness.launch.environment import local_ranks
from harness.launch.restarts import run_attempts
from harness.launch.supervisor import supervise
run_dir, script, num_ranks, launch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
launch = LaunchConfig.model_validate(launch)
attempt = partial(supervise, [sys.executable, script], local_ranks(num_ranks), run_dir=run_dir, launch=launch)
sys.exit(run_attempts(attempt, run_dir, max_restarts=launch.max_restarts, origin={"backend": "local"}).report())
"""
FLEET_DRIVER = """
import json, sys
from pathlib import Path
from harness.config.launch_schema import LaunchConfig
from harness.launch.fleet import Way, supervise_nodes
from harness.launch.nodes import Node
run_dir, script, num_ranks, launch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
ways = [Way([sys.executable, "-m", "harness.launch.node", str(number)], [number]) for number in range(2)]
nodes, command = [Node("localhost", num_ranks // 2)] * 2, [sys.executable, script]
sys.exit(supervise_nodes(ways, nodes, command, run_dir=run_dir, launch=LaunchConfig.model_validate(launch)).report())
"""
PROLOGUE = """
import json, os, pathlib, signal, subprocess, sys, time
run = pathlib.Path(os.environ.get("RUN_DIR", "."))
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def record(**fields):
    (run / "errors").mkdir(exist_ok=True)
    base = {"rank": rank, "host": "here", "step": None, "time": time.time(), "kind": "crash", "traceback": ""}
    (run / "errors" / f"rank-{rank}.json").write_text(json.dumps(base | fields))
def ready():
    (run / f"ready-{rank}").write_text(str(os.getpid()))
def on_stop(action):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: action(number))
"""


class Run:
    """A supervisor in its own process, its ranks running `body`; `launch` is that section of a run file."""

    driver = DRIVER

    def __init__(self, directory: Path, body: str, *, num_ranks: int, launch: dict[str, Any]) -> None:
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        script = directory / "rank.py"
        script.write_text(PROLOGUE + body)
        self.num_ranks = num_ranks
        self.private = directory / "tmp"
        self.private.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.driver, str(self.run_dir), str(script), str(num_ranks), json.dumps(launch)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"RUN_DIR": str(self.run_dir), "TMPDIR": str(self.private), "PYTHONPATH": str(REPOSITORY)},
        )

    def wait_ready(self) -> list[int]:
        """Process ids of the ranks, once all of them have called ready()."""
        files = [self.run_dir / f"ready-{rank}" for rank in range(self.num_ranks)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def finish(self, timeout_s: float = 20.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out.decode(), err.decode()

    def remaining(self) -> list[int]:
        """Every process whose environment names this run's directory, the supervisor aside."""
        needle = f"RUN_DIR={self.run_dir}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.process.pid]


class Fleet(Run):
    """A driver in its own process with two node supervisors, here on one machine, that have half of the ranks each."""

    driver = FLEET_DRIVER

    def node_supervisors(self) -> list[int]:
        """Process ids of the node supervisors, in the order of their numbers."""
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in self.remaining()}
        nodes = [pid for pid, words in commands.items() if b"harness.launch.node" in words]
        return sorted(nodes, key=lambda pid: int(commands[pid][-2]))


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "timed out"
        time.sleep(0.01)
    return time.monotonic() - start
