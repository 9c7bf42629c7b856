"""The worker's heartbeat, on which dispatch, /health and the admin API rely, and what it finds wrong with itself.

The answer to a heartbeat contains the operators' orders for this worker.
"""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID, uuid4

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

import observability
from domain.catalog import ModelSpec
from domain.clocks import told_skew
from domain.jobs import WorkerState
from domain.troubles import Trouble
from gpu_worker.commits import JobStorage
from gpu_worker.engine_process.supervisor import Supervisor
from gpu_worker.threads import DispatchRequester, StorageThread
from observability import describe_exception
from settings import Settings
from storage import workers
from storage.database import OUTAGES, open_database
from storage.workers import Orders, WorkerReport

log = logging.getLogger(__name__)

ENDED_SECONDS = 60.0  # for which it is told that an engine has ended: the next one may do so, too

AWAY_SECONDS = 5.0  # for which Redis has not answered

SLOW_SECONDS, NUM_SLOW = 1.0, 3  # reports in a row, each of them slower than this
VERY_SLOW_SECONDS = 2.5  # of one report; the next ones take as long

REPORT_SECONDS = 2.0  # between two reports, and so the longest time until an order is followed

FAILURE_SECONDS = 30.0  # between two reports that a model was given up

MAX_REASON_LENGTH = 500

LOADING_REPORT_SECONDS = 0.5  # while a model is loaded, whose progress somebody may be watching


class WorkerReporter:
    """Sends the worker's reports. After each of them, `on_answer` is called with the worker's orders."""

    def __init__(
        self,
        storage: JobStorage,
        thread: StorageThread,
        *,
        spec: ModelSpec,
        owner: UUID,
        hostname: str,
        on_answer: Callable[[Orders], None],
    ) -> None:
        self._storage = storage
        self._storage_thread = thread
        self._spec = spec
        self._owner = owner
        self._hostname = hostname
        self._on_answer = on_answer
        self._due_at = 0.0
        self._is_under_way = False
        self._told: tuple[WorkerState, frozenset[Trouble]] | None = None
        self._refused: str | None = None  # why the database took no report, as it was logged last
        self.skew_seconds = 0.0  # by how much the database's clock is ahead of ours
        self._newest_seconds: deque[float] = deque(maxlen=NUM_SLOW)  # how long the newest reports took

    @property
    def seconds(self) -> float:
        """How long a report takes now."""
        return slowness(self._newest_seconds)

    def beat_soon(self) -> None:
        """Report at the next opportunity, to fetch an order that has changed."""
        self._due_at = 0.0

    def beat(
        self,
        now: float,
        state: WorkerState,
        *,
        num_running: int,
        tokens_per_second: float,
        cache_usage: float | None,
        memory_bytes: int | None,
        load_share: float | None,
        ready_in_seconds: float | None,
        troubles: Mapping[Trouble, str],
    ) -> None:
        """Report if it is due, or if the state or the troubles have changed. Reports do not overlap: the orders of one
        are followed before the next is sent."""
        told = (state, frozenset(troubles))
        if self._is_under_way or (now < self._due_at and told == self._told):
            return
        pause_seconds = min(REPORT_SECONDS, LOADING_REPORT_SECONDS) if load_share is not None else REPORT_SECONDS
        self._due_at, self._is_under_way, self._told = now + pause_seconds, True, told
        report = WorkerReport(
            id=self._owner,
            hostname=self._hostname,
            model=self._spec.id,
            max_num_seqs=self._spec.max_num_seqs,
            num_running=num_running,
            tokens_per_second=tokens_per_second,
            cache_usage=cache_usage,
            memory_bytes=memory_bytes,
            model_revision=self._storage.model_revision,
            state=state,
            load_percent=None if load_share is None else int(100 * load_share),
            ready_in_seconds=ready_in_seconds,
            troubles={trouble.value: words for trouble, words in troubles.items()},
        )
        self._storage_thread.submit(
            lambda is_repeated: self._storage.heartbeat(report),
            lambda answer: self._end(answer.value),
            self._refuse,
        )

    def fail(self, now: float, reason: str) -> None:
        """Tell, now and then, why this model is not served."""
        if self._is_under_way or now < self._due_at:
            return
        self._due_at, self._is_under_way = now + FAILURE_SECONDS, True
        self._storage_thread.submit(
            lambda is_repeated: self._storage.fail(self._failure(reason)),
            lambda answer: self._end(None),
            self._refuse,
        )

    def leave(self, reason: str | None) -> None:
        """The last report: that it stops, or why it cannot go on."""
        if reason is None:
            self._storage_thread.submit(lambda is_repeated: self._storage.forget_worker(), lambda answer: None)
        else:
            failure = self._failure(reason)
            self._storage_thread.submit(lambda is_repeated: self._storage.fail(failure), lambda answer: None)

    def _failure(self, reason: str) -> WorkerReport:
        return failure_of(self._owner, self._hostname, self._spec.id, reason)

    def _refuse(self, exc: Exception) -> None:
        """Such as for want of a right: nobody but the log can say so, since nobody hears of this worker."""
        self._is_under_way = False
        why = describe_exception(exc)
        if why != self._refused and not isinstance(exc, OUTAGES):  # of which the storage thread tells
            log.error("the database refuses this worker's reports, so it seems not to exist: %s", why)
        self._refused = why

    def _end(self, answer: tuple[Orders, float, float] | None) -> None:
        self._is_under_way, self._refused = False, None
        if answer is not None:
            orders, self.skew_seconds, seconds = answer
            self._newest_seconds.append(seconds)
            self._on_answer(orders)


def slowness(seconds: Sequence[float]) -> float:
    """The fastest of the newest reports, as one may have waited for this process; or the newest one, if that took far
    too long."""
    if seconds and seconds[-1] > VERY_SLOW_SECONDS:
        return seconds[-1]
    return min(seconds) if len(seconds) == NUM_SLOW else 0.0


class WorkerTroubles:
    """What a worker finds wrong with itself and its engine."""

    def __init__(self, supervisor: Supervisor, dispatcher: DispatchRequester) -> None:
        self._supervisor = supervisor
        self._dispatcher = dispatcher
        self._ended: tuple[float, str] | None = None  # when the last engine ended unasked, and how

    def engine_ended(self, now: float, description: str) -> None:
        self._ended = now, description

    def found(
        self, now: float, skew_seconds: float, report_seconds: float, of_claims: str | None = None
    ) -> dict[Trouble, str]:
        """In words for operators. `report_seconds`: how long the database takes for a report. `of_claims`: what the
        intake finds."""
        found = {} if of_claims is None else {Trouble.CLAIMS: of_claims[:MAX_REASON_LENGTH]}
        if self._ended is not None and now - self._ended[0] < ENDED_SECONDS:
            found[Trouble.ENGINE_ENDED] = f"its engine has ended: {self._ended[1]}"
        if doubt := self._supervisor.doubt:
            found[Trouble.ENGINE_STUCK] = f"its engine: {doubt}"
        if self._dispatcher.redis_away_seconds > AWAY_SECONDS:
            found[Trouble.REDIS] = f"Redis has not answered it: {self._dispatcher.redis_error}"
        if report_seconds > SLOW_SECONDS:
            found[Trouble.DATABASE] = f"the database takes {report_seconds:.1f} s for its report"
        if (skew := told_skew(skew_seconds)) is not None:
            found[Trouble.CLOCK] = skew
        if (lost := observability.lost_lines()) is not None:
            found[Trouble.LOG] = f"its log takes no lines: {lost}"
        return found


def failure_of(owner: UUID, hostname: str, model: str, reason: str) -> WorkerReport:
    return WorkerReport(
        id=owner,
        hostname=hostname,
        model=model,
        max_num_seqs=0,
        num_running=0,
        tokens_per_second=0.0,
        state=WorkerState.UNLOADED,
        troubles={Trouble.MODEL.value: reason[:MAX_REASON_LENGTH]},
    )


def report_failed_start(settings: Settings, hostname: str, reason: str) -> None:
    """Of a worker that ends before it has begun. Best effort: its log has the reason as well."""
    models = settings.worker_models or [settings.default_model or "the default model"]
    database = open_database(settings.database_url, pool_size=1, max_overflow=0)
    try:
        with Session(database) as session, session.begin():
            for model in models:
                workers.fail(session, failure_of(uuid4(), hostname, model, reason))
    except (SQLAlchemyError, OSError) as exc:
        log.debug("could not tell why the worker ends", extra={"reason": describe_exception(exc)})
    finally:
        database.dispose()
