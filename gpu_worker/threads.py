"""How the worker's threads talk to each other, and two threads that wait on behalf of others.

`RunnerEvent` is what the runner reports, `EngineMeter` turns the figures of its engines into metrics, `Mailbox` lets
other threads call one that waits on sockets.

`StorageThread` does everything that waits for SQL or Redis. Calls run in order, and each is repeated until it is
answered. The runner relies on the order: a crash report follows the commit of the last chunks before the crash, a
release the commit before it. While the database is away, the queue stands still and the engine continues.

`DispatchRequester` runs a dispatch after room has been made, off the critical path: at most fifty times a second.
"""

import logging
import queue
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from threading import Event, Thread
from time import monotonic
from typing import Generic, TypeVar
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy.exc import SQLAlchemyError

import metrics
from domain.catalog import ModelSpec
from domain.jobs import JobStatus, WorkerState
from gpu_worker.engine_process.frames import EngineStats
from observability import describe_exception
from settings import Settings
from storage.database import OUTAGES, open_database, session_factory
from tasks.dispatch import dispatch

log = logging.getLogger(__name__)


class RunnerEventKind(StrEnum):
    CLAIMED = "claimed"  # the claim is committed in SQL: ack the message, send task-started
    DROPPED = "dropped"  # there was nothing to claim (done, cancelled, another owner): ack the message, forget it
    ENDED = "ended"  # terminal in SQL: send task-succeeded, task-failed or task-revoked by `status`
    REFUSED = "refused"  # no jobs are taken at the moment: put the message back into its queue, forget it
    RELEASED = "released"  # given back to the queue, or lost to another owner: forget it, without a final Celery event


@dataclass(frozen=True, slots=True)
class RunnerEvent:
    """What happened to one job: CLAIMED, later ENDED or RELEASED; or only DROPPED or REFUSED.

    Jobs that the runner claimed straight from SQL, without a delivery, are reported, too. If such a job's message
    arrives while it is already running here, CLAIMED is reported a second time.
    """

    kind: RunnerEventKind
    job_id: UUID
    status: JobStatus | None = None  # of ENDED
    runtime_seconds: float = 0.0
    summary: str = ""  # of ENDED: "12 tokens, stop" or the error code; never text of the job


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why a worker cannot continue: one line, with the remedy if it is known."""

    reason: str
    is_lasting: bool = False  # a worker that is restarted right away would fail in the same way


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """Figures for Flower, /health and the credit. Any thread."""

    max_num_seqs: int
    num_running: int  # claimed and not yet ended
    num_offered: int  # in hand, not claimed yet
    is_engine_ready: bool
    state: WorkerState
    tokens_per_second: float
    engine: dict[str, float]


class EngineMeter:
    """Adds up what one engine after the other counts from 0: to the metrics nothing has happened between them."""

    def __init__(self, model: str) -> None:
        self.stats = EngineStats()  # of the engine that runs, as it said last
        self._counted = EngineStats()  # how much of that is in the counters
        self._counters = {
            "num_steps": metrics.engine_steps_total.labels(model),
            "num_preemptions": metrics.engine_preemptions_total.labels(model),
            "num_prompt_tokens": metrics.engine_computed_prompt_tokens_total.labels(model),
            "num_prefix_cache_queries": metrics.engine_prefix_cache_queried_tokens_total.labels(model),
            "num_prefix_cache_hits": metrics.engine_prefix_cache_hit_tokens_total.labels(model),
        }
        self._gauges = {
            "num_running": metrics.engine_sequences_running.labels(model),
            "num_waiting": metrics.engine_sequences_waiting.labels(model),
            "cache_usage": metrics.engine_kv_cache_usage_ratio.labels(model),
            "memory_bytes": metrics.engine_memory_bytes.labels(model),
        }

    def count(self) -> None:
        """Bring the metrics up to date."""
        for name, counter in self._counters.items():
            counter.inc(max(0, getattr(self.stats, name) - getattr(self._counted, name)))
        for name, gauge in self._gauges.items():
            gauge.set(getattr(self.stats, name))
        self._counted = self.stats

    def forget_engine(self) -> None:
        """It has ended; the next one begins at 0."""
        self.count()
        self.stats = self._counted = EngineStats()
        self.count()


class Mailbox:
    """`post` may be called from any thread, everything else only from the owner's."""

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], None]] = deque()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        """Readable once something was posted."""
        return self._ours.fileno()

    def post(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        try:
            self._theirs.send(b"!")
        except OSError:
            pass  # full: the owner has been woken already; or closed: there is nobody to wake

    def run_all(self) -> None:
        """Run everything that was posted so far, in order."""
        try:
            while self._ours.recv(4096):
                pass
        except BlockingIOError:
            pass
        while self._callbacks:
            self._callbacks.popleft()()

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


T = TypeVar("T")

FIRST_RETRY_SECONDS = 0.05

MAX_RETRY_SECONDS = 1.0

STOP_PATIENCE_SECONDS = 5.0  # how long the last calls may wait for an absent database

HUNG_SECONDS = 5.0  # how long to wait for the current call: a frozen server never answers


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What a call returned. `sent_at` is the monotonic time at which its last try began."""

    value: T
    sent_at: float


class StorageThread:
    """`post` passes a callback to the thread that owns this object."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = Event()
        self._stop_deadline = float("inf")
        self._thread = Thread(target=self._run, name="job-storage", daemon=True)
        self.is_away = False  # whether the database does not answer at the moment

    def start(self) -> None:
        self._thread.start()

    def submit(
        self,
        call: Callable[[bool], T],
        on_done: Callable[[Answer[T]], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Run `call(is_repeated)` after all earlier calls. `is_repeated` says that an earlier try may have taken effect
        although no answer came. `on_done` or `on_error` is posted; without `on_error`, errors are logged."""

        def run() -> None:
            try:
                answer = self._until_answered(call)
            except Exception as exc:
                self._report(exc, on_error)
            else:
                self._post(lambda: on_done(answer))

        self._calls.put(run)

    def stop(self) -> None:
        """End after the calls submitted so far; if an outage holds them up, give them up after a while. Blocks."""
        self._stop_deadline = monotonic() + STOP_PATIENCE_SECONDS
        self._stopping.set()
        self._calls.put(None)
        self._thread.join(STOP_PATIENCE_SECONDS + HUNG_SECONDS)

    def _run(self) -> None:
        while (run := self._calls.get()) is not None:
            run()

    def _until_answered(self, call: Callable[[bool], T]) -> Answer[T]:
        wait_seconds, is_repeated = FIRST_RETRY_SECONDS, False
        while True:
            sent_at = monotonic()
            try:
                value = call(is_repeated)
            except OUTAGES as exc:
                if monotonic() > self._stop_deadline:
                    raise
                if not self.is_away:
                    log.warning("the database does not answer; retrying: %s", describe_exception(exc))
                self.is_away = is_repeated = True
                self._wait(wait_seconds)
                wait_seconds = min(2 * wait_seconds, MAX_RETRY_SECONDS)
            else:
                if self.is_away:
                    log.info("the database answers again")
                self.is_away = False
                return Answer(value, sent_at)

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            Event().wait(FIRST_RETRY_SECONDS)  # stopping: try more often

    def _report(self, exc: Exception, on_error: Callable[[Exception], None] | None) -> None:
        if on_error is None:
            log.error("a storage call failed", exc_info=exc)
            return
        self._post(lambda: on_error(exc))


PAUSE_SECONDS = 0.02

PAUSE_AFTER_FAILURE_SECONDS = 1.0  # the janitor dispatches every second anyway

REDIS_TIMEOUT_SECONDS = 0.2


class DispatchRequester:
    """`request` from any thread; requests during a dispatch become one more after it. Its connections are its own, and
    its thread closes them: a dispatch may outlast everything else of a runner that stops."""

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        self._spec = spec
        self._settings = settings
        self._database = open_database(
            settings.database_url, pool_size=1, max_overflow=0, idle_seconds=settings.idle_transaction_seconds
        )
        self._sessions = session_factory(self._database)
        self._client = redis.Redis.from_url(
            settings.redis_url,
            socket_timeout=REDIS_TIMEOUT_SECONDS,
            socket_connect_timeout=REDIS_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._requested = Event()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="dispatch-requester", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request(self) -> None:
        self._requested.set()

    def stop(self) -> None:
        """Returns at once; a dispatch in progress may end later."""
        self._stopping.set()
        self._requested.set()

    def _run(self) -> None:
        while self._requested.wait() and not self._stopping.is_set():
            self._requested.clear()
            self._stopping.wait(PAUSE_SECONDS if self._dispatch() else PAUSE_AFTER_FAILURE_SECONDS)
        self._client.close()
        self._database.dispose()

    def _dispatch(self) -> bool:
        try:
            dispatch(self._sessions, self._client, self._spec, self._settings)
        except (RedisError, SQLAlchemyError, OSError) as exc:
            log.warning("a dispatch failed; the janitor will make up for it: %s", describe_exception(exc))
            return False
        return True
