"""Makes child processes end with their parent, however the parent ends. Everything that we start uses this.

On Linux the kernel does it: a process that has called prctl(PR_SET_PDEATHSIG) is sent a signal when the thread that
started it ends. So start it from a thread that lives as long as the parent. The request survives an exec, is not
inherited by a fork, and is cancelled by a change of user. Elsewhere (macOS) a watcher process checks once a second.

Python must not run between a fork and its exec, since another thread may have held any lock during the fork. So
`ending_with_us` puts this file in front of a command: a fresh interpreter changes the user, makes the request, and
execs the command.
"""

import ctypes
import os
import pwd
import signal
import sys
import time
import warnings  # noqa: F401  (execvp needs it, and the other user may be unable to read our Python's files)
from collections.abc import Sequence

PROGRAM = os.path.abspath(__file__)
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # an exec would pass this on to the command


def ending_with_us(command: Sequence[str], *, signal_number: int = signal.SIGKILL, user: str = "") -> list[str]:
    """`command`, wrapped so that it gets the signal when the thread that starts it ends, and runs as another system
    user if one is named."""
    return [sys.executable, "-IS", PROGRAM, str(os.getpid()), str(int(signal_number)), user, *command]


def end_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Arrange for this process to get the signal when its parent ends. Exits if the parent has already ended."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal_number)) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        _start_watcher(parent_pid, signal_number)
    if os.getppid() != parent_pid:  # the parent ended before the request
        sys.exit("the parent ended before this process started")


def _start_watcher(parent_pid: int, signal_number: int) -> None:
    """Fork a watcher, a child in our process group. It ends when this process or its parent ends."""
    pid = os.getpid()
    if os.fork() != 0:
        return
    os.closerange(0, 256)  # inherited open files would make this process look alive
    while os.getppid() == pid:
        if not _is_alive(parent_pid):
            os.kill(pid, signal_number)
            break
        time.sleep(1)
    os._exit(0)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _become(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def main() -> None:
    parent_pid, signal_number, user, *command = sys.argv[1:]
    if user:
        _become(user)
    end_with_parent(int(parent_pid), int(signal_number))
    for ignored in IGNORED_BY_PYTHON:
        signal.signal(ignored, signal.SIG_DFL)
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
