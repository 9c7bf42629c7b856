"""`celeriac up`: everything on this machine, started in order and kept running until Ctrl-C."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from celeriac.client import ApiError, ApiUnreachable, Client
from celeriac.terminal import Board, JobPrinter, first_steps, own_command, plain_console, where_everything_is
from domain.errors import ExpectedError
from local.lock import UpLock
from local.processes import MAX_DEATHS_AT_START, ChildProcess, free_port, is_free, set_aside, short_path, stop_in_turn
from local.servers import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer
from settings import ROOT, Settings

FIRST_PROMPT = "Tell me a story about a brave little fox."
FIRST_MAX_TOKENS = 160
PATIENCE_SECONDS = 30.0  # after this, we name the logs of the parts that are still starting
DRAIN_MARGIN_SECONDS = 15.0  # on top of the worker's own drain: releasing jobs, signing off
API_STOP_MARGIN_SECONDS = 15.0  # on top of the API's own drain: open requests
HEALTHY_SECONDS = 10.0  # the API sees a new worker at its next look, some seconds later
MAINTENANCE_STOP_SECONDS = 25.0  # longer than maintenance waits for the webhooks being sent
LOOPBACK = "127.0.0.1"


class StartFailed(ExpectedError):
    """A part did not start; the message includes the end of its log."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM arrived during the start."""


class Up:
    """One run of `celeriac up`. `run` returns when everything has ended after a request to stop."""

    def __init__(self, settings: Settings, *, with_first_job: bool = True) -> None:
        self._settings = settings
        self._with_first_job = with_first_job
        self._console = plain_console()
        self._begun_at = time.monotonic()
        self._num_stop_requests = 0
        self._stop_requested = threading.Event()
        self._api_port, self._flower_port = settings.port, settings.flower_port
        self._maintenance_port, self._worker_metrics_port = settings.maintenance_port, settings.worker_metrics_port
        self._database_url, self._redis_url = settings.database_url, settings.redis_url
        self._servers: list[EmbeddedServer] = []
        self._services: list[ChildProcess] = []

    def run(self) -> None:
        """Raises AlreadyUp, StartFailed or EmbeddedServerError, after stopping everything again."""
        for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signal_number, self._request_stop)
        self._lock = UpLock(self._settings.data_dir).take()
        try:
            self._start()
            self._lock.write(self._note())
            threading.Thread(target=self._introduce, name="introduce", daemon=True).start()
            self._watch()
        except Stopped:
            pass
        finally:
            self._stop()
            self._lock.release()

    # Starting

    def _start(self) -> None:
        self._say(f"Starting Celeriac in {short_path(self._settings.data_dir)}")
        with Board(self._console) as board:
            self._start_servers(board)
            board.begin("Schema")
            self._migrate()
            board.done("Schema")
            self._lock.write(self._servers_note())  # so that `celeriac keys create` need not wait for a worker
            self._services = self._make_services()
            self._start_services(board)

    def _start_servers(self, board: Board) -> None:
        given, folder = self._settings.model_fields_set, self._settings.data_dir
        if "database_url" not in given:
            self._database_url = self._start_server(board, EmbeddedPostgres(folder / "postgres"))
        if "redis_url" not in given:
            self._redis_url = self._start_server(board, EmbeddedRedis(folder / "redis"))
        elif reason := why_redis_refuses(self._redis_url):
            self._say(f"Redis refuses us: {reason}; check CELERIAC_REDIS_URL. Until it is right, jobs run slowly")

    def _start_server(self, board: Board, server: EmbeddedServer) -> str:
        self._raise_if_stopped()
        self._servers.append(server)
        board.begin(server.title)
        url = server.start()
        board.done(server.title)
        return url

    def _migrate(self) -> None:
        self._raise_if_stopped()
        log_path = self._log_path("migrate")
        set_aside(log_path)
        with log_path.open("wb") as log:
            command, environment = _celeriac("migrate"), self._environment()
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
        if done.returncode != 0:
            raise StartFailed(f"the database could not be migrated; {log_path} ends:\n{log_path.read_text()[-1500:]}")

    def _make_services(self) -> list[ChildProcess]:
        """The services in starting order: the workers first, since they take the longest."""
        workers = [self._make_worker(), *map(self._make_worker, autostarted(self._settings))]
        workers[0].prepare = self._choose_worker_metrics_port  # the others take the next free ones
        api = self._service("API", "api", lambda: bool(self._health()))
        api.prepare = self._choose_api_port
        api.stop_seconds = self._settings.api_drain_seconds + API_STOP_MARGIN_SECONDS
        maintenance = self._service("Maintenance", "maintenance", lambda: bool(_health_of(self._maintenance_url)))
        maintenance.prepare = self._choose_maintenance_port
        maintenance.stop_seconds = MAINTENANCE_STOP_SECONDS
        flower = self._service("Flower", "flower", lambda: not is_free(LOOPBACK, self._flower_port))
        flower.prepare = self._choose_flower_port
        return [*workers, api, maintenance, flower]

    def _make_worker(self, model: str | None = None) -> ChildProcess:
        """The worker that the settings describe, or one more for a model."""
        options = [] if model is None else ["--model", model]
        name = "worker" if model is None else f"worker-{_file_name(model)}"
        if model is not None and self._settings.worker_name is not None:
            options += ["--name", f"{_file_name(model)}-{self._settings.worker_name}"]
        title = "GPU worker" if model is None else f"GPU worker of {model}"
        worker = self._service(title, "worker", lambda: self._has_engine(worker), *options, log_name=name)
        worker.stop_seconds = self._settings.drain_seconds + DRAIN_MARGIN_SECONDS
        worker.abort_signal = signal.SIGQUIT  # gives running jobs back to the queue at once
        return worker

    def _has_engine(self, worker: ChildProcess) -> bool:
        """Whether the worker's engine has started: by its log if INFO is logged, otherwise by the API, which may still
        list the worker of an `up` that was killed seconds ago."""
        if self._settings.log_level in ("DEBUG", "INFO"):
            return any(map(worker.log_has, (b"the engine is ready", b"unloading the model", b"draining, as ordered")))
        return bool(self._health().get("workers"))

    def _service(
        self, title: str, command: str, is_ready: Callable[[], bool], *options: str, log_name: str | None = None
    ) -> ChildProcess:
        log_path = self._log_path(log_name or command)
        set_aside(log_path)
        return ChildProcess(
            title,
            lambda: _celeriac(command, *options),
            log_path,
            ROOT,
            environment=self._environment,
            is_ready=is_ready,
        )

    def _start_services(self, board: Board) -> None:
        waiting = list(self._services)
        for service in waiting:
            board.begin(service.title)
            service.start()
        patient_until = time.monotonic() + PATIENCE_SECONDS
        while waiting:
            self._raise_if_stopped()
            self._revive_the_dead()
            for service in waiting.copy():
                if service.last_words is not None:
                    raise StartFailed(f"{service.title} cannot work: {service.last_words}")
                if service.num_deaths >= MAX_DEATHS_AT_START:
                    raise StartFailed(f"{service.title} does not start; its log ends:\n{service.log_tail()}")
                if service.is_running and service.is_ready():
                    board.done(service.title)
                    waiting.remove(service)
            if time.monotonic() > patient_until:
                patient_until += PATIENCE_SECONDS
                for service in waiting:
                    self._say(f"{service.title} is still starting; its log: {short_path(service.log_path)}")
            self._stop_requested.wait(0.1)

    def _choose_api_port(self) -> None:
        self._api_port = free_port(self._settings.host, self._api_port)

    def _choose_flower_port(self) -> None:
        self._flower_port = free_port(LOOPBACK, self._flower_port)

    def _choose_worker_metrics_port(self) -> None:
        self._worker_metrics_port = free_port(self._settings.worker_metrics_host, self._worker_metrics_port)

    def _choose_maintenance_port(self) -> None:
        self._maintenance_port = free_port(self._settings.maintenance_host, self._maintenance_port)

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "CELERIAC_DATABASE_URL": self._database_url,
            "CELERIAC_REDIS_URL": self._redis_url,
            "CELERIAC_PORT": str(self._api_port),
            "CELERIAC_FLOWER_PORT": str(self._flower_port),
            "CELERIAC_MAINTENANCE_PORT": str(self._maintenance_port),
            "CELERIAC_WORKER_METRICS_PORT": str(self._worker_metrics_port),
            "PYTHONUNBUFFERED": "1",
        }

    # Running

    def _introduce(self) -> None:
        """Show the first job as it runs, then where everything is. Runs on a thread, beside `_watch`."""
        settings = self._settings
        model = first_job_model(settings)
        is_unloaded = model in self._health().get("models_unloaded", ())
        if is_unloaded:
            self._say(f"{model} is unloaded, so its jobs wait; load it with POST /v1/admin/models/{model}/load")
        job_id = self._run_first_job(model) if self._with_first_job and not is_unloaded else None
        reasons = self._wait_until_healthy()
        seconds, folder = time.monotonic() - self._begun_at, short_path(self._settings.data_dir)
        self._say(f"\nCeleriac is up after {seconds:.1f} s. Ctrl-C stops it; jobs and results stay in {folder}.")
        for reason in reasons:
            self._say(f"Not all is well yet: {reason}")
        self._say(
            where_everything_is(
                api_url=self._api_url,
                maintenance_url=self._maintenance_url,
                worker_url=self._worker_url,
                flower_url=self._flower_url,
                logs=short_path(self._settings.data_dir / "logs"),
            )
        )
        celeriac = own_command()
        needs_key = self._settings.auth == "api_key" and not self._settings.api_key
        self._say(first_steps(self._api_url, model, job_id or "job_...", celeriac, needs_key=needs_key))

    def _wait_until_healthy(self) -> list[str]:
        """Wait a moment for the API to have seen the workers. Returns what it still finds missing."""
        patient_until = time.monotonic() + HEALTHY_SECONDS
        while (health := self._health()).get("status") != "ok" and time.monotonic() < patient_until:
            if self._stop_requested.wait(0.1):
                return []
        return list(health.get("reasons", ["the API does not answer"]))

    def _run_first_job(self, model: str) -> str | None:
        """Submit one job and print its text as it arrives. Returns its id, or None if it could not be run."""
        messages = [{"role": "user", "content": FIRST_PROMPT}]
        self._say(f"\nThe first job, through the whole system: {FIRST_PROMPT!r}\n")
        try:
            with self._own_key() as key, Client(self._api_url, key) as client:
                job = client.submit(messages, model=model, max_tokens=FIRST_MAX_TOKENS)
                JobPrinter(self._console, self._console).print_all(client.stream(job.id))
        except (ApiUnreachable, ApiError) as exc:
            self._say(f"the first job did not run: {exc}")
            return None
        return job.id

    @contextmanager
    def _own_key(self) -> Iterator[str | None]:
        """A key for the first job: the configured one, or a new one that is revoked after the job."""
        given = self._settings.api_key or self._settings.bootstrap_api_key
        if given is not None or self._settings.auth == "none":
            yield given
            return
        from celeriac.access_options import transaction
        from storage import tenants
        from storage.tables import DEFAULT_TENANT_ID

        settings = self._settings.model_copy(update={"database_url": self._database_url})
        with transaction(settings) as session:
            key = tenants.create_key(session, DEFAULT_TENANT_ID, name="first job of celeriac up")
        try:
            yield key
        finally:
            with transaction(settings) as session:
                tenants.revoke_key(session, key.split("_")[1], DEFAULT_TENANT_ID)

    def _watch(self) -> None:
        while not self._stop_requested.wait(0.25):
            self._revive_the_dead()

    def _revive_the_dead(self) -> None:
        for process in (*(server.process for server in self._servers), *self._services):
            if ending := process.revive():
                self._say(ending)

    # Stopping

    def _request_stop(self, signal_number: int, frame: FrameType | None) -> None:
        self._num_stop_requests += 1
        self._stop_requested.set()

    def _raise_if_stopped(self) -> None:
        if self._stop_requested.is_set():
            raise Stopped

    def _stop(self) -> None:
        if self._stop_requested.is_set():
            patience = f"running jobs get {self._settings.drain_seconds:.0f} s to finish"
            self._say(f"\nStopping: {patience}; Ctrl-C again puts them back in the queue at once.")
        # The API stops after the workers, so that clients can follow streams to their end.
        api = [service for service in self._services if service.title == "API"]
        others = [service for service in self._services if service.title != "API"]
        stop_in_turn([others, api], is_hurried=lambda: self._num_stop_requests > 1)
        for server in reversed(self._servers):
            server.stop()
        self._say("Stopped.")

    # Where things are

    @property
    def _api_url(self) -> str:
        return f"http://{_reachable(self._settings.host)}:{self._api_port}"

    @property
    def _worker_url(self) -> str:
        return f"http://{_reachable(self._settings.worker_metrics_host)}:{self._worker_metrics_port}"

    @property
    def _maintenance_url(self) -> str:
        return f"http://{_reachable(self._settings.maintenance_host)}:{self._maintenance_port}"

    @property
    def _flower_url(self) -> str:
        prefix = os.environ.get("FLOWER_URL_PREFIX", "").strip("/")  # Flower's own; it answers nowhere else then
        return f"http://{LOOPBACK}:{self._flower_port}" + (f"/{prefix}/" if prefix else "")

    def _health(self) -> dict[str, Any]:
        """The body of the API's /health; empty while the API does not answer."""
        return _health_of(self._api_url)

    def _log_path(self, name: str) -> Path:
        return self._settings.data_dir / "logs" / f"{name}.log"

    def _note(self) -> dict[str, Any]:
        """What other commands in this folder may read (`settings.find_running`)."""
        return {
            **self._servers_note(),
            "api_url": self._api_url,
            "flower_url": self._flower_url,
        }

    def _servers_note(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "database_url": self._database_url,
            "redis_url": self._redis_url,
            "default_model": self._settings.default_model,
        }

    def _say(self, line: str) -> None:
        # Nobody may be reading any more: a closed terminal, or a pipe whose reader has ended (then rich exits).
        with suppress(OSError, SystemExit):
            self._console.print(line, markup=False)


def _reachable(host: str) -> str:
    """The address, as URLs spell it, for connecting to something that listens on `host`."""
    return {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104


def why_redis_refuses(url: str) -> str | None:
    """The reason as Redis or TLS words it: a wrong password, a bad certificate, no answer. None if we can connect."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        with redis.Redis.from_url(
            url, socket_timeout=5, socket_connect_timeout=5, retry=Retry(NoBackoff(), 0)
        ) as client:
            client.ping()
    except (redis.RedisError, OSError) as exc:
        return str(exc)
    return None


def _health_of(url: str) -> dict[str, Any]:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)) as connection:
        try:
            connection.request("GET", "/health")
            return dict(json.loads(connection.getresponse().read()))
        except (OSError, http.client.HTTPException, ValueError):
            return {}


def autostarted(settings: Settings) -> list[str]:
    """The models for which `up` starts a worker of their own: those with `autostart`, unless the settings name the
    models to serve, or the first worker serves them anyway."""
    if settings.worker_models:
        return []
    catalog = settings.load_catalog()
    return [entry.id for entry in catalog if entry.autostart and entry.id != catalog.first.id]


def first_job_model(settings: Settings) -> str:
    """The model of the first job: the default one, unless no worker was started for that. Raises ModelUnavailable."""
    catalog, served = settings.load_catalog(), settings.worker_models
    return served[0] if served and catalog.default_id not in served else catalog.default.id


def _file_name(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", model)


def _celeriac(command: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "celeriac", command, *options]
