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
from threading import Lock
from time import monotonic
from uuid import uuid4

import redis
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from domain.jobs import JobStatus
from observability import describe_exception
from settings import Settings, get_settings
from storage import jobs, webhook_deliveries
from storage.database import open_database, session_factory
from storage.streams import publish
from tasks.app import app
from tasks.dispatch import dispatch
from tasks.messages import JANITOR_TICK

logger = logging.getLogger(__name__)

EPOCH_KEY = "celeriac:epoch"
BROKER_TIMEOUT_SECONDS = 2.0
CLOCK_STEP_SECONDS = 30.0
PRUNE_EVERY_SECONDS = 10.0


class OutageGuard:
    """Says when leases can be believed. After an outage of the database, and after its clock stepped, every lease looks
    lapsed although its owner lives: then rescue waits for one lease, in which the owners renew."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._last: tuple[datetime, float] | None = None
        self._hold_until = 0.0

    def may_rescue(self, database_now: datetime, clock: float) -> bool:
        """`clock` is monotonic. To be called at every tick that reached the database."""
        if self._last is not None:
            silence = clock - self._last[1]
            step = (database_now - self._last[0]).total_seconds() - silence
            if silence > self._lease_seconds or step > CLOCK_STEP_SECONDS:
                self._hold_until = clock + self._lease_seconds
        self._last = (database_now, clock)
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
        self._guard = OutageGuard(settings.lease_seconds)
        self._epoch: tuple[object, object] | None = None
        self._is_redispatch_due = False
        self._pruned_at = 0.0
        self._lock = Lock()

    def tick(self) -> dict[str, int]:
        """Run every rule once; returns how many jobs each one moved, without the zeros."""
        if not self._lock.acquire(blocking=False):
            return {}
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
            ("expired", self._expire),
            *sends,
            ("pruned", self._prune),
        ]

    def _rescue(self) -> int:
        with self._sessions.begin() as session:
            now = session.scalar(select(func.clock_timestamp()))
            if now is None or not self._guard.may_rescue(now, monotonic()):
                return 0
            returned = jobs.rescue(
                session, grace_seconds=self._settings.lease_grace_seconds, quiet_seconds=self.quiet_seconds
            )
        publish(self._client, [(job.job_id, job.status) for job in returned])
        return len(returned)

    def _expire(self) -> int:
        with self._sessions.begin() as session:
            expired = jobs.expire(session)
        publish(self._client, [(job_id, JobStatus.EXPIRED) for job_id in expired])
        return len(expired)

    def _dispatch(self, model: str) -> int:
        return dispatch(self._sessions, self._client, self._catalog.get(model), self._settings)

    def _follow_epoch(self) -> int:
        """Redis was emptied or replaced since the last look: what it held must be sent again."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.set(EPOCH_KEY, str(uuid4()), nx=True)
        pipeline.get(EPOCH_KEY)
        pipeline.info("server")
        was_missing, value, info = pipeline.execute()
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


@lru_cache(maxsize=1)
def janitor() -> Janitor:
    """This process's janitor."""
    settings = get_settings()
    client = redis.Redis.from_url(
        settings.redis_url, socket_timeout=BROKER_TIMEOUT_SECONDS, socket_connect_timeout=BROKER_TIMEOUT_SECONDS
    )
    sessions = session_factory(open_database(settings.database_url, pool_size=1, max_overflow=1))
    return Janitor(sessions, client, Catalog.load(settings.models_file), settings)


@app.task(name=JANITOR_TICK, send_events=False)  # one a second would push the jobs out of Flower's list
def tick() -> None:
    """Run every rule of the janitor once."""
    counts = janitor().tick()
    if counts:
        logger.info("janitor: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))


def _run(name: str, rule: Callable[[], int]) -> int:
    try:
        return rule()
    except Exception as exc:  # an outermost loop: the other rules must go on
        logger.warning("janitor rule %r failed, will try again: %s", name, describe_exception(exc))
        return 0
