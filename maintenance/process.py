"""The maintenance process: janitor, batches, webhooks, pulls of models and erasures, and a port for health and metrics.

The clocks are tasks of one event loop. Blocking work runs on each clock's own thread, so a clock that hangs or fails
does not stop the others. None of them needs Redis to tick. Any number of these processes may run, since rows are
locked, skipped and fenced in SQL. Each process also records in SQL when its clocks last ticked, so that the API can
report clocks that do not tick in any process.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from time import monotonic, time
from uuid import uuid4

import redis
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from api.connections import BoundedHttp, open_socket
from domain.clocks import skew_seconds, told_skew
from domain.jobs import AttemptOutcome
from domain.troubles import Trouble
from maintenance.archive import Archiver
from maintenance.batches import BatchWork
from maintenance.callbacks import CallbackPublisher
from maintenance.erasing import Eraser
from maintenance.janitor import Janitor
from maintenance.model_pulls import ModelPuller
from maintenance.webhooks import WebhookSender
from metrics import Process, maintenance_seconds_since_last_tick, registries
from observability import EventLoopMonitor, configure_logging, describe_exception, lost_lines
from settings import Settings
from storage import processes
from storage.database import async_session_factory, open_async_database, open_database, session_factory
from storage.maintenance import CLOCKS, record_ticks
from storage.processes import ProcessKind, ProcessReport
from tasks import job_log
from tasks.webhook_http import TargetGuard
from text.models import ModelViews, follow_models

log = logging.getLogger(__name__)

REDIS_TIMEOUT_SECONDS = 1.0
TELL_SECONDS = 3.0  # how often the last ticks are recorded in SQL
PATIENCE_SECONDS = 5.0  # after this long without a database, the log explains what to do
PAUSE_SECONDS = 5.0  # before a failed sender is restarted
STOP_SECONDS = 20.0  # how long current ticks and deliveries may take at the end before they are abandoned


class Clock:
    """When something periodic last happened."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_ticked = False
        self._at = monotonic()
        maintenance_seconds_since_last_tick.labels(name).set_function(lambda: self.seconds_since_last_tick)

    def tick(self) -> None:
        self.has_ticked, self._at = True, monotonic()

    @property
    def seconds_since_last_tick(self) -> float:
        """Seconds since the last tick, or since the start if there has been none."""
        return monotonic() - self._at


class Maintenance:
    """One run of the process, on one event loop: `run` returns after `stop`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = asyncio.Event()
        self._archiver: Archiver | None = None
        self._janitor: Janitor | None = None
        self._skew_seconds = 0.0  # by how much the database's clock is ahead of ours
        name = f"maintenance {os.getpid()} on {socket.gethostname()}"
        self._report = ProcessReport(uuid4(), ProcessKind.MAINTENANCE, name, version("celeriac"))
        self.clocks = tuple(map(Clock, CLOCKS))
        self.janitor, self.batches, self.webhooks = self.clocks

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> bool:
        """Run until `stop`. False if something hung and was abandoned."""
        settings = self._settings
        catalog = settings.load_catalog()
        job_log.begin([entry.id for entry in catalog.entries], [AttemptOutcome.LOST, AttemptOutcome.STALLED])
        views = await asyncio.to_thread(ModelViews, catalog)
        following = asyncio.create_task(follow_models(views))
        database = open_async_database(
            settings.database_url, pool_size=2, max_overflow=2, idle_seconds=settings.idle_transaction_seconds
        )
        sessions = async_session_factory(database)
        sync_database = _open(settings)
        janitor = self._janitor = Janitor(
            session_factory(sync_database), _redis_client(settings), catalog, settings, on_tick=self.janitor.tick
        )
        batches = BatchWork(session_factory(sync_database), views, settings, on_turn=self.batches.tick)
        puller = ModelPuller(session_factory(sync_database))
        eraser = Eraser(sync_database, settings.archive_url)
        work = [
            asyncio.create_task(self._keep_ticking(self.janitor.name, janitor.tick)),
            asyncio.create_task(self._keep_ticking(self.batches.name, batches.tick, at_the_end=batches.close)),
            asyncio.create_task(self._keep_ticking("model-pulls", puller.tick, at_the_end=puller.close)),
            asyncio.create_task(self._keep_ticking("erasures", eraser.tick)),
            asyncio.create_task(self._keep_sending(sessions)),
            asyncio.create_task(self._keep_telling(sessions)),
        ]
        if settings.archive_url:
            self._archiver = Archiver(sync_database, settings.archive_url)
            work.append(asyncio.create_task(self._keep_ticking("archive", self._archiver.tick)))
        await self._stopping.wait()
        following.cancel()
        _, hanging = await asyncio.wait(work, timeout=STOP_SECONDS)
        if hanging:
            log.error("maintenance exits although some work is hanging", extra={"num_hanging": len(hanging)})
            return False
        await database.dispose()
        sync_database.dispose()
        return True

    async def _keep_ticking(
        self, name: str, tick: Callable[[], object], *, at_the_end: Callable[[], None] = lambda: None
    ) -> None:
        """Call `tick` at every interval, and again immediately if it returns True."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        while not self._stopping.is_set():
            started = monotonic()
            is_hurried = False
            try:
                is_hurried = await loop.run_in_executor(thread, tick) is True
            except asyncio.CancelledError:
                raise
            except BaseException as exc:  # an outermost loop; a panic in a Rust library is not an Exception
                log.exception("%s failed; retrying at the next tick: %s", name, describe_exception(exc))
            if not is_hurried:
                await self._rest(self._settings.janitor_interval_seconds - (monotonic() - started))
        await loop.run_in_executor(thread, at_the_end)
        thread.shutdown()

    async def _keep_sending(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        guard = TargetGuard(self._settings)
        while not self._stopping.is_set():
            sender = WebhookSender(sessions, guard, CallbackPublisher(self._settings), on_round=self.webhooks.tick)
            stop = asyncio.create_task(_afterwards(self._stopping.wait(), sender.stop))
            try:
                await sender.run()
            except Exception as exc:  # an outermost loop: current deliveries become due again
                log.exception("webhooks failed, will restart: %s", describe_exception(exc))
                await self._rest(PAUSE_SECONDS)
            finally:
                stop.cancel()

    async def _keep_telling(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        """Record in SQL when each clock last ticked, so that one that hangs is noticed there."""
        started, is_known = monotonic(), False
        while not self._stopping.is_set():
            ages = {clock.name: clock.seconds_since_last_tick for clock in self.clocks if clock.has_ticked}
            try:
                async with sessions.begin() as session:
                    await session.run_sync(record_ticks, ages)
                    asked_at = time()
                    clock = await session.run_sync(processes.beat, self._report, self._troubles())
                    self._skew_seconds = skew_seconds(clock, asked_at, time())
                is_known = True
            except Exception as exc:  # an outermost loop: the clocks go on and are recorded later
                if not is_known and monotonic() - started > PATIENCE_SECONDS:
                    is_known = True  # logged once
                    log.error(
                        "maintenance is waiting for its database: %s; start it, run `celeriac migrate`, name another "
                        "in "
                        "CELERIAC_DATABASE_URL, or start everything with `celeriac up`; trying again",
                        describe_exception(exc),
                    )
            await self._rest(TELL_SECONDS)
        with contextlib.suppress(SQLAlchemyError, OSError):
            async with sessions.begin() as session:
                await session.run_sync(processes.forget, self._report.id)

    def _troubles(self) -> dict[str, str]:
        found = {}
        if self._archiver is not None and self._archiver.trouble is not None:
            found[Trouble.ARCHIVE.value] = self._archiver.trouble
        if (lost := lost_lines()) is not None:
            found[Trouble.LOG.value] = f"its log takes no lines: {lost}"
        if self._janitor is not None and (away := self._janitor.redis_trouble) is not None:
            found[Trouble.REDIS.value] = away
        if (skew := told_skew(self._skew_seconds)) is not None:
            found[Trouble.CLOCK.value] = skew
        return found

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._stopping.wait()


def create_app(clocks: tuple[Clock, ...], silence_seconds: float) -> Starlette:
    """What the port serves: /health, which is 503 if a clock has not ticked for `silence_seconds`, and /metrics."""

    def health(_: Request) -> Response:
        ages = {clock.name: round(clock.seconds_since_last_tick, 3) for clock in clocks}
        is_well = max(ages.values()) <= silence_seconds
        content = {"status": "ok" if is_well else "unhealthy", "seconds_since_last_tick": ages}
        return JSONResponse(content, 200 if is_well else 503)

    def metrics(_: Request) -> Response:
        return Response(generate_latest(registries[Process.MAINTENANCE]), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/health", health), Route("/metrics", metrics)])


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the server does not decide when the process ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises OSError if the port is taken."""
    configure_logging(settings.log_level, settings.log_format)
    if not asyncio.run(_serve(settings)):
        logging.shutdown()
        os._exit(1)  # the interpreter would wait for the hanging thread


async def _serve(settings: Settings) -> bool:
    maintenance = Maintenance(settings)
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, maintenance.stop)
    with open_socket(settings.maintenance_host, settings.maintenance_port) as listening:
        app = create_app(maintenance.clocks, settings.maintenance_silence_seconds)
        server = Server(uvicorn.Config(app, http=BoundedHttp, ws="none", lifespan="off", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        host, port = listening.getsockname()[:2]
        log.info("maintenance is ready; health and metrics on http://%s:%s", host, port)
        async with EventLoopMonitor():
            has_ended = await maintenance.run()
        server.should_exit = True
        await serving
    return has_ended


async def _afterwards(first: Awaitable[object], then: Callable[[], None]) -> None:
    await first
    then()


def _open(settings: Settings) -> Engine:
    return open_database(
        settings.database_url, pool_size=2, max_overflow=2, idle_seconds=settings.idle_transaction_seconds
    )


def _redis_client(settings: Settings) -> redis.Redis:
    return redis.Redis.from_url(
        settings.redis_url,
        socket_timeout=REDIS_TIMEOUT_SECONDS,
        socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
