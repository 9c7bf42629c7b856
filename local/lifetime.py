"""Nothing that we start outlives us, however we end: the one way in which a process ends with its parent.

On Linux the kernel sees to it. A process that asked for it by prctl(PR_SET_PDEATHSIG) is sent a signal when the thread
that started it ends; so start it from a thread that lives as long as you do. An exec keeps the request, a fork does not
inherit it, and a change of user takes it back. Elsewhere (macOS) a watcher looks once a second.

Python must not run between a fork and its exec, since another thread may hold any lock. So `ending_with_us` puts this
file in front of a command: a fresh interpreter changes the user, makes the request, and becomes the command.
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
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)  # which an exec would hand on to the command


def ending_with_us(command: Sequence[str], *, signal_number: int = signal.SIGKILL, user: str = "") -> list[str]:
    """`command`, made to get the signal when the thread that starts it ends; run by another system user if one is
    named."""
    return [sys.executable, "-IS", PROGRAM, str(os.getpid()), str(int(signal_number)), user, *command]


def end_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have this process sent the signal when its parent ends. Exits if it has ended already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal_number)) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        _start_watcher(parent_pid, signal_number)
    if os.getppid() != parent_pid:  # it ended before we had asked
        sys.exit("the parent ended before this process started")


def _start_watcher(parent_pid: int, signal_number: int) -> None:
    """A child of this process, and in its process group. It ends with either of the two."""
    pid = os.getpid()
    if os.fork() != 0:
        return
    os.closerange(0, 256)  # what it held open would look as if this process were alive
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
