"""What rank 0 prints: plain lines, and on a terminal a progress bar below them."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from datetime import timedelta

_TERMINAL_VARIABLE = "HARNESS_TERMINAL"  # set by `harness train`, which copies our pipe to its terminal
_REDRAW_S = 0.2
_BAR_CELLS = 24


class Console:
    """Writes to standard output. That it cannot be written to (closed, full disk) is no reason to stop."""

    def __init__(self, first_step: int, total_steps: int | None) -> None:
        self.first_step, self.total_steps = first_step, total_steps
        self.has_bar = os.environ.get(_TERMINAL_VARIABLE) == "1" or sys.stdout.isatty()
        self._bar = ""
        self._started = time.monotonic()
        self._drawn = -_REDRAW_S

    def line(self, text: str) -> None:
        """One whole line; the bar moves below it."""
        self._print(self._wipe() + text + "\n" + self._bar)

    def progress(self, step: int, status: str) -> None:
        """Redraw the bar, at most a few times a second."""
        if self.has_bar and time.monotonic() - self._drawn >= _REDRAW_S:
            bar = self._render(step, status)
            self._print(self._wipe() + bar)
            self._bar, self._drawn = bar, time.monotonic()

    def close(self) -> None:
        """Take the bar away."""
        self._print(self._wipe())
        self._bar = ""

    def position(self, step: int) -> str:
        """`step 1,200/40,000, 3:12:45 left`; the time left counts evaluations and saves too."""
        if self.total_steps is None:
            return f"step {step:,}"
        done, left = step - self.first_step, self.total_steps - step
        if done <= 0 or left <= 0:
            return f"step {step:,}/{self.total_steps:,}"
        seconds = round((time.monotonic() - self._started) / done * left)
        return f"step {step:,}/{self.total_steps:,}, {timedelta(seconds=seconds)} left"

    def _render(self, step: int, status: str) -> str:
        filled = 0 if self.total_steps is None else min(_BAR_CELLS, _BAR_CELLS * step // self.total_steps)
        bar = "#" * filled + "." * (_BAR_CELLS - filled)
        return f"[{bar}] {self.position(step)}  {status}"[: shutil.get_terminal_size().columns - 1]

    def _wipe(self) -> str:
        """Overwrite the bar with spaces: a log file keeps what follows the last carriage return of a line."""
        return f"\r{' ' * len(self._bar)}\r" if self._bar else ""

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: it is closed, or its encoding lacks a letter
            sys.stdout.write(text)
            sys.stdout.flush()
