"""``python tether.py PARENT_PID COMMAND...``: become COMMAND, tied to the parent: when it dies, the kernel kills us.

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
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
