"""The janitor: rules that find what somebody left behind and put it right, once a second, on the maintenance worker.

Every rule looks at the state as it is (nothing hangs on an event that could be missed), takes a bounded bite, skips
rows that others have locked, and fails alone. Any number of janitors may run.

Redis keys
| name           | type   | lifetime | writer  | reader  |
|----------------|--------|----------|---------|---------|
| celeriac:epoch | string | -        | janitor | janitor |
"""

import logging
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from threading import Lock, Thread
from time import monotonic, sleep
from uuid import uuid4

import redis
from celery import signals
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from domain.ids import external_id
from domain.jobs import JobStatus
from observability import describe_exception
from settings import Settings, get_settings
from storage import files, jobs, maintenance, webhook_deliveries, workers
from storage.database import open_database, session_factory
from storage.streams import publish
from tasks.app import app
from tasks.dispatch import dispatch
from tasks.messages import JANITOR_TICK, MAINTENANCE_QUEUE

logger = logging.getLogger(__name__)

EPOCH_KEY = "celeriac:epoch"
BROKER_TIMEOUT_SECONDS = 1.0
PRUNE_EVERY_SECONDS = 10.0
CHECK_EVERY_SECONDS = 60.0  # what reads every unfinished job
UNSERVED_SECONDS = 30.0  # a worker that starts has so long until its model counts as unserved


class OutageGuard:
    """Says when leases can be believed. After an outage of the database, and after its clock stepped, every lease looks
    lapsed although its owner lives: then rescue waits for one lease, in which the owners renew. `clock` is monotonic,
    of no later than the first question to the database."""

    def __init__(self, lease_seconds: float, clock: float) -> None:
        self._lease_seconds = lease_seconds
        self._answered_at = clock
        self._database_now: datetime | None = None  # of the last answer
        self._hold_until = 0.0

    def may_rescue(self, database_now: datetime, clock: float) -> bool:
        """To be called at every tick that reached the database. What may be rescued had lapsed by `database_now`: the
        server may be frozen between this answer and the next statement."""
        silence = clock - self._answered_at
        step = (database_now - (self._database_now or database_now)).total_seconds() - silence
        # Owners renew every third of a lease: an outage has found each with two thirds of it, and a smaller step leaves
        # each of them some of it.
        if silence > self._lease_seconds * 2 / 3 or step > self._lease_seconds / 3:
            self._hold_until = clock + self._lease_seconds
        self._answered_at, self._database_now = clock, database_now
        return clock >= self._hold_until


class Janitor:
    """One per process; its ticks never overlap."""

    def __init__(
        self, sessions: sessionmaker[Session], client: redis.Redis, catalog: Catalog, settings: Settings
    ) -> None:
        self._sessions = sessions
        self._client = client
        self._catalog = catalog
        self._settings = settings
        self.quiet_seconds = settings.lease_seconds + 5  # how long the database server must be up before a rescue
        self._guard = OutageGuard(settings.lease_seconds, monotonic())
        self._epoch: tuple[object, object] | None = None
        self._is_redispatch_due = False
        self._pruned_at = 0.0
        self._checked_at = 0.0
        self._leases_as_of: datetime | None = None  # None: they cannot be believed now
        self._has_redis = False  # it answered in this tick
        self.ticked_at = monotonic()
        self._lock = Lock()

    def tick(self) -> dict[str, int]:
        """Run every rule once; returns how many jobs each one moved, without the zeros."""
        if not self._lock.acquire(blocking=False):
            return {}
        self.ticked_at = monotonic()
        try:
            return {name: count for name, rule in self._rules() if (count := _run(name, rule))}
        finally:
            self._lock.release()

    def _rules(self) -> list[tuple[str, Callable[[], int]]]:
        """In an order that lets a rescued job be sent in the same tick."""
        sends = [(f"dispatched {spec.id}", lambda spec=spec: self._dispatch(spec.id)) for spec in self._catalog]
        return [
            ("redispatched", self._follow_epoch),
            ("rescued", self._rescue),
            ("stalled", self._release_stalled),
            ("expired", self._expire),
            *sends,
            ("pruned", self._prune),
            ("pruned files", self._prune_files),
            ("checked", self._check),
        ]

    def _rescue(self) -> int:
        with self._sessions.begin() as session:
            now = session.scalar(select(func.clock_timestamp()))
            self._leases_as_of = now if now is not None and self._guard.may_rescue(now, monotonic()) else None
            if self._leases_as_of is None:
                return 0
            returned = jobs.rescue(
                session,
                as_of=self._leases_as_of,
                grace_seconds=self._settings.lease_grace_seconds,
                quiet_seconds=self.quiet_seconds,
            )
        publish(self._client, [(job.job_id, job.status) for job in returned])
        return len(returned)

    def _release_stalled(self) -> int:
        if self._leases_as_of is None:
            return 0
        with self._sessions.begin() as session:
            returned = jobs.release_stalled(
                session, as_of=self._leases_as_of, stall_seconds=self._settings.stall_seconds
            )
            if returned:
                maintenance.count_figure(session, "stalled_jobs", len(returned))
        for job in returned:
            logger.error("a job with a lease made no progress", extra={"job_id": external_id(job.job_id)})
        publish(self._client, [(job.job_id, job.status) for job in returned])
        return len(returned)

    def _expire(self) -> int:
        with self._sessions.begin() as session:
            expired = jobs.expire(session)
        publish(self._client, [(job_id, JobStatus.EXPIRED) for job_id in expired])
        return len(expired)

    def _dispatch(self, model: str) -> int:
        if not self._has_redis:
            return 0  # to find that out once a tick is enough: rescue must not wait for it
        return dispatch(self._sessions, self._client, self._catalog.get(model), self._settings)

    def _follow_epoch(self) -> int:
        """Redis was emptied or replaced since the last look: what it held must be sent again."""
        self._has_redis = False
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(EPOCH_KEY, str(uuid4()), nx=True)
        pipeline.get(EPOCH_KEY)
        pipeline.info("server")
        was_missing, value, info = pipeline.execute()
        self._has_redis = True
        epoch = (value, info["run_id"])
        if was_missing or self._epoch not in (None, epoch):
            self._is_redispatch_due = True  # stays so until the database did it
        self._epoch = epoch
        if not self._is_redispatch_due:
            return 0
        with self._sessions.begin() as session:
            num_jobs = jobs.redispatch_all(session)
        self._is_redispatch_due = False
        return num_jobs

    def _prune(self) -> int:
        if monotonic() - self._pruned_at < PRUNE_EVERY_SECONDS:
            return 0
        self._pruned_at = monotonic()
        with self._sessions.begin() as session:
            return jobs.prune(session) + webhook_deliveries.prune(session)

    def _prune_files(self) -> int:
        with self._sessions.begin() as session:
            return files.prune(session)

    def _check(self) -> int:
        """What must never be found, counted for the metrics; the sum is 0 where all is well."""
        if monotonic() - self._checked_at < CHECK_EVERY_SECONDS:
            return 0
        self._checked_at = monotonic()
        with self._sessions.begin() as session:
            drift = maintenance.reconcile_load(session)
            maintenance.count_figure(session, "load_drift", drift)
            orphans = maintenance.count_orphans(session)
            maintenance.set_figures(session, "orphans", {"": orphans})
            unserved = maintenance.unserved_jobs(
                session, patience_seconds=UNSERVED_SECONDS, live_seconds=workers.LIVE_SECONDS
            )
            maintenance.set_figures(session, "unserved_jobs", dict[str, float](unserved))
        if drift or orphans:
            logger.error("the tables disagree", extra={"load_drift": drift, "orphans": orphans})
        for lane, num_jobs in unserved.items():
            logger.error("no live worker serves jobs that wait", extra={"lane": lane, "num_jobs": num_jobs})
        return drift + orphans + sum(unserved.values())


@lru_cache(maxsize=1)
def janitor() -> Janitor:
    """This process's janitor."""
    settings = get_settings()
    client = redis.Redis.from_url(
        settings.redis_url,
        socket_timeout=BROKER_TIMEOUT_SECONDS,
        socket_connect_timeout=BROKER_TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
    database = open_database(
        settings.database_url, pool_size=1, max_overflow=1, idle_seconds=settings.idle_transaction_seconds
    )
    return Janitor(session_factory(database), client, Catalog.load(settings.models_file), settings)


@app.task(name=JANITOR_TICK, send_events=False)  # one a second would push the jobs out of Flower's list
def tick() -> None:
    """Run every rule of the janitor once."""
    counts = janitor().tick()
    if counts:
        logger.info("janitor: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))


@signals.worker_ready.connect
def _keep_ticking(**_: object) -> None:
    """Ticks come through Redis; while it is away, leases lapse all the same, so the maintenance worker has a clock of
    its own beside them. Where the ticks come, it rests."""
    if MAINTENANCE_QUEUE in app.amqp.queues.consume_from:
        Thread(target=_tick_when_silent, name="janitor", daemon=True).start()


def _tick_when_silent() -> None:
    seconds = get_settings().janitor_interval_seconds
    while True:
        sleep(seconds / 2)
        if monotonic() - janitor().ticked_at > 2 * seconds:
            tick()


def _run(name: str, rule: Callable[[], int]) -> int:
    try:
        return rule()
    except Exception as exc:  # an outermost loop: the other rules must go on
        logger.warning("janitor rule %r failed, will try again: %s", name, describe_exception(exc))
        return 0
