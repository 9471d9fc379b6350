"""Named places where the fault tests strike; nothing happens unless HARNESS_FAULT names one."""

from __future__ import annotations

import os
import signal

VARIABLE = "HARNESS_FAULT"
_hits: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Send this process SIGKILL if HARNESS_FAULT is `name`; `name:3:SIGTERM` is SIGTERM at the third visit.

    HARNESS_FAULT_RANK limits it to one rank.
    """
    wanted, _, rest = os.environ.get(VARIABLE, "").partition(":")
    if wanted != name or os.environ.get("HARNESS_FAULT_RANK", os.environ.get("RANK")) != os.environ.get("RANK"):
        return
    visit, _, sent = rest.partition(":")
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] == int(visit or 1):
        os.kill(os.getpid(), signal.Signals[sent or "SIGKILL"])
