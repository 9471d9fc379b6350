"""The process that starts ranks on this machine, forwards signals to them, and leaves nothing running."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ExitCode
from harness.launch import failures, guard
from harness.launch.environment import STORE_VARIABLE, RankEnvironment
from harness.launch.output import RankOutput, Terminal

TERMINAL_VARIABLE = "HARNESS_TERMINAL"  # set for rank 0 when we write to a terminal: a progress bar is welcome
_TETHER = Path(__file__).with_name("tether.py")
_BARE_PYTHON = (sys.executable, "-I", "-S")
_FORWARDED = {  # a closed terminal is a request to save and stop, too
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}
_SAME_REQUEST_S = 1.0  # `timeout` and batch systems may deliver one request twice
_DEATH_PATIENCE_S = 30.0  # SIGKILL takes this long only for a process stuck in a driver or a file system


def supervise(
    command: Sequence[str],
    ranks: Sequence[RankEnvironment],
    *,
    run_dir: Path,
    stop_grace_s: float = 300.0,
    failure_wait_s: float = 2.0,
) -> ExitCode:
    """Run `command` once for each of `ranks` on this machine and give the exit code of the whole; say why it ended.

    Ranks without a master address meet in a private file store. Their output goes to `run_dir/logs/rank-N.log`, that
    of rank 0 to the terminal too. The first SIGTERM, SIGINT, SIGUSR2 or SIGHUP is forwarded: ranks save, and are killed
    after `stop_grace_s`; the same signal again kills them at once. When a rank fails, the others get `failure_wait_s`
    to fail by themselves and are killed. Whatever happens, even SIGKILL of this process, no descendant of a rank lives
    on. To be called in the main thread.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    failures.clear_error_records(run_dir)
    terminal = Terminal()
    try:
        with _guarded() as private, _signals() as wakeups:
            run = _Supervision(terminal, run_dir, stop_grace_s, failure_wait_s)
            try:
                run.start(command, ranks, private)
                run.wait(wakeups)
            finally:
                run.end(private.token)
    finally:
        terminal.close()
    exit_code, message = run.verdict()
    if message:
        print(message, file=sys.stderr, flush=True)
    return exit_code


@dataclass(frozen=True)
class _Private:
    """What only the processes of this start share."""

    token: str
    directory: Path


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    output: RankOutput
    end: failures.RankEnd | None = None


class _Supervision:
    def __init__(self, terminal: Terminal, run_dir: Path, stop_grace_s: float, failure_wait_s: float) -> None:
        self.terminal, self.run_dir = terminal, run_dir
        self.stop_grace_s, self.failure_wait_s = stop_grace_s, failure_wait_s
        self.ranks: list[_Rank] = []
        self.requested: signal.Signals | None = None
        self.requested_at = 0.0
        self.is_save_cut_short = False
        self.is_killing = False
        self.deadline = float("inf")  # monotonic; then the ranks that still run are killed

    def start(self, command: Sequence[str], ranks: Sequence[RankEnvironment], private: _Private) -> None:
        for rank in ranks:
            process = subprocess.Popen(
                [*_BARE_PYTHON, str(_TETHER), str(os.getpid()), *command],
                env=_rank_variables(rank, private),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert process.stdout is not None
            log_path = self.run_dir / "logs" / f"rank-{rank.rank}.log"
            output = RankOutput(process.stdout, log_path, self.terminal if rank.rank == 0 else None)
            self.ranks.append(_Rank(rank.rank, process, output))

    def wait(self, wakeups: int) -> None:
        """Until every rank has ended, or those that were killed do not die."""
        with selectors.DefaultSelector() as selector:
            selector.register(wakeups, selectors.EVENT_READ)
            for rank in self.ranks:
                selector.register(rank.output, selectors.EVENT_READ, rank.output)
            while running := self.running():
                timeout = None if self.deadline == float("inf") else max(0.0, self.deadline - time.monotonic())
                for key, _ in selector.select(timeout):
                    if key.data is None:
                        for number in os.read(wakeups, 4096):
                            self.on_signal(signal.Signals(number))
                    elif not key.data.copy():
                        selector.unregister(key.fileobj)
                for rank in running:
                    self.reap(rank)
                if time.monotonic() >= self.deadline:
                    if self.is_killing:
                        return
                    self.kill()

    def running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.end is None]

    def on_signal(self, number: signal.Signals) -> None:
        if number not in _FORWARDED:
            return
        if self.requested is None:
            self.requested, self.requested_at = number, time.monotonic()
            self.terminal.say(
                f"harness: {number.name}: saving a checkpoint, then stopping; once more: stopping at once"
            )
            for rank in self.running():
                rank.process.send_signal(_FORWARDED[number])
            self.end_within(self.stop_grace_s)
        elif number is self.requested and time.monotonic() - self.requested_at > _SAME_REQUEST_S:
            self.end_within(0.0)

    def reap(self, rank: _Rank) -> None:
        status = rank.process.poll()
        if status is None:
            return
        rank.end = failures.RankEnd(rank.number, status, time.time(), is_killed_by_us=self.is_killing)
        if self.is_killing or status == ExitCode.DONE:
            return
        if status == ExitCode.INTERRUPTED:
            self.end_within(self.stop_grace_s)
        elif self.running():
            self.terminal.say(f"harness: {failures.describe_end(rank.end)}; the other ranks are being stopped")
            self.end_within(self.failure_wait_s)

    def end_within(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def kill(self) -> None:
        self.is_killing = True
        self.is_save_cut_short = self.requested is not None
        self.deadline = time.monotonic() + _DEATH_PATIENCE_S
        for rank in self.running():
            os.killpg(rank.process.pid, signal.SIGKILL)

    def end(self, token: str) -> None:
        """Kill what is left of the ranks and their descendants, then take their last output."""
        stuck = guard.sweep(token)
        for rank in self.ranks:
            rank.output.close()
        if stuck:
            self.terminal.say(f"harness: these processes do not die (driver or file system stuck): {stuck}")

    def verdict(self) -> tuple[ExitCode, str]:
        """(exit code, message for the user); the first failure decides."""
        ends = [rank.end for rank in self.ranks if rank.end is not None]
        first = failures.first_failure(ends, self.run_dir, requested=self._forwarded())
        details, next_step = "", ""
        if first is not None:
            exit_code, what, details = first.exit_code, first.what, first.details
            next_step = "the other ranks were stopped; " if len(self.ranks) > 1 else ""
        elif self.is_killing:
            why = "stopped before the save was done" if self.is_save_cut_short else "some ranks did not end"
            exit_code, what = ExitCode.OTHER, why
        elif any(end.status == ExitCode.INTERRUPTED for end in ends):
            exit_code, what = ExitCode.INTERRUPTED, "stopped on request, saved"
        else:
            return ExitCode.DONE, ""
        kind = "harness" if exit_code is ExitCode.INTERRUPTED else "error"
        next_step += failures.advice(self.run_dir, exit_code)
        return exit_code, "\n".join([*filter(None, [details]), f"{kind}: {what}", f"  -> {next_step}"])

    def _forwarded(self) -> signal.Signals | None:
        return None if self.requested is None else _FORWARDED[self.requested]


def _rank_variables(rank: RankEnvironment, private: _Private) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    threads = max(1, len(os.sched_getaffinity(0)) // rank.local_world_size)
    variables.setdefault("OMP_NUM_THREADS", str(threads))
    if rank.master_address is None:
        variables[STORE_VARIABLE] = str(private.directory / "store")
    if rank.rank == 0 and os.isatty(1):
        variables[TERMINAL_VARIABLE] = "1"
        variables.setdefault("COLUMNS", str(os.get_terminal_size(1).columns))
    return variables | rank.variables() | {guard.TOKEN_VARIABLE: private.token}


@contextmanager
def _guarded() -> Iterator[_Private]:
    """A private directory and a guard process that clears up after us even if we are killed."""
    private = _Private(token=uuid.uuid4().hex, directory=Path(tempfile.mkdtemp(prefix="harness-")))
    watcher = subprocess.Popen(
        [*_BARE_PYTHON, guard.__file__, private.token, str(private.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    assert watcher.stdin is not None
    try:
        yield private
    finally:
        watcher.stdin.close()
        watcher.wait()


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that gives each stop signal and SIGCHLD as a byte; signals ignored so far stay ignored."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {
        number: signal.signal(number, lambda *_: None)
        for number in (*_FORWARDED, signal.SIGCHLD)
        if number is signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield reader
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_wakeup)
        os.close(reader)
        os.close(writer)
