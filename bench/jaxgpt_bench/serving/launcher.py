"""A process that becomes a command and ends when its parent does, even where that is killed.

    python -I launcher.py PARENT COMMAND [ARGUMENT...]

On Linux the kernel ends it (PR_SET_PDEATHSIG), and it costs nothing. Elsewhere this process stays, starts the
command and looks after the parent twice a second. It runs as a file by itself: standard library only.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
LOOKS_EVERY_S = 0.5


def main(parent: int, command: list[str]) -> int:
    """Run a command; return its exit code where it does not take the place of this process."""
    if sys.platform != "linux" or ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        return watch(parent, command)
    if os.getppid() == parent:  # else it ended before the kernel was told
        os.execvp(command[0], command)
    return 1


def watch(parent: int, command: list[str]) -> int:
    """Run a command as a child, until it ends, this process is asked to, or the parent is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    child = subprocess.Popen(command)
    try:
        while child.poll() is None and os.getppid() == parent:
            time.sleep(LOOKS_EVERY_S)
    finally:
        if child.poll() is None:
            child.terminate()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
