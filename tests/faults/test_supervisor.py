"""The supervisor with small scripts as ranks: who is blamed, what is left running, how fast."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.supervised import wait_until


def test_all_ranks_end_well(start) -> None:
    run = start(
        "assert world_size == 3; print('hello from', rank, os.environ['LOCAL_RANK'], file=sys.stderr)", num_ranks=3
    )
    code, out, err = run.finish()
    assert (code, out, err) == (0, "hello from 0 0\n", "")
    logs = [(run.run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in range(3)]
    assert logs == [f"hello from {rank} {rank}\n" for rank in range(3)]


def test_ranks_meet_in_a_private_file_and_share_the_cores(start) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    try:
        run = start("""
store = pathlib.Path(os.environ["HARNESS_STORE"])
print(oct(store.parent.stat().st_mode)[-3:], "MASTER_ADDR" in os.environ, os.environ["OMP_NUM_THREADS"])
print(os.getsid(0) == os.getpid(), sys.stdin.read() == "")
""")
    finally:
        os.environ["OMP_NUM_THREADS"] = "1"
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run.finish()[:2] == (0, f"700 False {cores}\nTrue True\n")


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("sys.exit(75)", 75, "stopped on request"),
        ("sys.exit(75 if rank else 0)", 75, "stopped on request"),
        ("sys.exit(5 if rank else 0)", 5, "rank 1 ended with exit code 5 before the first step"),
        ("record(message='rows.tsv:7: no target', exit_code=3); sys.exit(3)", 3, "rows.tsv:7: no target"),
        ("sys.exit(3 if rank else 75)", 3, "rank 1 ended with exit code 3"),
        ("sys.exit(99 if rank else 0)", 1, "rank 1 ended with exit code 99"),
        ("if rank: raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("if rank: os.kill(os.getpid(), signal.SIGSEGV)", 1, "rank 1 was killed by SIGSEGV"),
        ("if rank: record(message='bad', exit_code='x'); sys.exit(4)", 1, "bad"),
        ("record(message='m'); os.truncate(run / f'errors/rank-{rank}.json', 9); sys.exit(2)", 2, "with exit code 2"),
    ],
)  # fmt: skip
def test_exit_code_and_message(start, body: str, code: int, message: str) -> None:
    found, _, err = start(body).finish()
    assert found == code
    assert message in err
    assert err.rstrip().splitlines()[-1].startswith("  -> ")
    assert "supervisor.py" not in err


def test_command_that_does_not_exist(start) -> None:
    code, _, err = start("os.execvp('no-such-program', ['no-such-program'])").finish()
    assert code == 1
    assert "FileNotFoundError" in err


def test_killed_rank_is_named_and_others_stopped(start) -> None:
    run = start("ready(); time.sleep(600)", num_ranks=3)
    victim = run.wait_ready()[1]
    (run.run_dir / "metrics.jsonl").write_text(
        '{"event": "step", "step": 12}\n{"event": "evaluation", "step": 12}\n{"ev'
    )
    for name in ("step-00000005", "step-00000010", "step-00000011.partial"):
        (run.run_dir / "checkpoints" / name).mkdir(parents=True)
        (run.run_dir / "checkpoints" / name / "manifest.json").write_text("{}")
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    assert run.process.stderr is not None
    first_line = run.process.stderr.readline().decode()
    assert time.monotonic() - killed_at < 2.0
    assert "rank 1 was killed by SIGKILL; the other ranks are being stopped" in first_line
    code, _, err = run.finish()
    assert time.monotonic() - killed_at < 4.0
    assert code == 1
    assert "rank 1 was killed by SIGKILL after step 12" in err
    assert err.endswith(
        "the other ranks were stopped; run the same command again: it resumes from the checkpoint of step 10\n"
    )
    assert not run.remaining()


def test_earliest_record_wins_over_echoes(start) -> None:
    run = start("""
ready()
if rank == 2:
    time.sleep(0.3)
    record(message="the cause", exit_code=5, step=7, traceback="Traceback of the cause")
    time.sleep(0.5)  # the record is first, the exit is last
    sys.exit(5)
time.sleep(0.5)
record(message="connection closed by peer", exit_code=1)
sys.exit(1)
""", num_ranks=3)  # fmt: skip
    code, _, err = run.finish()
    assert code == 5
    assert "rank 2 after step 7: the cause" in err
    assert "Traceback of the cause" in err
    assert "connection closed" not in err


def test_a_kill_is_the_cause_though_peers_wrote_first(start) -> None:
    run = start("""
if rank == 1:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
record(message="connection closed by peer", exit_code=1)
sys.exit(1)
""")
    assert "rank 1 was killed by SIGKILL" in run.finish()[2]


def test_a_record_of_an_earlier_start_is_forgotten(start) -> None:
    run = start("""
if not (run / "again").exists():
    (run / "again").touch()
    record(message="old", exit_code=5)
    sys.exit(5)
""", num_ranks=1)  # fmt: skip
    assert run.finish()[0] == 5
    again = subprocess.run(
        run.process.args,
        capture_output=True,
        env=os.environ | {"RUN_DIR": str(run.run_dir), "TMPDIR": str(run.private)},
        timeout=20,
    )
    assert (again.returncode, again.stderr) == (0, b"")
    assert not (run.run_dir / "errors" / "rank-0.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP])
def test_signal_is_forwarded_once_and_ranks_save(start, number: signal.Signals) -> None:
    run = start("""
seen = []
on_stop(seen.append)
ready()
while not seen:
    time.sleep(0.01)
time.sleep(0.3)
print("saved after", [signal.Signals(n).name for n in seen])
sys.exit(75)
""")
    run.wait_ready()
    for _ in range(3):  # `timeout` and schedulers may send it more than once
        run.process.send_signal(number)
        time.sleep(0.02)
    code, out, err = run.finish()
    assert code == 75
    name = "SIGTERM" if number is signal.SIGHUP else number.name
    assert out == f"saved after ['{name}']\n"
    assert err.startswith(f"harness: {number.name}: saving, then stopping")
    assert err.rstrip().endswith("run the same command again: it starts from the beginning")


def test_signal_before_the_handlers_are_set_is_an_interruption(start) -> None:
    run = start("ready(); time.sleep(600)")
    run.wait_ready()
    run.process.terminate()
    code, _, err = run.finish()
    assert code == 75
    assert "stopped by SIGTERM while starting" in err


def test_second_signal_stops_at_once(start) -> None:
    run = start("on_stop(lambda n: None); ready()\nwhile True: time.sleep(1)")
    run.wait_ready()
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)  # another kind of request is no repetition
    time.sleep(0.2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    again_at = time.monotonic()
    code, _, err = run.finish()
    assert time.monotonic() - again_at < 2.0
    assert code == 1
    assert "stopped before the save was done" in err
    assert not run.remaining()


def test_rank_that_ignores_the_signal_is_killed_after_the_grace(start) -> None:
    run = start(
        "on_stop(lambda n: None if rank else sys.exit(75)); ready()\nwhile True: time.sleep(1)", stop_grace_s=0.7
    )
    run.wait_ready()
    run.process.terminate()
    asked_at = time.monotonic()
    code, _, err = run.finish()
    assert 0.7 <= time.monotonic() - asked_at < 2.5
    assert code == 1
    assert "stopped before the save was done" in err


GRANDCHILDREN = """
if rank == 0:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", child])
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.DEVNULL)
    if os.fork() == 0:
        time.sleep(600)
ready()
"""


def test_sigkill_of_the_supervisor_leaves_nothing(start) -> None:
    run = start(GRANDCHILDREN + "time.sleep(600)")
    run.wait_ready()
    wait_until(lambda: len(run.remaining()) == 6)  # ranks, their children, the guard
    run.process.kill()
    assert wait_until(lambda: not run.remaining()) < 2.0
    wait_until(lambda: not list(run.private.iterdir()))


def test_ranks_die_with_the_supervisor_even_without_the_guard(start) -> None:
    run = start("ready(); time.sleep(600)")
    ranks = run.wait_ready()
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    (guard,) = {int(child) for child in children} - set(ranks)
    os.kill(guard, signal.SIGKILL)
    run.process.kill()
    assert wait_until(lambda: not run.remaining()) < 2.0
    for directory in run.private.iterdir():
        shutil.rmtree(directory)


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit(5)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_descendants_end_with_the_run(start, ending: str) -> None:
    run = start(GRANDCHILDREN + ending)
    run.finish()
    assert not run.remaining()


def test_ten_megabytes_of_output(start) -> None:
    run = start("""
for index in range(100_000):
    print(f"{rank} {index:06} " + "x" * 92)
print("end", end="")
""")
    code, out, _ = run.finish(60)
    assert code == 0
    assert out.splitlines()[-2:] == ["0 099999 " + "x" * 92, "end"]
    assert len(out) == 100_000 * 102 + 3
    for rank in (0, 1):
        assert (run.run_dir / "logs" / f"rank-{rank}.log").stat().st_size == 100_000 * 102 + 4 - 1


def test_a_terminal_that_takes_nothing_does_not_hold_ranks_up(start) -> None:
    run = start("print('x' * 5_000_000); sys.stdout.flush(); (run / f'done-{rank}').touch(); time.sleep(600)")
    wait_until(lambda: (run.run_dir / "done-0").exists() and (run.run_dir / "done-1").exists())


def test_progress_bar_is_not_in_the_log(start) -> None:
    run = start("""
for percent in range(100):
    sys.stdout.write(f"\\r{percent} %")
sys.stdout.write("\\rdone\\nnext\\r\\n\\r10 %\\r11 %\\nbar\\r   \\rlast\\nbar\\r   \\r")
""", num_ranks=1)  # fmt: skip
    run.finish()
    assert (run.run_dir / "logs" / "rank-0.log").read_text() == "done\nnext\n11 %\nlast\n"


def test_a_terminal_is_told_of(start, tmp_path: Path) -> None:
    run = start("print(rank, os.environ.get('HARNESS_TERMINAL'), os.environ.get('COLUMNS'), os.isatty(1))")
    assert run.finish()[1] == "0 None None False\n"
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (50, 132))
    again = subprocess.Popen(run.process.args, stdout=terminal, env=os.environ | {"TMPDIR": str(run.private)})
    assert again.wait(timeout=20) == 0
    assert os.read(controller, 1000) == b"0 1 132 False\r\n"
    assert (run.run_dir / "logs" / "rank-1.log").read_text() == "1 None None False\n" * 2


def test_the_supervisor_is_idle_and_light(start) -> None:
    run = start("ready(); time.sleep(600)")
    run.wait_ready()
    stat = Path(f"/proc/{run.process.pid}/stat")
    switches = Path(f"/proc/{run.process.pid}/status")

    def voluntary() -> int:
        return int(switches.read_text().split("voluntary_ctxt_switches:")[1].split()[0])

    time.sleep(0.3)
    before = voluntary()
    time.sleep(1.0)
    assert voluntary() - before <= 2
    ticks = sum(int(field) for field in stat.read_text().rpartition(")")[2].split()[11:13])
    assert ticks / os.sysconf("SC_CLK_TCK") < 1.0
    assert "libtorch" not in Path(f"/proc/{run.process.pid}/maps").read_text()
