"""Requests to stop: a signal or a `stop` file sets a flag; ranks agree on it at the next step."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """This rank's wish to save and stop. The handler only sets a flag; the loop decides when to act."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self.reason = ""

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def wanted(self) -> bool:
        """True once a signal arrived or `harness stop` left its file."""
        if not self.reason and self._file.exists():
            self.reason = "harness stop"
        return bool(self.reason)

    def clear(self) -> None:
        """Forget a request of an earlier start of the run."""
        self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name
