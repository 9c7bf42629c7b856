"""The whole system as real processes: PostgreSQL, Redis, APIs, GPU workers, maintenance; whatever dies is restarted.

A `Part` remembers all its incarnations and pauses, so that a checker can tell later who was alive when. Times are those
of the wall clock, which is also the database's: it is one machine.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

import httpx
import psutil
import psycopg
import redis

from local.lifetime import ending_with_us
from local.processes import free_port
from local.servers import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer
from settings import ROOT
from storage.database import migrate
from tests.prepared import PreparedProcess, nursery
from tests.waiting import wait_until

RESTART_SECONDS = 0.3
START_SECONDS = 60.0


Process = subprocess.Popen[bytes] | PreparedProcess
Start = Callable[[list[str], Mapping[str, str], IO[bytes], Path], Process]


def start_python(arguments: list[str], environment: Mapping[str, str], log: IO[bytes], folder: Path) -> Process:
    """`python -m ARGUMENTS` in a folder. It ends with the thread that starts it."""
    return subprocess.Popen(
        ending_with_us([sys.executable, "-m", *arguments]),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )


def start_prepared(arguments: list[str], environment: Mapping[str, str], log: IO[bytes], folder: Path) -> Process:
    """The same without its imports, for tests that are not about how long a start takes."""
    assert folder == ROOT, "the nursery has imported this tree"
    module, *others = arguments
    return nursery().start(module, others, environment=environment, output=log, start_new_session=True)


@dataclass(slots=True)
class Incarnation:
    """One process of a part, from its start to its end."""

    process: Process
    started_at: float
    ended_at: float | None = None
    pauses: list[tuple[float, float | None]] = field(default_factory=list)

    @property
    def times(self) -> tuple[float, float | None, list[tuple[float, float | None]]]:
        """Its start, its end, its pauses."""
        return self.started_at, self.ended_at, self.pauses

    def was_well(self, since: float, until: float) -> bool:
        """It lived and was not paused at any moment between the two."""
        lived = self.started_at <= since and (self.ended_at is None or self.ended_at >= until)
        return lived and all(end is not None and (end < since or begin > until) for begin, end in self.pauses)


class Part:
    """One kind of process in its place: started, paused, killed, started again."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        environment: Mapping[str, str],
        log_path: Path,
        folder: Path,
        start: Start = start_python,
    ) -> None:
        self.name = name
        self.incarnations: list[Incarnation] = []
        self.is_held = False  # not to be started again
        self._arguments = arguments
        self.start_process = start
        self.environment = dict(environment)
        self.log_path = log_path
        self._folder = folder
        self._restart_at = 0.0

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            process = self.start_process(self._arguments, self.environment, log, self._folder)
        self.incarnations.append(Incarnation(process, time.time()))

    def __repr__(self) -> str:
        return self.name

    @property
    def newest(self) -> Incarnation:
        return self.incarnations[-1]

    @property
    def pid(self) -> int:
        return self.newest.process.pid

    @property
    def is_running(self) -> bool:
        return bool(self.incarnations) and self.newest.process.poll() is None

    @property
    def is_paused(self) -> bool:
        return bool(self.newest.pauses) and self.newest.pauses[-1][1] is None

    def watch(self) -> None:
        """Start it again a moment after its end."""
        if self.is_running:
            return
        if self.newest.ended_at is None:
            self._bury()
            self._restart_at = time.time() + RESTART_SECONDS
        if time.time() >= self._restart_at and not self.is_held:
            self.start()

    def send(self, signal_number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.newest.process.send_signal(signal_number)

    def kill(self) -> None:
        """The main process alone; what it leaves behind is cleared away as an init system would."""
        self.send(signal.SIGKILL)
        self.newest.process.wait()
        self._bury()
        self._restart_at = time.time() + RESTART_SECONDS

    def pause(self) -> None:
        if not self.is_paused:
            self.newest.pauses.append((time.time(), None))
            self.send(signal.SIGSTOP)

    def resume(self) -> None:
        if self.is_paused:
            self.send(signal.SIGCONT)
            begin, _ = self.newest.pauses.pop()
            self.newest.pauses.append((begin, time.time()))

    def engine_pid(self) -> int | None:
        """Of a worker's engine process, the child of its template."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children():
                if "gpu_worker.engine.child" in child.cmdline():
                    return next((engine.pid for engine in child.children()), None)
        return None

    def close(self) -> None:
        self.is_held = True
        if self.is_running:
            self.kill()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _bury(self) -> None:
        if self.newest.ended_at is None:
            self.newest.ended_at = time.time()
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class Plant:
    """`worker_models` names the model of each worker; `models` is the text of models.toml; `settings` are variables
    without their prefix. `root` is the source tree that runs: a mutant's, where one is tried."""

    def __init__(
        self,
        folder: Path,
        *,
        models: str,
        worker_models: Mapping[str, str],
        num_apis: int = 1,
        settings: Mapping[str, object] | None = None,
        root: Path = ROOT,
        start: Start = start_python,
    ) -> None:
        self.folder = folder
        self.root = root
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.redis = EmbeddedRedis(folder / "redis", port=free_port("127.0.0.1", 0))
        self.apis: list[Part] = []
        self.workers: list[Part] = []
        self.maintenance: list[Part] = []
        self.api_urls: list[str] = []
        self._worker_models = dict(worker_models)
        self._num_apis = num_apis
        self._start = start
        self._settings = {f"CELERIAC_{name.upper()}": str(value) for name, value in (settings or {}).items()}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "models.toml").write_text(models)

    def start_servers(self) -> None:
        self.postgres.start()
        self.redis.start()
        migrate(self.postgres.url)

    def start_parts(
        self, *, database_url: Callable[[str], str] | None = None, redis_url: Callable[[str], str] | None = None
    ) -> None:
        """`database_url` and `redis_url` say by a part's name where it finds the servers; by default, directly."""
        self._database_url = database_url or self.database_url
        self._redis_url = redis_url or (lambda name: self.redis.url)
        for number in range(1, self._num_apis + 1):
            port = free_port("127.0.0.1", 0)
            self.api_urls.append(f"http://127.0.0.1:{port}")
            self.apis.append(self._part(f"api-{number}", "api", "--port", str(port)))
        for name, model in self._worker_models.items():
            self.workers.append(self._part(name, "worker", "--name", name, "--model", model))
        self.maintenance.append(self._part("maintenance", "maintenance"))
        for part in self.parts:
            part.start()

    def database_url(self, name: str) -> str:
        """Straight to the server; the name is what SQL knows the connection by."""
        return f"{self.postgres.url}&application_name={name}"

    @property
    def parts(self) -> list[Part]:
        return [*self.apis, *self.workers, *self.maintenance]

    def watch(self) -> None:
        """One look at every process; several times a second."""
        for part in self.parts:
            part.watch()

    def wait_until_ready(self) -> None:
        """Every API answers and every worker takes jobs."""
        what = f"the system starts; its logs are in {self.folder / 'logs'}"
        wait_until(self._is_ready, what, seconds=START_SECONDS, pause_seconds=0.1)

    def _is_ready(self) -> bool:
        self.watch()
        return self._num_ready_workers() >= len(self.workers) and all(map(_answers, self.api_urls))

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """To the real server, past everything that goes wrong on purpose."""
        return psycopg.connect(self.postgres.url_of(self.postgres.database), autocommit=True)

    def redis_client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.redis.url, socket_timeout=5)

    # The servers

    def restart_postgres(self) -> None:
        """As after a crash: connections gone, recovery from the log."""
        _kill(self.postgres, signal.SIGQUIT)
        self.postgres.start()

    def restart_redis(self, *, is_emptied: bool) -> None:
        _kill(self.redis, signal.SIGKILL)
        if is_emptied:
            shutil.rmtree(self.redis.folder / "data", ignore_errors=True)
        self.redis.start()

    def pids_of(self, server: EmbeddedServer) -> list[int]:
        """The server's processes; each of PostgreSQL's is a group of its own."""
        assert server.pid is not None
        process = psutil.Process(server.pid)
        return [process.pid, *(child.pid for child in process.children(recursive=True))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for part in self.parts:
            part.close()
        for server in (self.redis, self.postgres):
            with suppress(psutil.NoSuchProcess, TypeError):
                send_to(self.pids_of(server) if server.is_running else [], signal.SIGCONT)
            server.stop()

    def _part(self, name: str, *arguments: str) -> Part:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CELERIAC_")}
        environment |= (
            {"CELERIAC_LOG_FORMAT": "text", "CELERIAC_DATA_DIR": str(self.folder / "data")}
            | self._settings
            | {
                "CELERIAC_DATABASE_URL": self._database_url(name),
                "CELERIAC_REDIS_URL": self._redis_url(name),
                "CELERIAC_CALLBACK_BROKER_URL": self.redis.url,
                "CELERIAC_MODELS_FILE": str(self.folder / "models.toml"),
                "PYTHONPATH": str(self.root),
                "OMP_NUM_THREADS": "1",  # many small processes share the machine
            }
        )
        log_path = self.folder / "logs" / f"{name}.log"
        return Part(name, ["celeriac", *arguments], environment, log_path, self.root, self._start)

    def _num_ready_workers(self) -> int:
        try:
            queues = httpx.get(f"{self.api_urls[0]}/v1/queue", timeout=5).json()["data"]
        except (httpx.HTTPError, ValueError, KeyError):
            return 0
        return sum(queue["workers"] for queue in queues)


def send_to(pids: Iterable[int], signal_number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def host_and_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def _kill(server: EmbeddedServer, signal_number: signal.Signals) -> None:
    if server.pid is not None:
        send_to([server.pid], signal_number)
    server.stop()  # waits for its end, and clears away what watched it


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
