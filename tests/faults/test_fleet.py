"""The driver of several machines and what becomes of its nodes and their ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.supervised import wait_until

WAITS_FOR_A_STOP = "on_stop(lambda number: sys.exit(75))\nready()\ntime.sleep(60)"


def test_ranks_of_two_nodes_know_their_places_and_one_meeting_point(start_fleet) -> None:
    fleet = start_fleet("""
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
def test_the_first_failure_of_any_node_ends_all(start_fleet, body: str, code: int, message: str) -> None:
    found, _, err = start_fleet(body).finish()
    assert found == code
    assert message in err
    assert err.rstrip().splitlines()[-1].startswith("  -> ")


def test_of_two_failing_nodes_the_first_is_told(start_fleet) -> None:
    fleet = start_fleet("""
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
def test_one_signal_to_the_driver_reaches_every_rank_once(start_fleet, sent: signal.Signals) -> None:
    fleet = start_fleet("""
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


def test_a_signal_to_one_node_supervisor_alone_reaches_its_ranks(start_fleet) -> None:
    """As Slurm does at a preemption. The ranks of a real run agree; here only those of that node end."""
    fleet = start_fleet(WAITS_FOR_A_STOP, stop_grace_s=2.0)
    fleet.wait_ready()
    os.kill(fleet.node_supervisors()[1], signal.SIGTERM)
    code, _, err = fleet.finish()
    assert code == 1  # ranks 0 and 1 did not end within the grace time
    assert "SIGTERM" in err


def test_ranks_that_do_not_save_in_time_are_killed(start_fleet) -> None:
    fleet = start_fleet("on_stop(lambda number: None)\nready()\nwhile True: time.sleep(1)", stop_grace_s=1.0)
    fleet.wait_ready()
    fleet.process.terminate()
    code, _, err = fleet.finish()
    assert code == 1
    assert "stopped before the save was done" in err


@pytest.mark.parametrize("which", ["driver", "node"])
def test_no_orphan_after_sigkill(start_fleet, which: str) -> None:
    fleet = start_fleet("ready()\nsubprocess.Popen(['sleep', '60'], start_new_session=True)\ntime.sleep(60)")
    fleet.wait_ready()
    os.kill(fleet.process.pid if which == "driver" else fleet.node_supervisors()[1], signal.SIGKILL)
    began = time.monotonic()
    wait_until(lambda: not fleet.remaining())
    assert time.monotonic() - began < 10.0
    code, _, err = fleet.finish()
    if which == "node":
        assert code == 1
        assert "lost node localhost (ranks 2-3)" in err


def test_a_stopped_node_is_missed(start_fleet) -> None:
    fleet = start_fleet("ready()\ntime.sleep(60)", heartbeat_timeout_s=2.0)
    fleet.wait_ready()
    stopped = fleet.node_supervisors()[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    code, _, err = fleet.finish()
    assert time.monotonic() - began < 2.0 + 5.0
    assert code == 1
    assert "no sign of life for 2 s" in err


def test_a_stopped_driver_is_missed_by_the_nodes(start_fleet) -> None:
    fleet = start_fleet("ready()\ntime.sleep(60)", heartbeat_timeout_s=2.0)
    pids = fleet.wait_ready()
    fleet.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    fleet.process.send_signal(signal.SIGCONT)
    assert fleet.finish()[0] == 1
