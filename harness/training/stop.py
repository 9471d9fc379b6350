"""Requests to stop: a signal or a `stop` file sets a flag; ranks agree on it at the next step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from harness.errors import Interrupted
from harness.launch.run_directory import STOP_FILE
from harness.launch.signals import SENT_TO_RANKS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def stopped(step: int) -> Interrupted:
    """What every rank raises once the ranks have agreed to stop and the checkpoint of `step` is committed."""
    what = f"stopped and saved at step {step}" if step else "stopped before the first step"
    return Interrupted(what, hint="run the same command again to go on")


def stopped_while_starting() -> Interrupted:
    return Interrupted("stopped while starting", hint="run the same command again")


class StopRequest:
    """This rank's wish to save and stop. The handler sets a flag; the loop decides when to act."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._is_at_once = False
        self.reason = ""

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """`listen` to what a supervisor listens to, in a process that has none; signals ignored so far stay ignored."""
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in SENT_TO_RANKS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def wanted(self) -> bool:
        """True once a signal arrived or `harness stop` left its file."""
        if not self.reason and self._file.exists():
            self.reason = "harness stop"
        return bool(self.reason)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises Interrupted: work that may take hours and has nothing to save."""
        self._is_at_once = True
        try:
            if self.wanted():
                raise stopped_while_starting()
            yield
        finally:
            self._is_at_once = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if self._is_at_once:
            raise stopped_while_starting()
