"""The template's own side: a process that has imported the back end waits, and each engine is a fork of it.

It has one thread, has computed nothing and has not started CUDA: what a fork would break (docs/adr/0015). On its
control socket comes one byte with the two descriptors of an engine; back go the engine's pid and, when it has ended,
its exit code, 4 bytes each.
"""

import ctypes
import gc
import os
import signal
import socket
import struct
import sys

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

_MESSAGE = struct.Struct(">i")


def fork_engines(control: socket.socket) -> tuple[int, int]:
    """Returns in each engine, with the descriptors of its channel and of its recorder; the template itself stays in
    here, one engine after the other, and exits when its supervisor has hung up."""
    gc.collect()
    gc.freeze()  # a collection in an engine would else write to every page that it shares with the template
    template_pid = os.getpid()
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not descriptors:
            sys.exit()
        pid = os.fork()
        if pid == 0:
            control.close()
            die_with_parent(template_pid)
            channel_fd, recorder_fd = descriptors
            return channel_fd, recorder_fd
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(_MESSAGE.pack(pid))
        _, status = os.waitpid(pid, 0)
        control.sendall(_MESSAGE.pack(os.waitstatus_to_exitcode(status)))


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, however that comes about. So an engine
    ends with its template, and the template with its worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent ended before this process started")
