"""The process that engines are forked from: as the supervisor sees it, and its own side.

It imports the back end once and waits; each engine is a fork of it, so that an engine after a crash starts without
these imports (docs/adr/0015).

It has one thread, has computed nothing and has not started CUDA, since a fork would break that (docs/adr/0015). Its
control socket receives one byte with the two descriptors of an engine, and sends the engine's pid and, when it has
ended, its exit code, 4 bytes each.
"""

import contextlib
import gc
import os
import signal
import socket
import struct
import subprocess
import sys

from domain.catalog import ModelSpec
from local.lifetime import end_with_parent, ending_with_us
from settings import PREFIX, ROOT

_MESSAGE = struct.Struct(">i")


def _engine_environment() -> dict[str, str]:
    """Ours without the secrets, which the engine does not need."""
    secrets = {PREFIX + name for name in ("DATABASE_URL", "REDIS_URL", "API_KEY", "BOOTSTRAP_API_KEY")}
    ours = {name: value for name, value in os.environ.items() if name not in secrets}
    # OpenMP's threads spin while they wait for each other. When other processes want the cores, too, that makes each
    # step of a small model on a CPU ten times as long.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | ours


class EngineTemplate:
    """A template and its engine, one at most. Dies with the thread that made it."""

    def __init__(self, spec: ModelSpec, *, heartbeat_seconds: float) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "gpu_worker.engine.process", "--spec", spec.model_dump_json()]
            command += ["--control-fd", str(theirs.fileno())]
            command += ["--heartbeat-seconds", str(heartbeat_seconds)]
            self._process = subprocess.Popen(
                ending_with_us(command),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                env=_engine_environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C drains the worker; the engine must outlive that
            )
        self.pid = self._process.pid
        self.engine_pid: int | None = None  # None until `wait` has learnt that it was forked
        self._exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, socket_fd: int, recorder_fd: int) -> None:
        """Ask for an engine, which gets copies of both descriptors. It is forked once the imports are done; the
        previous engine must have ended."""
        self.engine_pid = self._exit_code = None
        with contextlib.suppress(OSError):  # the template is dead, and `wait` says how it died
            socket.send_fds(self._control, [b"f"], [socket_fd, recorder_fd])

    def wait(self, timeout_seconds: float | None) -> int | None:
        """The engine's exit code, or minus the signal that killed it; None while it lives. If the template dies, so
        does its engine, and the template's exit code is returned."""
        self._control.settimeout(timeout_seconds)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while self._exit_code is None:
                self._read()
        return self._exit_code

    def kill_engine(self) -> None:
        """And the template with it, if it has not forked yet."""
        if self.wait(0) is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.engine_pid or self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """The kernel kills the engine with it."""
        self._process.kill()

    def close(self) -> None:
        """Kill it and free what it used."""
        self.kill()
        self._process.wait()
        self._control.close()

    def _read(self) -> None:
        try:
            message = self._control.recv(_MESSAGE.size)
        except ConnectionError:
            message = b""
        if not message:
            self._exit_code = self._process.wait()
        elif self.engine_pid is None:
            (self.engine_pid,) = _MESSAGE.unpack(message)
        else:
            (self._exit_code,) = _MESSAGE.unpack(message)


def fork_engines(control: socket.socket) -> tuple[int, int]:
    """Returns in each engine, with the descriptors of its socket and its recorder. The template itself stays in here,
    forks one engine after the other, and exits when its supervisor hangs up."""
    gc.collect()
    gc.freeze()  # or a collection in an engine would write to every page that it shares with the template
    template_pid = os.getpid()
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not descriptors:
            sys.exit()
        pid = os.fork()
        if pid == 0:
            control.close()
            end_with_parent(template_pid)
            socket_fd, recorder_fd = descriptors
            return socket_fd, recorder_fd
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(_MESSAGE.pack(pid))
        _, status = os.waitpid(pid, 0)
        control.sendall(_MESSAGE.pack(os.waitstatus_to_exitcode(status)))
