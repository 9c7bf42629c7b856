"""Python processes that start instantly: forks of a process that has already imported everything.

A worker, an API or an engine's template spends one to three seconds of CPU time on its imports, and the tests start
hundreds. `Nursery.start` runs `python -m MODULE ARGUMENTS` in a fork of a process that has done nothing but imports.
The fork has its own environment and descriptors, and ends on its own; its parent is the nursery.

To start a process, the nursery gets one packet on its socket: JSON, with the descriptors for the process and the one on
which its exit code is sent back in 4 bytes. The nursery answers with the pid in 4 bytes.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NoReturn

from local.lifetime import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
#: All heavy modules that do not read the environment while they are imported, as tasks.app and gpu_worker.app do.
MODULES = (
    "api.server",
    "celery.apps.worker",
    "celery.bin.celery",
    "celeriac.cli",
    "gpu_worker.engine.backends.fake",
    "gpu_worker.engine_process.signs_of_life",
    "gpu_worker.runner",
    "kombu.transport.redis",
    "maintenance.process",
)
#: For engines with real models, and the architectures of the tests' models.
ENGINE_MODULES = (
    "gpu_worker.engine.backends.transformers",
    "gpu_worker.engine_process.signs_of_life",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
#: The variables that an engine's template sets for its imports.
ENGINE_VARIABLES = {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
MAX_PACKET_BYTES = 100_000
MAX_DESCRIPTORS = 16
HIGH_DESCRIPTOR = 500  # above all descriptors that a test passes on

_NUMBER = struct.Struct(">i")
_ENDED_WITH_NURSERY = -signal.SIGKILL


class PreparedProcess:
    """The part of subprocess.Popen's interface that tests need."""

    def __init__(self, pid: int, exit_fd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        # A test may wait for its end while another thread looks whether it has come: both select, one reads.
        self._exit_fd, self._reading = exit_fd, threading.Lock()
        weakref.finalize(self, os.close, exit_fd)

    def poll(self) -> int | None:
        return self._read_exit_code(0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        code = self._read_exit_code(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return code

    def send_signal(self, signal_number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _read_exit_code(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._exit_fd], [], [], timeout)[0]:
            with self._reading:
                if self.returncode is None:
                    said = os.read(self._exit_fd, _NUMBER.size)
                    self.returncode = _NUMBER.unpack(said)[0] if said else _ENDED_WITH_NURSERY
        return self.returncode


class Nursery:
    """A process to fork from. Its forks end when it does."""

    def __init__(self, modules: Iterable[str] = MODULES, variables: Mapping[str, str] = MappingProxyType({})) -> None:
        """`variables` are in its environment during the imports."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.prepared", str(theirs.fileno()), *modules]
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | variables, pass_fds=(theirs.fileno(),), start_new_session=True
            )
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        output: IO[bytes] | int = subprocess.DEVNULL,
        pass_fds: Iterable[int] = (),
        start_new_session: bool = False,
    ) -> PreparedProcess:
        """`output` takes both stdout and stderr."""
        exit_fd, tell_fd = os.pipe()
        numbers = list(pass_fds)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, tell_fd)
            nothing = stack.enter_context(Path(os.devnull).open("r+b"))
            output_fd = nothing.fileno() if output == subprocess.DEVNULL else _descriptor(output)
            asked = {
                "module": module,
                "arguments": list(arguments),
                "environment": dict(environment),
                "numbers": [0, 1, 2, *numbers],
                "start_new_session": start_new_session,
            }
            descriptors = [tell_fd, nothing.fileno(), output_fd, output_fd, *numbers]
            with self._lock:
                socket.send_fds(self._control, [json.dumps(asked).encode()], descriptors)
                (pid,) = _NUMBER.unpack(self._control.recv(_NUMBER.size))
        return PreparedProcess(pid, exit_fd)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@cache
def nursery() -> Nursery:
    """This process's own nursery."""
    nursery = Nursery()
    atexit.register(nursery.close)
    return nursery


@cache
def engine_nursery() -> Nursery:
    """The nursery for engines with real models."""
    nursery = Nursery(ENGINE_MODULES, ENGINE_VARIABLES)
    atexit.register(nursery.close)
    return nursery


def _descriptor(output: IO[bytes] | int) -> int:
    return output if isinstance(output, int) else output.fileno()


# The nursery's own side


def main(control: socket.socket) -> None:
    """Fork on request. Returns in each fork, which then runs its module; the nursery itself exits with its owner."""
    told: dict[int, int] = {}  # by pid: the descriptor for its exit code
    nursery_pid = os.getpid()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([control, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _tell_of_the_ended(told)
        if control not in ready:
            continue
        packet, descriptors, _, _ = socket.recv_fds(control, MAX_PACKET_BYTES, MAX_DESCRIPTORS)
        if not packet:
            for pid in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            end_with_parent(nursery_pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for own in (control, woken, wake):
                own.close()
            for descriptor in told.values():
                os.close(descriptor)
            _become(json.loads(packet), descriptors)
            return
        tell_fd, *others = descriptors
        for descriptor in others:
            os.close(descriptor)
        told[pid] = tell_fd
        control.sendall(_NUMBER.pack(pid))


def _tell_of_the_ended(told: dict[int, int]) -> None:
    while told:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        tell_fd = told.pop(pid)
        with contextlib.suppress(BrokenPipeError):
            os.write(tell_fd, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(tell_fd)


def _become(asked: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Apply the request: descriptors with their numbers, environment, arguments."""
    tell_fd, *given = descriptors
    os.close(tell_fd)
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH_DESCRIPTOR) for descriptor in given]
    for descriptor in given:
        os.close(descriptor)
    for descriptor, number in zip(high, asked["numbers"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if asked["start_new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["module"], *asked["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]  # a worker that restarts itself execs this


def _run() -> NoReturn:
    """Run the module as the interpreter would, but skip its teardown of modules, which takes a quarter of a second."""
    exit_code = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        exit_code = 0
    except SystemExit as exc:
        exit_code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    main(socket.socket(fileno=int(sys.argv[1])))
    _run()
