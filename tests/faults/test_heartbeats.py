"""Ranks that live but do not get on, as small scripts: found in time, shown where they are, and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from harness.io.heartbeat import PHASES
from tests.supervised import wait_until

HOST = socket.gethostname()
BEATING = """
from harness.io import heartbeat
heartbeat.start()
def work(until=lambda: False, every_s=0.05):
    while not until():
        heartbeat.beat("step")
        time.sleep(every_s)
def stuck_here():
    ready()
    time.sleep(600)
"""


def test_a_stopped_rank_is_found_and_shown_in_time(start) -> None:
    run = start(BEATING + """
heartbeat.beat("step", 12)
ready()
work() if rank else stuck_here()
""", num_ranks=3, heartbeat_timeout_s=2.0)  # fmt: skip
    victim = run.wait_ready()[0]
    os.kill(victim, signal.SIGSTOP)
    stopped_at = time.monotonic()
    code, _, err = run.finish()
    assert time.monotonic() - stopped_at < 2.0 + 5.0
    assert code == 1
    assert f"error: rank 0 on {HOST}, in phase step after step 12, has given no sign of life for" in err
    assert err.index("rank 0 was here:") < err.index(" in stuck_here") < err.index("error: rank 0 on")
    stacks = {path.name: path.read_text() for path in (run.run_dir / "errors").glob("*.stack")}
    assert sorted(stacks) == [f"rank-{rank}.stack" for rank in range(3)]
    assert all("Thread 0x" in stack and " in _stay_alive" in stack for stack in stacks.values())
    assert " in work" in stacks["rank-1.stack"]


def test_the_rank_that_others_wait_for_is_named_with_its_phase_and_the_lock_it_waits_at(start, tmp_path: Path) -> None:
    lock = tmp_path / "extensions" / "py311" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    run = start(BEATING + """
heartbeat.beat("load")
if rank == 1:
    stuck_here()
time.sleep(0.5)
heartbeat.beat("load")
stuck_here()
""", timeouts_s={"load": 2.0}, environment={"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")})  # fmt: skip
    run.wait_ready()
    started_at = time.monotonic()
    code, _, err = run.finish()
    assert time.monotonic() - started_at < 2.0 + 5.0
    assert code == 1
    assert f"error: rank 1 on {HOST}, in phase load, has got no further for" in err
    assert "(launch.timeouts_s.load)" in err
    assert f"a compiler's lock lies in {lock}: remove it if nothing compiles there" in err


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_has_its_own_limit(start, phase: str) -> None:
    run = start(BEATING + f"heartbeat.beat('{phase}', 3); stuck_here()", num_ranks=1, timeouts_s={phase: 0.5})
    code, _, err = run.finish()
    assert code == 1
    assert f"in phase {phase} after step 3, has got no further for" in err


def test_a_rank_that_never_gets_so_far_as_to_beat(start) -> None:
    run = start("time.sleep(600)", num_ranks=2, timeouts_s={"meet": 1.0})
    code, _, err = run.finish()
    assert code == 1
    assert "in phase meet, has got no further for" in err
    assert not list((run.run_dir / "errors").glob("*"))


def test_progress_keeps_a_rank_alive(start) -> None:
    end = "deadline = time.monotonic() + 3; work(lambda: time.monotonic() > deadline)"
    assert start(BEATING + end, timeouts_s={"step": 1.0}, heartbeat_timeout_s=1.5).finish()[0] == 0


def test_a_process_may_take_its_time_to_end(start) -> None:
    """A rank that has said that it ends may be silent, as one that frees hundreds of gigabytes is."""
    end = "heartbeat.beat('save'); heartbeat.stop(); os.kill(os.getpid(), signal.SIGSTOP)"
    run = start(BEATING + end, num_ranks=1, heartbeat_timeout_s=1.0, timeouts_s={"save": 3.0})
    code, _, err = run.finish()
    assert code == 1
    assert "in phase save, has got no further for" in err


def test_a_job_that_is_suspended_whole_goes_on(start) -> None:
    run = start(BEATING + "ready(); work(lambda: (run / 'go').exists())", heartbeat_timeout_s=2.0)
    processes = [run.process.pid, *run.wait_ready()]
    time.sleep(1.5)  # the supervisor is in its rhythm
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    time.sleep(4.0)
    for process in processes:
        os.kill(process, signal.SIGCONT)
    time.sleep(2.5)
    (run.run_dir / "go").touch()
    assert run.finish() == (0, "", "")


def test_ranks_that_do_not_save_in_time_show_where_they_are(start) -> None:
    run = start(BEATING + "on_stop(lambda number: None)\nwhile True: stuck_here()", stop_grace_s=0.5)
    run.wait_ready()
    run.process.terminate()
    code, _, err = run.finish()
    assert code == 1
    assert "stopped before the save was done" in err
    assert " in stuck_here" in (run.run_dir / "errors" / "rank-1.stack").read_text()


def test_pulses_are_there_to_be_read(start) -> None:
    run = start(BEATING + "heartbeat.beat('evaluation', 7); ready(); time.sleep(600)")
    run.wait_ready()
    file = run.run_dir / "pulses.json"
    wait_until(lambda: file.exists() and json.loads(file.read_text())["ranks"]["1"]["step"] == 7)
    pulses = json.loads(file.read_text())
    assert abs(pulses["time"] - time.time()) < 7.0
    for rank in ("0", "1"):
        pulse = pulses["ranks"][rank]
        assert (pulse["host"], pulse["phase"], pulse["step"]) == (HOST, "evaluation", 7)
        assert 0.0 <= pulse["age_s"] < 3.0
        assert 0.0 <= pulse["phase_age_s"] < 15.0


def test_each_rank_has_its_cores_and_variables(start, tmp_path: Path) -> None:
    print_them = """
names = ("MODE", "RANK", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TRITON_CACHE_DIR")
(run / f"seen-{rank}").write_text(json.dumps([sorted(os.sched_getaffinity(0)), *map(os.environ.get, names)]))
"""
    os.environ["SCRATCH"] = str(tmp_path)
    try:
        run = start(
            print_them, bind_cores=True, interface="lo", node_local_dir="$SCRATCH/caches",
            environment={"MODE": "a 'b' \"c\" $d", "RANK": "7"},
        )  # fmt: skip
    finally:
        del os.environ["SCRATCH"]
    assert run.finish() == (0, "", "")
    seen = [json.loads((run.run_dir / f"seen-{rank}").read_text()) for rank in (0, 1)]
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        assert seen[0][0] + seen[1][0] == allowed
    for rank, (_, *values) in enumerate(seen):
        assert values == ["a 'b' \"c\" $d", str(rank), "lo", "lo", f"{tmp_path}/caches/triton"]
