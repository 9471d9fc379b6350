"""``python tether.py PARENT_PID CORES COMMAND...``: become COMMAND, tied to the parent.

When the parent dies, the kernel kills us. CORES are the numbers of those to run on, such as ``4,5,6,7``; empty: those
that the parent runs on.

A separate program because Python code between fork and exec can deadlock. Linux only; standard library only.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>; survives exec


def main() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the supervisor died before this rank started")
    if sys.argv[2]:
        os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
