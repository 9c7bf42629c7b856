"""The template process from which engines are forked: the supervisor's handle to it, and the code that runs in it.

The template imports the back end once and then waits. Each engine is a fork of it, so that an engine that replaces a
crashed one need not repeat the imports (docs/adr/0015).

The template has a single thread, has computed nothing and has not initialised CUDA, since neither thread pools nor CUDA
survive a fork. On its control socket it receives, for each engine, one byte with two file descriptors. It answers with
the engine's pid and later with its exit code, 4 bytes each.
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
from local.engine_environments import engine_python
from local.lifetime import end_with_parent, ending_with_us
from settings import PREFIX, ROOT, get_settings

_MESSAGE = struct.Struct(">i")


def _engine_environment() -> dict[str, str]:
    """Our environment without the secrets, which the engine does not need."""
    secrets = {PREFIX + name for name in ("DATABASE_URL", "REDIS_URL", "API_KEY", "BOOTSTRAP_API_KEY")}
    ours = {name: value for name, value in os.environ.items() if name not in secrets}
    # By default, OpenMP's threads spin while they wait for each other. When other processes compete for the cores, a
    # step of a small model on a CPU then takes ten times as long.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | ours


class EngineTemplate:
    """A template process and its engine, of which there is at most one at a time. Both die with the thread that created
    this object."""

    def __init__(self, spec: ModelSpec, *, heartbeat_seconds: float) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            settings = get_settings()
            python = engine_python(spec.python, spec.backend, settings.data_dir)
            # What cannot be run is reported by our own interpreter.
            command = [python if os.access(python, os.X_OK) else sys.executable, "-m", "gpu_worker.engine.child"]
            command += ["--spec", spec.model_dump_json(), "--python", python, "--control-fd", str(theirs.fileno())]
            command += ["--heartbeat-seconds", str(heartbeat_seconds)]
            command += ["--log-level", settings.log_level, "--log-format", settings.log_format]
            self._process = subprocess.Popen(
                ending_with_us(command),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                env=_engine_environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C drains the worker, which needs the engine to stay alive
            )
        self.pid = self._process.pid
        self.engine_pid: int | None = None  # None until `wait` has received it
        self._exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, socket_fd: int, recorder_fd: int) -> None:
        """Request a new engine, which inherits copies of both descriptors. It is forked once the imports are done. The
        previous engine must have ended."""
        self.engine_pid = self._exit_code = None
        with contextlib.suppress(OSError):  # the template is dead; `wait` returns its exit code
            socket.send_fds(self._control, [b"f"], [socket_fd, recorder_fd])

    def wait(self, timeout_seconds: float | None) -> int | None:
        """The engine's exit code, or minus the number of the signal that killed it; None while it lives. If the
        template dies, its engine dies too, and the template's exit code is returned."""
        self._control.settimeout(timeout_seconds)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while self._exit_code is None:
                self._read()
        return self._exit_code

    def kill_engine(self) -> None:
        """Kill the engine, or the template if it has not forked the engine yet."""
        if self.wait(0) is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.engine_pid or self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill the template; the kernel then kills its engine."""
        self._process.kill()

    def close(self) -> None:
        """Kill the template and free its resources."""
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
    """Fork an engine for each request on `control`. Returns only in the engines, with the descriptors of the engine's
    socket and recorder. The template stays in this function and exits when its supervisor closes `control`."""
    gc.collect()
    gc.freeze()  # otherwise, a collection in an engine would write to every page that it shares with the template
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
