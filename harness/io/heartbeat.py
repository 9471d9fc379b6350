"""Signs of life of a rank, in a small file that its supervisor reads; without HARNESS_HEARTBEAT nobody reads them.

The main thread tells what it is doing (`beat`), a thread of its own tells that the process is not stopped. Standard
library only.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

VARIABLE = "HARNESS_HEARTBEAT"
Phase = Literal["meet", "prepare", "load", "step", "evaluation", "save"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Cells: TypeAlias = "memoryview[float]"

_ALIVE_EVERY_S = 0.5
_ALIVE, _SINCE, _PHASE, _STEP = range(4)  # float64 each, so that one store writes one; times of CLOCK_MONOTONIC
_NUM_BYTES = 4 * 8
_thread: threading.Thread | None = None
_is_ended = threading.Event()


class Pulse(NamedTuple):
    """What a rank does and for how long. `alive_age_s` is None before `start` and after `stop`; `step` is the last
    optimizer step that it has done since it was started."""

    alive_age_s: float | None
    phase_age_s: float
    phase: Phase
    step: int | None


def create(path: Path) -> Cells:
    """The file of a rank that is about to be started, to be read from now on: in phase `meet`."""
    path.write_bytes(bytes(_NUM_BYTES))
    cells = _mapped(path)
    cells[_SINCE] = time.monotonic()
    return cells


def start() -> None:
    """From now on this process shows that it lives, in the file that HARNESS_HEARTBEAT names, and answers SIGQUIT with
    the stacks of its threads in `stack_file` of it."""
    global _cells, _thread
    if not os.environ.get(VARIABLE):
        return
    path = Path(os.environ[VARIABLE])
    _cells = _mapped(path)
    faulthandler.register(signal.SIGQUIT, file=stack_file(path).open("w"))
    _thread = threading.Thread(target=_stay_alive, args=[_cells], daemon=True, name="heartbeat")
    _thread.start()


def beat(phase: Phase, step: int | None = None) -> None:
    """The main thread has come this far; `step` is the optimizer step just done (None: no other than before)."""
    _cells[_SINCE] = time.monotonic()
    _cells[_PHASE] = PHASES.index(phase)
    if step is not None:
        _cells[_STEP] = step


def stop() -> None:
    """This process ends: freeing its memory may take longer than a process may be silent."""
    _is_ended.set()
    if _thread is not None:
        _thread.join()


def last_step() -> int | None:
    """The last optimizer step that this process has done."""
    return int(_cells[_STEP]) or None


def read(cells: Cells) -> Pulse:
    """The pulse of the process of this machine whose file `create` has made; it may have been deleted since."""
    # A writer stores the time first: a phase that is read before its time never looks older than it is.
    step, phase = int(cells[_STEP]), PHASES[int(cells[_PHASE])]
    since, alive, now = cells[_SINCE], cells[_ALIVE], time.monotonic()
    return Pulse(max(0.0, now - alive) if alive else None, max(0.0, now - since), phase, step or None)


def stack_file(path: Path) -> Path:
    """Beside a heartbeat file: where its process writes the stacks of its threads when it gets SIGQUIT."""
    return path.with_suffix(".stack")


def _stay_alive(cells: Cells) -> None:
    while not _is_ended.is_set():
        cells[_ALIVE] = time.monotonic()
        _is_ended.wait(_ALIVE_EVERY_S)
    cells[_ALIVE] = 0.0


def _mapped(path: Path) -> Cells:
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), _NUM_BYTES)).cast("d")


_cells = memoryview(bytearray(_NUM_BYTES)).cast("d")  # until `start`: nobody reads them
