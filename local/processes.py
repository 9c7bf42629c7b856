"""Child processes: starts, watches, restarts them, and stops them in order. None outlives us (local/lifetime.py)."""

import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from local.lifetime import ending_with_us

MAX_LOG_BYTES = 50_000_000
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
MENDING_SECONDS = 300.0  # the pause after an exit code which means that a restart would not help
STEADY_SECONDS = 60.0  # after living this long, a process is restarted as if it had not failed before
MAX_DEATHS_AT_START = 3
SERVER_PORTS = range(15_000, 32_768)  # any of these for a server; from there on Linux has those of outgoing connections
ABORT_SECONDS = 5.0  # how long a process may take to abort before it gets SIGKILL

#: The one thread that starts processes: a process ends with the thread that started it, and this thread ends with us.
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="process-starter")


class ProcessFailed(Exception):
    """A process does not start; the message includes the end of its log."""


@dataclass(eq=False)
class ChildProcess:
    """A child process in a session of its own, whose output goes to a log. Any thread may start it.

    `prepare`, `command` and `environment` are called, in this order, at every start, since a port may have been taken
    in the meantime. `is_ready` is called only while the process is running.
    """

    title: str
    command: Callable[[], list[str]]
    log_path: Path
    folder: Path
    environment: Callable[[], Mapping[str, str]] = lambda: os.environ
    prepare: Callable[[], None] = lambda: None
    is_ready: Callable[[], bool] = lambda: True
    user: str = ""  # the system user that runs it, if not ours
    stop_signal: signal.Signals = signal.SIGTERM  # asks it to finish its work and exit
    stop_seconds: float = 10.0  # how long that may take
    abort_signal: signal.Signals = signal.SIGKILL  # asks it to exit immediately
    orphan_signal: signal.Signals = signal.SIGKILL  # sent by the kernel if we end without stopping it

    popen: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    num_deaths: int = 0  # consecutive ones, each after less than STEADY_SECONDS
    last_words: str | None = None  # the last line of its log, if its exit code means that a restart would not help

    def start(self) -> subprocess.Popen[bytes]:
        self.num_deaths, self.last_words = 0, None
        return self._spawn()

    def start_until_ready(self, *, seconds: float) -> None:
        """Start it and wait until it is ready, restarting it if it ends, since the cause may be temporary. Raises
        ProcessFailed after `seconds`, or after MAX_DEATHS_AT_START attempts."""
        self.start()
        deadline = time.monotonic() + seconds
        while self.num_deaths < MAX_DEATHS_AT_START and time.monotonic() < deadline:
            if self.is_running and self.is_ready():
                return
            self.revive()
            time.sleep(0.02)
        raise ProcessFailed(f"{self.title} does not start; its log ends:\n{self.log_tail()}")

    def revive(self) -> str | None:
        """Check on the process; call this several times a second. If it has ended, returns how, in one line, and plans
        a restart, which a later call carries out. Also keeps its log short."""
        trim_log(self.log_path)
        if self.popen is not None and not self.is_running:
            return self._bury()
        if self.restart_at is not None and time.monotonic() >= self.restart_at:
            self._spawn()
        return None

    @property
    def is_running(self) -> bool:
        if self.popen is None or self.popen.returncode is not None:
            return False
        if self.popen.poll() is None:
            return True
        self._kill_group()  # kill what it has left behind, now, since its pid may soon be reused
        return False

    @property
    def pid(self) -> int | None:
        return self.popen.pid if self.popen is not None else None

    def send(self, signal_number: signal.Signals) -> None:
        if self.popen is not None and self.is_running:
            os.kill(self.popen.pid, signal_number)

    def stop(self) -> None:
        """Stop it with stop_signal, if necessary abort_signal, and finally SIGKILL. Does nothing if it is not
        running."""
        stop_in_turn([[self]])

    def kill(self) -> None:
        """Kill the process and all its children immediately."""
        if self.popen is not None and self.is_running:
            self._kill_group()
            self.popen.wait()
        self.popen = self.restart_at = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def log_has(self, words: bytes) -> bool:
        return self.log_path.exists() and words in self.log_path.read_bytes()

    def log_tail(self) -> str:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return text[-1500:].strip() or "(its log is empty)"

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.started_at, self.restart_at = time.monotonic(), None
        self.prepare()
        trim_log(self.log_path)
        self.popen = _STARTER.submit(self._popen).result()
        return self.popen

    def _popen(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                ending_with_us(self.command(), signal_number=self.orphan_signal, user=self.user),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C is for us; we stop processes in order
            )

    def _bury(self) -> str:
        """Plan the restart of a process that has ended, and return how it ended."""
        assert self.popen is not None
        lived_seconds = time.monotonic() - self.started_at
        self.num_deaths = 1 if lived_seconds > STEADY_SECONDS else self.num_deaths + 1
        return_code, self.popen = self.popen.wait(), None
        self.last_words = self._last_message() if return_code == os.EX_CONFIG else None
        if self.last_words is None:
            backoff_seconds = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** (self.num_deaths - 1))
            ending = f"{describe_exit(return_code)} after {lived_seconds:.0f} s"
        else:
            backoff_seconds, ending = MENDING_SECONDS, f"cannot work: {self.last_words}"
        self.restart_at = time.monotonic() + backoff_seconds
        pause = f"restarting in {backoff_seconds:g} s"
        return f"{self.title} {ending}; {pause}, log: {short_path(self.log_path)}"

    def _last_message(self) -> str:
        """The message in the last line of its log, whichever format that has."""
        line = self.log_tail().splitlines()[-1]
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["message"])
        return line

    def _kill_group(self) -> None:
        assert self.popen is not None
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)


def stop_in_turn(tiers: Iterable[Iterable[ChildProcess]], *, is_hurried: Callable[[], bool] = lambda: False) -> None:
    """Stop one tier of processes after another. In each, ask all to stop, abort those that exceed their stop_seconds
    (or all once `is_hurried`), and kill those that do not end then."""
    for tier in map(list, tiers):
        for process in tier:
            process.restart_at = None
            process.send(process.stop_signal)
        asked_at, aborted_at = time.monotonic(), dict[ChildProcess, float]()
        while running := [process for process in tier if process.is_running]:
            now = time.monotonic()
            for process in running:
                if process in aborted_at:
                    if now - aborted_at[process] > ABORT_SECONDS:
                        process.kill()
                elif is_hurried() or now - asked_at > process.stop_seconds:
                    process.send(process.abort_signal)
                    aborted_at[process] = now
            time.sleep(0.02)
        for process in tier:
            process.kill()  # its remaining children


def free_port(host: str, wanted: int) -> int:
    """The first free port from `wanted` on, or any free port if that is 0. Raises OSError if there is none."""
    for port in range(wanted, min(wanted + 200, 65_536)):
        if is_free(host, port):
            return port if port else _any_port(host)
    raise OSError(
        f"no free port on {host} from {wanted} on; name one in CELERIAC_PORT, _FLOWER_PORT, _MAINTENANCE_PORT or "
        "_WORKER_METRICS_PORT"
    )


def is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: a closing wait is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _any_port(host: str) -> int:
    """Below those of outgoing connections: one of these could have it before the server that it is for."""
    ports = secrets.SystemRandom().sample(SERVER_PORTS, 100)
    if port := next((port for port in ports if is_free(host, port)), None):
        return port
    raise OSError(f"of 100 ports on {host} from {SERVER_PORTS.start} to {SERVER_PORTS.stop - 1} none is free; name one")


def describe_exit(return_code: int) -> str:
    if return_code >= 0:
        return f"exited with code {return_code}"
    return f"was killed by {signal.Signals(-return_code).name}"


def short_path(path: str | Path) -> str:
    """The path relative to the current folder if it is inside it; otherwise, and if it is not a path, unchanged."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def set_aside(log_path: Path) -> None:
    """Rename the log of the last run, so that a new one can begin."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if log_path.exists():
        log_path.replace(log_path.with_suffix(".log.1"))


def trim_log(log_path: Path) -> None:
    """Copy and then empty a log that has grown too long. Its process appends, so it continues at the new end."""
    if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES:
        log_path.with_suffix(".log.1").write_bytes(log_path.read_bytes())
        os.truncate(log_path, 0)
