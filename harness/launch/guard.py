"""``python guard.py TOKEN DIRECTORY``: outlives the supervisor and removes what it leaves.

It waits for the end of its standard input, which comes when the supervisor closes it or dies, even of SIGKILL. Then it
kills every process whose environment carries the run's token (ranks and all their descendants, in whatever session)
and removes the private directory. Linux only; standard library only.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

TOKEN_VARIABLE = "HARNESS_RUN_TOKEN"


def processes_of(token: str) -> list[int]:
    """Ids of the living processes that were started with this token (zombies have no environment any more)."""
    needle = f"{TOKEN_VARIABLE}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if needle in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def sweep(token: str, *, patience_s: float = 10.0) -> list[int]:
    """SIGKILL the processes of `token` until none is left; give those that are stuck in the kernel."""
    deadline = time.monotonic() + patience_s
    while (found := processes_of(token)) and time.monotonic() < deadline:
        for process_id in found:
            try:
                os.kill(process_id, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    return found


def main() -> None:
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    token, directory = sys.argv[1:]
    sys.stdin.buffer.read()
    sweep(token)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
