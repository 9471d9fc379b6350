"""Signals that ask a run to stop: read as bytes from a descriptor, so that a select loop decides when to act."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

SENT_TO_RANKS = {  # a closed terminal is a request to save and stop, too
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGHUP: signal.SIGTERM,
}
_SAME_REQUEST_S = 1.0  # `timeout` and batch systems may deliver one request twice


class StopRequests:
    """The first signal asks the ranks to save and stop; the same one again, later, asks to end them at once."""

    def __init__(self, *, may_insist: bool = True) -> None:
        """`may_insist=False`: a repeated signal changes nothing, for batch systems that repeat theirs and then kill."""
        self.first: signal.Signals | None = None
        self._may_insist = may_insist
        self._first_at = 0.0

    @property
    def sent_to_ranks(self) -> signal.Signals | None:
        return None if self.first is None else SENT_TO_RANKS[self.first]

    def answer_to(self, number: signal.Signals) -> Literal["stop", "kill", "nothing"]:
        if number not in SENT_TO_RANKS:
            return "nothing"
        now = time.monotonic()
        if self.first is None:
            self.first, self._first_at = number, now
            return "stop"
        is_again = number is self.first and now - self._first_at > _SAME_REQUEST_S
        return "kill" if is_again and self._may_insist else "nothing"


@contextmanager
def received_signals() -> Iterator[int]:
    """A descriptor that gives each stop signal and SIGCHLD as a byte; signals ignored so far stay ignored."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = {
        number: signal.signal(number, lambda *_: None)
        for number in (*SENT_TO_RANKS, signal.SIGCHLD)
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
