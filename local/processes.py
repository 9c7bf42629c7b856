"""The processes of `celeriac up`: started, watched, restarted with a back-off, stopped in reverse order.

Nothing that was started here outlives us: each process has a guard that waits on a pipe which closes when we end,
however we end, and then stops the process and its children.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MAX_LOG_BYTES = 50_000_000
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
MENDING_SECONDS = 300.0  # before a process is started again that said that a restart is of no use
STEADY_SECONDS = 60.0  # a process that lived this long is restarted as if for the first time
GUARD_SECONDS = 10  # what an orphan gets between TERM and KILL

# $1 is the process, and the group of its children. `read` returns when the pipe closes.
GUARD = (
    'read -r _; kill -s TERM "$1" 2>/dev/null; seconds=0; '
    'while [ "$seconds" -lt "$2" ] && kill -0 "$1" 2>/dev/null; do sleep 1; seconds=$((seconds + 1)); done; '
    'kill -s KILL -- "-$1" 2>/dev/null'
)


@dataclass
class Service:
    """One process of ours. `prepare` is called and `environment` asked at every start: a port may be taken by then."""

    title: str
    command: list[str]
    is_ready: Callable[[], bool]
    log_path: Path
    folder: Path
    environment: Callable[[], dict[str, str]]
    prepare: Callable[[], None] = lambda: None
    stop_seconds: float = 10.0  # what TERM is given before KILL
    hurry_signal: signal.Signals = signal.SIGKILL  # what a second Ctrl-C sends

    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float | None = None
    num_deaths: int = 0  # in a row, each after less than STEADY_SECONDS
    last_words: str | None = None  # why it is of no use to start it again, where it has said so
    _guard: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.started_at, self.restart_at = time.monotonic(), None
        self.prepare()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C is for us; we stop the processes in order
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, "celeriac-guard", str(self.process.pid), str(GUARD_SECONDS)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def bury(self) -> str:
        """After its end: clear away what it left behind, plan the restart, and say how it ended."""
        assert self.process is not None
        self._end_group()
        lived_seconds = time.monotonic() - self.started_at
        self.num_deaths = 1 if lived_seconds > STEADY_SECONDS else self.num_deaths + 1
        return_code, self.process = self.process.wait(), None
        self.last_words = self._last_message() if return_code == os.EX_CONFIG else None
        if self.last_words is None:
            backoff_seconds = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** (self.num_deaths - 1))
            ending = f"{describe_exit(return_code)} after {lived_seconds:.0f} s"
        else:
            backoff_seconds, ending = MENDING_SECONDS, f"cannot work: {self.last_words}"
        self.restart_at = time.monotonic() + backoff_seconds
        pause = f"restarting in {backoff_seconds:g} s"
        return f"{self.title} {ending}; {pause}, log: {short_path(self.log_path)}"

    def begin_stop(self) -> None:
        """Ask it to end; `finish_stop` waits for it."""
        self.restart_at = None
        self.send(signal.SIGTERM)

    def send(self, signal_number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal_number)

    def finish_stop(self) -> None:
        """End it and all its children, now."""
        if self.process is None:
            return
        self._end_group()
        self.process.wait()
        self.process = None

    def log_has(self, words: bytes) -> bool:
        return self.log_path.exists() and words in self.log_path.read_bytes()

    def log_tail(self) -> str:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return text[-1500:].strip() or "(its log is empty)"

    def _last_message(self) -> str:
        """What the last line of its log says, in either format."""
        line = self.log_tail().splitlines()[-1]
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["message"])
        return line

    def _end_group(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None


@dataclass
class Launcher:
    """The services in the order of their start. `say` prints one line."""

    say: Callable[[str], None]
    services: list[Service] = field(default_factory=list)
    is_hurried: Callable[[], bool] = lambda: False

    def restart_the_dead(self) -> None:
        """One look at every service; called several times a second."""
        for service in self.services:
            if service.process is not None and not service.is_running:
                self.say(service.bury())
            if service.restart_at is not None and time.monotonic() >= service.restart_at:
                service.start()
            trim_log(service.log_path)

    def stop(self, tiers: list[list[Service]]) -> None:
        """Tier after tier: TERM, wait as long as the slowest is given, then KILL what is left."""
        for tier in tiers:
            for service in tier:
                service.begin_stop()
            self._wait_for_end(tier)
            for service in tier:
                service.finish_stop()

    def _wait_for_end(self, tier: list[Service]) -> None:
        started_at, hurried_at = time.monotonic(), None
        while running := [service for service in tier if service.is_running]:
            now = time.monotonic()
            if hurried_at is None and self.is_hurried():
                hurried_at = now
                for service in running:
                    service.send(service.hurry_signal)
            if hurried_at is not None and now - hurried_at > FIRST_BACKOFF_SECONDS * 10:
                return
            if all(now - started_at > service.stop_seconds for service in running):
                return
            time.sleep(0.05)


def free_port(host: str, wanted: int) -> int:
    """`wanted` where it is free, else the next free one; any free one for 0."""
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
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def describe_exit(return_code: int) -> str:
    if return_code >= 0:
        return f"exited with code {return_code}"
    return f"was killed by {signal.Signals(-return_code).name}"


def short_path(path: str | Path) -> str:
    """The path as one would type it here; what lies elsewhere, or is no path, as it is."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def set_aside(log_path: Path) -> None:
    """Keep the last run's log under another name, and begin a new one."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    if log_path.exists():
        log_path.replace(log_path.with_suffix(".log.1"))


def trim_log(log_path: Path) -> None:
    """Empty a log that has grown too long; its process appends, so it goes on at the new end."""
    if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES:
        log_path.with_suffix(".log.1").write_bytes(log_path.read_bytes())
        os.truncate(log_path, 0)
