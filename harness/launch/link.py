"""What a node supervisor and the driver of a run say to each other: JSON lines over the pipes of ssh or srun.

Driver to node:  start (once), stop, kill, ping.
Node to driver:  hello (once), alive, output, failure, end (once).
"""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from harness.errors import ExitCode
from harness.launch.failures import Failure, NodeEnd

Message = dict[str, Any]
_CHUNK_BYTES = 1 << 16
_MOST_WAITING = 4096
_ALIVE_EVERY_S = 1.0


@dataclass(frozen=True)
class Order:
    """What the driver wants of a node."""

    kind: Literal["start", "stop", "kill", "ping"]
    content: Message

    @property
    def signal(self) -> signal.Signals:
        return signal.Signals[self.content["signal"]]


class Lines:
    """The complete JSON objects that have arrived on a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._partial = b""
        self.is_closed = False
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> Iterator[Message | str]:
        """Objects, and lines that are none (what a login shell or srun prints)."""
        try:
            chunk = os.read(self._descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        self.is_closed = chunk == b""
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            with suppress(ValueError):
                if isinstance(value := json.loads(text), dict):
                    yield value
                    continue
            yield text


class Link:
    """A node supervisor's end of the line. One thread writes, and says every second that this machine is alive."""

    def __init__(self, node: int, reader: int, writer: int) -> None:
        self._node = node
        self._lines = Lines(reader)
        self._writer = writer
        self._heard_at = time.monotonic()
        self.silence_s = float("inf")  # the longest that the driver may be silent
        self.pulses: Message = {}  # of the ranks here, sent along with each sign of life
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._write_all, daemon=True, name="link")
        self._thread.start()

    def fileno(self) -> int:
        return self._lines.fileno()

    @property
    def is_lost(self) -> bool:
        return self._lines.is_closed or time.monotonic() - self._heard_at > self.silence_s

    def orders(self) -> list[Order]:
        found = [
            Order(message["order"], message)
            for message in self._lines.read()
            if isinstance(message, dict) and message.get("node", self._node) == self._node
        ]
        if found:
            self._heard_at = time.monotonic()
        return found

    def hello(self, **facts: Any) -> None:
        self._send("hello", **facts)

    def output(self, descriptor: int, data: bytes) -> None:
        """What rank 0 (descriptor 1) or this supervisor (2) has to say on the user's terminal."""
        self._send("output", descriptor=descriptor, data=base64.b64encode(data).decode())

    def failure(self, failure: Failure | None) -> None:
        self._send("failure", failure=failure and _aged(failure))

    def end(self, end: NodeEnd) -> None:
        self._send("end", end=asdict(end) | {"failure": end.failure and _aged(end.failure)})

    def close(self, patience_s: float = 5.0) -> None:
        with suppress(queue.Full):
            self._waiting.put(None, timeout=patience_s)
        self._thread.join(patience_s)

    def _send(self, event: str, **content: Any) -> None:
        with suppress(queue.Full):
            self._waiting.put_nowait(self._line(event, **content))

    def _write_all(self) -> None:
        while True:
            try:
                line = self._waiting.get(timeout=_ALIVE_EVERY_S)
            except queue.Empty:
                line = self._line("alive", pulses=self.pulses)
            if line is None:
                return
            with suppress(OSError):  # the driver is gone: its silence ends us
                while line:
                    line = line[os.write(self._writer, line) :]

    def _line(self, event: str, **content: Any) -> bytes:
        return encode({"node": self._node, "event": event, **content})


def encode(message: Message) -> bytes:
    return f"{json.dumps(message)}\n".encode()


def read_end(message: Message) -> NodeEnd:
    """The NodeEnd of an `end` message."""
    content = dict(message["end"])
    return NodeEnd(**content | {"failure": content["failure"] and read_failure(content["failure"])})


def read_failure(content: Message) -> Failure:
    """A failure with its time on our clock: clocks of machines differ, so ages are sent."""
    values = dict(content)
    moment = time.time() - values.pop("age_s")
    return Failure(**values | {"exit_code": ExitCode(values["exit_code"]), "time": moment})


def _aged(failure: Failure) -> Message:
    values = asdict(failure)
    age_s = time.time() - values.pop("time")
    return values | {"exit_code": int(failure.exit_code), "age_s": age_s}
