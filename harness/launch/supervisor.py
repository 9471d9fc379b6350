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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from harness.config.launch_schema import LaunchConfig
from harness.errors import ExitCode
from harness.launch import failures, guard
from harness.launch.environment import STORE_VARIABLE, RankEnvironment, configured_variables, share_of_cores
from harness.launch.failures import Failure, NodeEnd, Outcome
from harness.launch.link import Link
from harness.launch.output import RankOutput, Terminal
from harness.launch.signals import SENT_TO_RANKS, StopRequests, received_signals
from harness.launch.watch import PulsesFile, Watch

TERMINAL_VARIABLE = "HARNESS_TERMINAL"  # set for rank 0 when we write to a terminal: a progress bar is welcome
FAILURE_WAIT_S = 2.0  # for ranks to report what they have felt of another one's failure
_TETHER = Path(__file__).with_name("tether.py")
_BARE_PYTHON = (sys.executable, "-I", "-S")
_DEATH_PATIENCE_S = 30.0  # SIGKILL takes this long only for a process stuck in a driver or a file system
_STACK_PATIENCE_S = 1.0  # ranks write their stacks within
_TICK_S = 1.0


def supervise(
    command: Sequence[str],
    ranks: Sequence[RankEnvironment],
    *,
    run_dir: Path,
    launch: LaunchConfig,
) -> Outcome:
    """Run `command` once for each of `ranks` on this machine; tells how that ended, when nothing is left of it.

    Ranks without a master address meet in a private file store. Their output goes to `run_dir/logs/rank-N.log`, that
    of rank 0 to the terminal too. The first SIGTERM, SIGINT, SIGUSR2 or SIGHUP is forwarded: ranks save, and are killed
    after `launch.stop_grace_s`; the same signal again kills them at once. When a rank fails, the others get
    FAILURE_WAIT_S to fail by themselves and are killed; a rank whose heartbeat is too old has failed. Whatever
    happens, even SIGKILL of this process, no descendant of a rank lives on. To be called in the main thread.
    """
    terminal = Terminal()
    try:
        end = supervise_node(command, ranks, run_dir=run_dir, terminal=terminal, launch=launch)
    finally:
        terminal.close()
    return failures.outcome([end], run_dir, num_ranks=len(ranks))


def supervise_node(
    command: Sequence[str],
    ranks: Sequence[RankEnvironment],
    *,
    run_dir: Path,
    terminal: Terminal,
    launch: LaunchConfig,
    link: Link | None = None,
) -> NodeEnd:
    """`supervise` for a machine that may be one of several: then the driver at the other end of `link` may give orders,
    and is told at once of the first failure here."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    failures.set_aside_records(run_dir, [rank.rank for rank in ranks])
    with _guarded() as private, received_signals() as wakeups:
        node = _Supervision(terminal, run_dir, launch, Watch(private.directory, launch), link)
        try:
            node.start(command, ranks, private)
            node.wait(wakeups)
        finally:
            node.end(private.token)
        with suppress(BlockingIOError):
            node.on_signals(os.read(wakeups, 4096))  # a request that came meanwhile: no restart
    return node.result()


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
    def __init__(
        self,
        terminal: Terminal,
        run_dir: Path,
        launch: LaunchConfig,
        watch: Watch,
        link: Link | None,
    ) -> None:
        self.terminal, self.run_dir, self.watch, self.link = terminal, run_dir, watch, link
        self.launch, self.pulses = launch, PulsesFile(run_dir)
        self.ranks: list[_Rank] = []
        self.requests = StopRequests(may_insist=link is None)
        self.late: Failure | None = None  # of the rank whose heartbeat is too old
        self.late_rank = -1
        self.wants_stacks = True  # before ranks are killed
        self.is_killing = False
        self.deadline = float("inf")  # monotonic; then the ranks that still run are killed

    def start(self, command: Sequence[str], ranks: Sequence[RankEnvironment], private: _Private) -> None:
        cores = sorted(os.sched_getaffinity(0))
        for rank in ranks:
            own_cores = ",".join(map(str, share_of_cores(cores, rank))) if self.launch.bind_cores else ""
            process = subprocess.Popen(
                [*_BARE_PYTHON, str(_TETHER), str(os.getpid()), own_cores, *command],
                env=_rank_variables(rank, self.launch, private) | self.watch.begin(rank.rank),
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
            selector.register(wakeups, selectors.EVENT_READ, lambda: self.on_signals(os.read(wakeups, 4096)))
            if self.link is not None:
                selector.register(self.link, selectors.EVENT_READ, lambda: self.on_orders(selector))
            for rank in self.ranks:
                selector.register(rank.output, selectors.EVENT_READ, partial(self.copy, rank.output, selector))
            next_tick = time.monotonic()
            while running := self.running():
                timeout = min(self.deadline, next_tick) - time.monotonic()
                for key, _ in selector.select(max(0.0, timeout)):
                    key.data()
                for rank in running:
                    self.reap(rank)
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + _TICK_S
                    self.on_tick()
                if time.monotonic() >= self.deadline:
                    if self.is_killing:
                        return
                    if self.wants_stacks and self.ask_for_stacks():
                        self.deadline = time.monotonic() + _STACK_PATIENCE_S
                    else:
                        self.kill()

    def copy(self, output: RankOutput, selector: selectors.BaseSelector) -> None:
        if not output.copy():
            selector.unregister(output)

    def running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.end is None]

    def on_tick(self) -> None:
        self.watch.look(rank.number for rank in self.running())
        late = self.watch.late()
        if late and self.late is None and not self.is_killing:
            self.on_late(*late)
        if self.link is not None:
            self.link.pulses = self.watch.shown()
            if self.link.is_lost:
                self.end_at_once()
        else:
            self.pulses.update(self.watch.shown())

    def on_late(self, rank: int, what: str) -> None:
        self.late_rank = rank
        self.late = Failure(ExitCode.OTHER, what, time.time(), is_restartable=True)
        if self.link is not None:
            self.link.failure(self.late)
        else:
            self.terminal.say(f"harness: {what}; the ranks are being stopped")
        self.end_within(0.0)

    def on_signals(self, numbers: bytes) -> None:
        for number in map(signal.Signals, numbers):
            answer = self.requests.answer_to(number)
            if answer == "kill":
                self.end_at_once()
            elif answer == "stop":
                once_more = "; once more: stopping at once" if self.link is None else ""
                self.terminal.say(f"harness: {number.name}: saving, then stopping{once_more}")
                self.stop_ranks(number)

    def on_orders(self, selector: selectors.BaseSelector) -> None:
        assert self.link is not None
        for order in self.link.orders():
            if order.kind == "kill":
                self.end_within(0.0)
            elif order.kind == "stop" and self.requests.answer_to(order.signal) == "stop":
                self.stop_ranks(order.signal)
        if self.link.is_lost:
            selector.unregister(self.link)
            self.end_at_once()

    def stop_ranks(self, number: signal.Signals) -> None:
        for rank in self.running():
            rank.process.send_signal(SENT_TO_RANKS[number])
        self.end_within(self.launch.stop_grace_s)

    def reap(self, rank: _Rank) -> None:
        status = rank.process.poll()
        if status is None:
            return
        rank.end = failures.RankEnd(rank.number, status, time.time(), is_killed_by_us=self.is_killing)
        if self.is_killing or status == ExitCode.DONE:
            return
        if status == ExitCode.INTERRUPTED:
            self.end_within(self.launch.stop_grace_s)
            return
        if self.link is not None:
            self.link.failure(self.result().failure)
        elif self.running():
            self.terminal.say(f"harness: {failures.describe_end(rank.end)}; the other ranks are being stopped")
        self.end_within(FAILURE_WAIT_S)

    def end_within(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def end_at_once(self) -> None:
        self.wants_stacks = False
        self.end_within(0.0)

    def ask_for_stacks(self) -> bool:
        """Have the ranks that still run, stopped ones too, write where they are; False if none of them can."""
        self.wants_stacks = False
        asked = [rank for rank in self.running() if self.watch.answers(rank.number)]
        for rank in asked:
            rank.process.send_signal(signal.SIGQUIT)  # before it goes on
            rank.process.send_signal(signal.SIGCONT)
        return bool(asked)

    def keep_stacks(self) -> None:
        stacks = {rank.number: self.watch.stack(rank.number) for rank in self.running()}
        failures.write_stacks(self.run_dir, stacks)
        if self.late is not None and stacks.get(self.late_rank):
            where = f"rank {self.late_rank} was here:\n{failures.main_stack(stacks[self.late_rank])}"
            self.late = replace(self.late, details=where)

    def kill(self) -> None:
        self.is_killing = True
        self.deadline = time.monotonic() + _DEATH_PATIENCE_S
        self.keep_stacks()
        for rank in self.running():
            os.killpg(rank.process.pid, signal.SIGKILL)

    def end(self, token: str) -> None:
        """Kill what is left of the ranks and their descendants, then take their last output."""
        stuck = guard.sweep(token)
        for rank in self.ranks:
            rank.output.close()
        if stuck:
            self.terminal.say(f"harness: these processes do not die (driver or file system stuck): {stuck}")

    def result(self) -> NodeEnd:
        ends = [rank.end for rank in self.ranks if rank.end is not None]
        is_well = not self.running() and all(end.status in (ExitCode.DONE, ExitCode.INTERRUPTED) for end in ends)
        late = None if is_well else self.late  # a stopped rank that was woken for its stack may have gone on to its end
        return NodeEnd(
            failure=failures.first_failure(ends, self.run_dir, requested=self.requests.sent_to_ranks, late=late),
            is_interrupted=any(end.status == ExitCode.INTERRUPTED for end in ends),
            is_killed=self.is_killing,
            is_requested=self.requests.first is not None,
        )


def _rank_variables(rank: RankEnvironment, launch: LaunchConfig, private: _Private) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    variables |= configured_variables(launch)
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
