"""How the worker's threads talk to each other, and two threads that do blocking work for the runner.

The runner reports to the pool with `RunnerEvent`s. `EngineMeter` turns the engine's statistics into metrics. `Mailbox`
lets other threads run callbacks on a thread that waits on sockets.

`StorageThread` makes every call that waits for PostgreSQL or Redis. Calls run in the order in which they were
submitted, and each is retried until the database answers. The runner relies on this order: a crash is recorded after
the chunks that preceded it, and a job is released after its last commit. During a database outage calls wait in the
queue while the engine keeps generating.

`DispatchRequester` runs a dispatch on a thread of its own when the worker has freed room, at most fifty times a second.
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
from typing import Any, Generic, TypeVar
from uuid import UUID

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
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
    CLAIMED = "claimed"  # the claim is committed in SQL: send task-received and task-started
    SPENT = "spent"  # a ticket has been used for a claim, whether it found a job or not: ack it
    ENDED = "ended"  # terminal in SQL: send task-succeeded, task-failed or task-revoked by `status`
    REFUSED = "refused"  # a ticket that is not needed, since the worker is not taking jobs: requeue it
    RELEASED = "released"  # requeued, or lost to another owner: forget it without a final Celery event


@dataclass(frozen=True, slots=True)
class RunnerEvent:
    """One step in a job's life on this worker, CLAIMED and then ENDED or RELEASED; or the end of a ticket, SPENT or
    REFUSED."""

    kind: RunnerEventKind
    job_id: UUID  # of a ticket: the ticket's id
    status: JobStatus | None = None  # set for ENDED
    runtime_seconds: float = 0.0
    summary: str = ""  # set for ENDED: "12 tokens, stop", or the error code; never the job's text


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why the worker cannot continue. `reason` is one line and includes the remedy if it is known."""

    reason: str
    is_lasting: bool = False  # a worker restarted right away would fail the same way
    is_of_model: bool = False  # the worker can go on with its other models


@dataclass(frozen=True, slots=True)
class RunnerStats:
    """Figures for Flower, /health and the consumer's credit. Immutable, so any thread may read them."""

    max_num_seqs: int
    num_running: int  # jobs claimed and not yet ended
    num_occupied: int  # slots taken, of which jobs whose end is being stored have none any more
    num_offered: int  # tickets in hand that have not been used yet
    is_engine_ready: bool
    state: WorkerState
    is_resting: bool  # after claims that failed: it takes no tickets
    tokens_per_second: float
    engine: dict[str, Any]


class EngineMeter:
    """Turns the statistics of successive engines, each of which counts from 0, into counters that only increase."""

    def __init__(self, model: str) -> None:
        self.stats = EngineStats()  # the current engine's latest report
        self._counted = EngineStats()  # the part of it that the counters already include
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
        """Bring the metrics up to date with `stats`."""
        for name, counter in self._counters.items():
            counter.inc(max(0, getattr(self.stats, name) - getattr(self._counted, name)))
        for name, gauge in self._gauges.items():
            gauge.set(getattr(self.stats, name) or 0)
        self._counted = self.stats

    def forget_engine(self) -> None:
        """Call when the engine has ended: the next one starts counting at 0."""
        self.count()
        self.stats = self._counted = EngineStats()
        self.count()


class Mailbox:
    """Callbacks for a thread that waits on sockets. Any thread may call `post`, only the owner the other methods."""

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], None]] = deque()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def fileno(self) -> int:
        """A descriptor to wait on: readable once something has been posted."""
        return self._ours.fileno()

    def post(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)
        try:
            self._theirs.send(b"!")
        except OSError:
            pass  # full: the owner has a wake-up pending already; or closed: nobody is left to wake

    def run_all(self) -> None:
        """Run all callbacks posted so far, in order."""
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

STOP_PATIENCE_SECONDS = 5.0  # how long the last calls may keep retrying while the database is down

HUNG_SECONDS = 5.0  # how much longer to wait for the call in progress: a frozen server never answers


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """A call's return value. `sent_at` is the monotonic time at which its successful attempt began."""

    value: T
    sent_at: float


class StorageThread:
    """Runs storage calls one at a time, retrying through outages. `post` hands a callback to the owning thread."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = Event()
        self._stop_deadline = float("inf")
        self._thread = Thread(target=self._run, name="job-storage", daemon=True)
        self.is_away = False  # whether the database is currently not answering

    def start(self) -> None:
        self._thread.start()

    def submit(
        self,
        call: Callable[[bool], T],
        on_done: Callable[[Answer[T]], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        """Run `call(is_repeated)` after all earlier calls, then post `on_done` or `on_error` to the owner.

        `is_repeated` is True if an earlier attempt may have taken effect without its answer reaching us. Without
        `on_error`, errors are logged.
        """

        def run() -> None:
            try:
                answer = self._until_answered(call)
            except Exception as exc:
                self._report(exc, on_error)
            else:
                self._post(lambda: on_done(answer))

        self._calls.put(run)

    def stop(self) -> None:
        """Finish the calls submitted so far, but give up on them after a few seconds of outage. Blocks."""
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
                    log.warning("the database is not answering; retrying: %s", describe_exception(exc))
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
            Event().wait(FIRST_RETRY_SECONDS)  # stopping: retry at the shortest interval

    def _report(self, exc: Exception, on_error: Callable[[Exception], None] | None) -> None:
        if on_error is None:
            log.error("a storage call failed", exc_info=exc)
            return
        self._post(lambda: on_error(exc))


PAUSE_SECONDS = 0.02

PAUSE_AFTER_FAILURE_SECONDS = 1.0  # the janitor dispatches every second anyway

REDIS_TIMEOUT_SECONDS = 0.2

LOOK_SECONDS = 2.0  # between two looks whether Redis answers


class DispatchRequester:
    """Dispatches on a thread of its own. `request` may be called from any thread; requests made during a dispatch are
    merged into one more after it.

    The thread opens its own connections and closes them itself, since a dispatch may outlast the rest of a runner that
    is stopping.
    """

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
        self._away_since: float | None = None  # monotonic: since when Redis has not answered
        self.redis_error = ""
        self._look_at = 0.0
        self._requested = Event()
        self._stopping = Event()
        self._thread = Thread(target=self._run, name="dispatch-requester", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def request(self) -> None:
        self._requested.set()

    def stop(self) -> None:
        """Returns immediately; a dispatch in progress may finish later."""
        self._stopping.set()
        self._requested.set()

    @property
    def redis_away_seconds(self) -> float:
        """How long Redis has not answered this worker; 0 while it does."""
        since = self._away_since
        return 0.0 if since is None else monotonic() - since

    def _run(self) -> None:
        while not self._stopping.is_set():
            is_requested = self._requested.wait(LOOK_SECONDS)
            if monotonic() >= self._look_at:
                self._look_for_redis()
            if is_requested and not self._stopping.is_set():
                self._requested.clear()
                self._stopping.wait(PAUSE_SECONDS if self._dispatch() else PAUSE_AFTER_FAILURE_SECONDS)
        self._client.close()
        self._database.dispose()

    def _look_for_redis(self) -> None:
        self._look_at = monotonic() + LOOK_SECONDS
        try:
            self._client.ping()
        except ResponseError:  # it answers: what it refuses is seen by all others as well
            self._away_since = None
        except (RedisError, OSError) as exc:
            self._away_since, self.redis_error = self._away_since or monotonic(), describe_exception(exc)
        else:
            self._away_since = None

    def _dispatch(self) -> bool:
        try:
            dispatch(self._sessions, self._client, self._spec, self._settings)
        except (RedisError, SQLAlchemyError, OSError) as exc:
            log.warning("dispatch failed; the janitor will dispatch within a second: %s", describe_exception(exc))
            return False
        return True
