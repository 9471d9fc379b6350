"""The driver of a run on several machines: starts a supervisor on each, and ends all of them when one fails."""

from __future__ import annotations

import base64
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness.config.launch_schema import LaunchConfig
from harness.errors import ExitCode
from harness.launch import failures
from harness.launch.environment import RankEnvironment
from harness.launch.failures import Failure, NodeEnd, Outcome
from harness.launch.link import Lines, Message, encode, read_end, read_failure
from harness.launch.nodes import Node, first_ranks
from harness.launch.output import Terminal
from harness.launch.signals import StopRequests, received_signals
from harness.launch.supervisor import FAILURE_WAIT_S, TERMINAL_VARIABLE
from harness.launch.watch import PulsesFile

_TICK_S = 1.0
_DEATH_PATIENCE_S = 45.0  # a node gives its own ranks 30 s to die
_CARRIED = (
    "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHON", "HARNESS_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH",
    "TRITON_", "DS_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMP_", "MKL_", "CUDA_HOME",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A command whose pipes lead to the supervisors of these nodes, by their numbers; `has_environment`: it brings our
    variables there by itself, where a container may then have changed them."""

    command: Sequence[str]
    nodes: Sequence[int]
    has_environment: bool = False


def supervise_nodes(
    ways: Sequence[Way],
    nodes: Sequence[Node],
    rank_command: Sequence[str],
    *,
    run_dir: Path,
    launch: LaunchConfig,
    may_insist: bool = True,
) -> Outcome:
    """Run `rank_command` once for each rank of `nodes`; tells how that ended, when nothing is left of it.

    A node that says nothing for `launch.heartbeat_timeout_s` is lost; a node that hears nothing for so long ends its
    ranks itself. The first failure anywhere ends all. Signals as in `supervisor.supervise`. The run directory, the
    working directory and this Python must be there under the same path on every node.
    """
    terminal = Terminal()
    fleet = _Fleet(nodes, rank_command, run_dir, launch, terminal, StopRequests(may_insist=may_insist))
    try:
        with received_signals() as wakeups:
            try:
                fleet.start(ways)
                fleet.wait(wakeups)
            finally:
                fleet.close()
    finally:
        terminal.close()
    return failures.outcome(fleet.ends(), run_dir, num_ranks=sum(node.num_ranks for node in nodes))


def carried_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of this process that ranks elsewhere need; what belongs to this machine stays here."""
    return {name: value for name, value in environ.items() if name.startswith(_CARRIED)}


@dataclass
class _State:
    """What the driver knows of a node."""

    node: Node
    first_rank: int
    heard_at: float = field(default_factory=time.monotonic)
    hello: Message | None = None
    pulses: dict[str, Any] = field(default_factory=dict)
    end: NodeEnd | None = None


@dataclass
class _Channel:
    process: subprocess.Popen[bytes]
    lines: Lines
    way: Way
    last_words: deque[str] = field(default_factory=lambda: deque(maxlen=5))

    def send(self, **order: Any) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone, which its end or its silence tells
            self.process.stdin.write(encode(order))
            self.process.stdin.flush()


class _Fleet:
    def __init__(
        self,
        nodes: Sequence[Node],
        rank_command: Sequence[str],
        run_dir: Path,
        launch: LaunchConfig,
        terminal: Terminal,
        requests: StopRequests,
    ) -> None:
        self.states = [_State(node, first) for node, first in zip(nodes, first_ranks(nodes), strict=True)]
        self.rank_command, self.run_dir, self.launch = rank_command, run_dir, launch
        self.terminal, self.requests = terminal, requests
        self.channels: list[_Channel] = []
        self.is_started = self.is_killing = False
        self.deadline = float("inf")  # monotonic; then the nodes that still run are told to kill their ranks
        self.pulses = PulsesFile(run_dir)

    def start(self, ways: Sequence[Way]) -> None:
        for way in ways:
            process = subprocess.Popen(
                way.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            assert process.stdout is not None
            self.channels.append(_Channel(process, Lines(process.stdout.fileno()), way))

    def wait(self, wakeups: int) -> None:
        """Until every node has ended or is given up."""
        with selectors.DefaultSelector() as selector:
            selector.register(wakeups, selectors.EVENT_READ, lambda: self.on_signals(os.read(wakeups, 4096)))
            for channel in self.channels:
                selector.register(channel.lines, selectors.EVENT_READ, partial(self.on_lines, channel, selector))
                self.watch_errors(channel, selector)
            next_tick = time.monotonic()
            while self.running():
                for key, _ in selector.select(max(0.0, min(self.deadline, next_tick) - time.monotonic())):
                    key.data()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + _TICK_S
                    self.on_tick()
                if time.monotonic() >= self.deadline:
                    if self.is_killing:
                        return
                    self.kill()

    def watch_errors(self, channel: _Channel, selector: selectors.BaseSelector) -> None:
        """What ssh or srun itself says: to the terminal, and kept for the message of a failure."""
        assert channel.process.stderr is not None
        descriptor = channel.process.stderr.fileno()

        def copy() -> None:
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                selector.unregister(descriptor)
            for line in chunk.decode(errors="replace").splitlines():
                channel.last_words.append(line)
                self.terminal.say(line)

        selector.register(descriptor, selectors.EVENT_READ, copy)

    def running(self) -> list[_State]:
        return [state for state in self.states if state.end is None]

    def on_signals(self, numbers: bytes) -> None:
        for number in map(signal.Signals, numbers):
            answer = self.requests.answer_to(number)
            if answer == "kill":
                self.end_within(0.0)
            elif answer == "stop":
                self.terminal.say(f"harness: {number.name}: saving, then stopping")
                self.stop(number)

    def stop(self, number: signal.Signals) -> None:
        self.send_all(order="stop", signal=number.name)
        if self.is_started:
            self.end_within(self.launch.stop_grace_s + FAILURE_WAIT_S)
            return
        for state in self.running():
            state.end = NodeEnd(failure=None, is_interrupted=True, is_requested=True)

    def on_lines(self, channel: _Channel, selector: selectors.BaseSelector) -> None:
        for message in channel.lines.read():
            if isinstance(message, str):
                self.terminal.say(message)
            else:
                self.on_message(message)
        if channel.lines.is_closed:
            selector.unregister(channel.lines)
            self.on_closed(channel)

    def on_message(self, message: Message) -> None:
        state = self.states[message["node"]]
        state.heard_at = time.monotonic()
        event = message["event"]
        if event == "hello":
            state.hello = message
            if all(state.hello is not None for state in self.states) and not self.is_started:
                self.start_ranks()
        elif event == "alive":
            state.pulses = message["pulses"]
        elif event == "output":
            self.terminal.write(base64.b64decode(message["data"]), message["descriptor"])
        elif event == "failure" and message["failure"] is not None:
            self.on_failure(read_failure(message["failure"]))
        elif event == "end":
            state.end = read_end(message)
            if state.end.failure is not None:
                self.end_within(FAILURE_WAIT_S)
            elif state.end.is_interrupted:
                self.end_within(self.launch.stop_grace_s)

    def on_failure(self, failure: Failure) -> None:
        if self.deadline == float("inf"):
            self.terminal.say(f"harness: {failure.what}; the other ranks are being stopped")
        self.end_within(FAILURE_WAIT_S)

    def on_closed(self, channel: _Channel) -> None:
        for number in channel.way.nodes:
            if self.states[number].end is None:
                words = next((word for word in reversed(channel.last_words) if word.strip()), "it said nothing")
                self.lose(self.states[number], f"its connection closed: {words}")

    def lose(self, state: _State, why: str) -> None:
        last = state.first_rank + state.node.num_ranks - 1
        ranks = f"rank {last}" if last == state.first_rank else f"ranks {state.first_rank}-{last}"
        what = f"lost node {state.node.name} ({ranks})"
        if not self.is_started:
            what = f"cannot start on node {state.node.name}"
        failure = Failure(ExitCode.OTHER, f"{what}: {why}", time.time(), is_restartable=self.is_started)
        state.end = NodeEnd(failure=None if self.is_killing else failure, is_killed=self.is_killing)
        self.on_failure(failure)

    def start_ranks(self) -> None:
        versions = {state.hello["version"] for state in self.states if state.hello}
        if versions != {harness.__version__}:
            for state in self.running():
                self.lose(state, f"harness there is {sorted(versions)}, here {harness.__version__}")
            return
        self.is_started = True
        terminal = {}
        if os.isatty(1):
            terminal = {TERMINAL_VARIABLE: "1", "COLUMNS": str(os.get_terminal_size(1).columns)}
        common = {
            "directory": str(Path.cwd()),
            "run_dir": str(self.run_dir.absolute()),
            "command": list(self.rank_command),
            "silence_s": self.launch.heartbeat_timeout_s,
            "launch": self.launch.model_dump(mode="json"),
        }
        for number, state in enumerate(self.states):
            devices = state.node.devices
            own = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices is not None else {}
            ranks = [asdict(rank) for rank in self.ranks_of(state)]
            channel = next(channel for channel in self.channels if number in channel.way.nodes)
            carried = {} if channel.way.has_environment else carried_environment()
            channel.send(order="start", node=number, ranks=ranks, environment=carried | terminal | own, **common)

    def ranks_of(self, state: _State) -> list[RankEnvironment]:
        first = self.states[0]
        assert first.hello is not None
        address = first.node.name
        if self.launch.interface is not None:
            address = first.hello["addresses"].get(self.launch.interface, address)
        world_size = sum(other.node.num_ranks for other in self.states)
        return [
            RankEnvironment(
                rank=state.first_rank + local_rank,
                local_rank=local_rank,
                world_size=world_size,
                local_world_size=state.node.num_ranks,
                master_address=address,
                master_port=first.hello["port"],
            )
            for local_rank in range(state.node.num_ranks)
        ]

    def on_tick(self) -> None:
        self.send_all(order="ping")
        now = time.monotonic()
        patience_s = self.launch.heartbeat_timeout_s if self.is_started else self.launch.timeouts_s.meet or float("inf")
        for state in self.running():
            if now - state.heard_at > patience_s:
                self.lose(state, f"no sign of life for {patience_s:.0f} s")
        self.pulses.update({rank: pulse for state in self.states for rank, pulse in state.pulses.items()})

    def send_all(self, **order: Any) -> None:
        for channel in self.channels:
            channel.send(**order)

    def end_within(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def kill(self) -> None:
        self.is_killing = True
        self.deadline = time.monotonic() + _DEATH_PATIENCE_S
        self.send_all(order="kill")

    def close(self) -> None:
        """End the commands that lead to the nodes; a node whose line closes ends its ranks."""
        for channel in self.channels:
            with suppress(OSError):
                assert channel.process.stdin is not None
                channel.process.stdin.close()
        for channel in self.channels:
            try:
                channel.process.wait(FAILURE_WAIT_S)
            except subprocess.TimeoutExpired:
                channel.process.kill()
                channel.process.wait()
            for pipe in (channel.process.stdout, channel.process.stderr):
                assert pipe is not None
                pipe.close()

    def ends(self) -> list[NodeEnd]:
        return [state.end or NodeEnd(failure=None, is_killed=True) for state in self.states]
