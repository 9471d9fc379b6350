"""The driver of several machines: two node supervisors, here on one machine, with small scripts as ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.supervised import PROLOGUE, wait_until

DRIVER = """
import sys
from pathlib import Path
from harness.config.launch_schema import LaunchConfig
from harness.launch.fleet import Way, supervise_nodes
from harness.launch.nodes import Node
run_dir, script, num_nodes, ranks_each, silence_s, grace_s = sys.argv[1:]
node = [sys.executable, "-m", "harness.launch.node"]
nodes = [Node("localhost", int(ranks_each)) for _ in range(int(num_nodes))]
ways = [Way([*node, str(number)], [number]) for number in range(len(nodes))]
launch = LaunchConfig(heartbeat_timeout_s=float(silence_s), stop_grace_s=float(grace_s))
sys.exit(supervise_nodes(ways, nodes, [sys.executable, script], run_dir=Path(run_dir), launch=launch).report())
"""


class Fleet:
    """A driver in its own process, the ranks of its nodes running `body`."""

    def __init__(
        self, directory: Path, body: str, *, num_nodes: int, ranks_each: int, silence_s: float, grace_s: float
    ) -> None:
        self.run_dir, self.private = directory / "run", directory / "tmp"
        self.run_dir.mkdir()
        self.private.mkdir()
        self.world_size = num_nodes * ranks_each
        script = directory / "rank.py"
        script.write_text(PROLOGUE + body)
        numbers = [str(number) for number in (num_nodes, ranks_each, silence_s, grace_s)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.run_dir), str(script), *numbers],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ
            | {"HARNESS_RUN_DIR": str(self.run_dir), "RUN_DIR": str(self.run_dir), "TMPDIR": str(self.private)},
        )

    def wait_ready(self) -> list[int]:
        """Process ids of the ranks, once all of them have called ready()."""
        files = [self.run_dir / f"ready-{rank}" for rank in range(self.world_size)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def node_supervisors(self) -> list[int]:
        """Process ids of the node supervisors, in the order of their numbers."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"harness.launch.node" in words and f"RUN_DIR={self.run_dir}".encode() in (
                    entry / "environ"
                ).read_bytes().split(b"\0"):
                    found[int(words[-2])] = int(entry.name)
        return [found[number] for number in sorted(found)]

    def finish(self, timeout_s: float = 30.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out.decode(), err.decode()

    def remaining(self) -> list[int]:
        """Every process whose environment names this run's directory, the driver aside."""
        needle = f"RUN_DIR={self.run_dir}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return [pid for pid in found if pid != self.process.pid]


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    fleets: list[Fleet] = []

    def start(
        body: str, *, num_nodes: int = 2, ranks_each: int = 2, silence_s: float = 10.0, grace_s: float = 60.0
    ) -> Fleet:
        fleets.append(
            Fleet(tmp_path, body, num_nodes=num_nodes, ranks_each=ranks_each, silence_s=silence_s, grace_s=grace_s)
        )
        return fleets[-1]

    yield start
    for fleet in fleets:
        if fleet.process.poll() is None:
            fleet.process.kill()
            fleet.process.communicate()
        wait_until(lambda fleet=fleet: not fleet.remaining())
        assert not list(fleet.private.iterdir()), "a private directory is left"


WAITS_FOR_A_STOP = "on_stop(lambda number: sys.exit(75))\nready()\ntime.sleep(60)"


def test_ranks_of_two_nodes_know_their_places_and_one_meeting_point(start) -> None:
    fleet = start("""
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
(run / f"place-{rank}").write_text(" ".join(os.environ[name] for name in names))
print("output of", rank)
""")
    code, out, err = fleet.finish()
    assert (code, out, err) == (0, "output of 0\n", "")
    places = [(fleet.run_dir / f"place-{rank}").read_text().split() for rank in range(4)]
    assert [place[:4] for place in places] == [[str(rank), "4", str(rank % 2), "2"] for rank in range(4)]
    assert len({tuple(place[4:]) for place in places}) == 1
    assert places[0][4] == "localhost"
    logs = [(fleet.run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in range(4)]
    assert logs == [f"output of {rank}\n" for rank in range(4)]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("sys.exit(75)", 75, "stopped on request"),
        ("sys.exit(5 if rank == 3 else 0)", 5, "rank 3 ended with exit code 5"),
        ("record(message='rows.tsv:7: no target', exit_code=3); sys.exit(3)", 3, "rows.tsv:7: no target"),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else time.sleep(60)", 1, "rank 2 was killed by SIGKILL"),
    ],
)
def test_the_first_failure_of_any_node_ends_all(start, body: str, code: int, message: str) -> None:
    found, _, err = start(body).finish()
    assert found == code
    assert message in err
    assert err.rstrip().splitlines()[-1].startswith("  -> ")


def test_of_two_failing_nodes_the_first_is_told(start) -> None:
    fleet = start("""
if rank in (1, 2):
    time.sleep(0.5 if rank == 2 else 1.5)
    record(message=f"rank {rank} broke", exit_code=1)
    sys.exit(1)
time.sleep(60)
""")
    code, _, err = fleet.finish()
    assert code == 1
    assert "error: rank 2: rank 2 broke" in err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR2])
def test_one_signal_to_the_driver_reaches_every_rank_once(start, sent: signal.Signals) -> None:
    fleet = start("""
seen = []
def stop(number):
    seen.append(signal.Signals(number).name)
    (run / f"seen-{rank}").write_text(" ".join(seen))
on_stop(stop)
ready()
while not seen: time.sleep(0.01)
time.sleep(0.5)
sys.exit(75)
""")
    fleet.wait_ready()
    fleet.process.send_signal(sent)
    assert fleet.finish()[0] == 75
    assert [(fleet.run_dir / f"seen-{rank}").read_text() for rank in range(4)] == [sent.name] * 4


def test_a_signal_to_one_node_supervisor_alone_reaches_its_ranks(start) -> None:
    """As Slurm does at a preemption. The ranks of a real run agree; here only those of that node end."""
    fleet = start(WAITS_FOR_A_STOP, grace_s=2.0)
    fleet.wait_ready()
    os.kill(fleet.node_supervisors()[1], signal.SIGTERM)
    code, _, err = fleet.finish()
    assert code == 1  # ranks 0 and 1 did not end within the grace time
    assert "SIGTERM" in err


def test_ranks_that_do_not_save_in_time_are_killed(start) -> None:
    fleet = start("on_stop(lambda number: None)\nready()\nwhile True: time.sleep(1)", grace_s=1.0)
    fleet.wait_ready()
    fleet.process.terminate()
    code, _, err = fleet.finish()
    assert code == 1
    assert "stopped before the save was done" in err


@pytest.mark.parametrize("which", ["driver", "node"])
def test_no_orphan_after_sigkill(start, which: str) -> None:
    fleet = start("ready()\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\ntime.sleep(60)")
    fleet.wait_ready()
    os.kill(fleet.process.pid if which == "driver" else fleet.node_supervisors()[1], signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: not fleet.remaining())
    assert time.monotonic() - began < 10.0
    code, _, err = fleet.finish()
    if which == "node":
        assert code == 1
        assert "lost node localhost (ranks 2-3)" in err


def test_a_stopped_node_is_missed(start) -> None:
    fleet = start("ready()\ntime.sleep(60)", silence_s=2.0)
    fleet.wait_ready()
    stopped = fleet.node_supervisors()[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    code, _, err = fleet.finish()
    assert time.monotonic() - began < 2.0 + 5.0
    assert code == 1
    assert "no sign of life for 2 s" in err


def test_a_stopped_driver_is_missed_by_the_nodes(start) -> None:
    fleet = start("ready()\ntime.sleep(60)", silence_s=2.0)
    pids = fleet.wait_ready()
    fleet.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    fleet.process.send_signal(signal.SIGCONT)
    assert fleet.finish()[0] == 1
