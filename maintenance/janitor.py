"""The janitor: rules that find what somebody left behind and put it right, once a second.

Every rule looks at the state as it is (nothing hangs on an event that could be missed), takes a bounded bite, skips
rows that others have locked, and fails alone. Any number of janitors may run.

Redis keys
| name                  | type   | lifetime                  | writer           | reader  |
|-----------------------|--------|---------------------------|------------------|---------|
| celeriac:epoch        | string | -                         | janitor          | janitor |
| celeriac-maintenance* | list   | until a janitor sees them | earlier releases | -       |
"""

import logging
from collections.abc import Callable
from datetime import datetime
from functools import partial
from time import monotonic
from uuid import uuid4

import redis
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from domain.ids import external_id
from maintenance.revisions import RevisionWatch, status_after
from observability import describe_exception
from settings import Settings
from storage import files, jobs, maintenance, webhook_deliveries, workers
from storage.streams import publish
from tasks import job_log
from tasks.dispatch import dispatch
from tasks.messages import priority_keys

logger = logging.getLogger(__name__)

EPOCH_KEY = "celeriac:epoch"
OLD_QUEUE = "celeriac-maintenance"  # through which earlier releases sent their ticks
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
        self,
        sessions: sessionmaker[Session],
        client: redis.Redis,
        catalog: Catalog,
        settings: Settings,
        *,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_tick` is called after a tick in which every rule did its work, but for what needs Redis."""
        self._sessions = sessions
        self._client = client
        self._catalog = catalog
        self._settings = settings
        self._on_tick = on_tick
        self.quiet_seconds = settings.lease_seconds + 5  # how long the database server must be up before a rescue
        self._guard = OutageGuard(settings.lease_seconds, monotonic())
        self._revisions = RevisionWatch(sessions, settings)
        self._epoch: tuple[object, object] | None = None
        self._is_redispatch_due = False
        self._pruned_at = 0.0
        self._checked_at = 0.0
        self._leases_as_of: datetime | None = None  # None: they cannot be believed now
        self._has_redis = False  # it answered in this tick
        self._has_cleared = False

    def tick(self) -> dict[str, int]:
        """Run every rule once; returns how many jobs each one moved, without the zeros."""
        count_by_rule = {name: _run(name, rule) for name, rule in self._rules()}
        if None not in count_by_rule.values():
            self._on_tick()
        counts = {name: count for name, count in count_by_rule.items() if count}
        if counts:
            logger.info("janitor: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))
        return counts

    def _rules(self) -> list[tuple[str, Callable[[], int]]]:
        """In an order that lets a rescued job be sent in the same tick."""
        models = [entry.id for entry in self._catalog.entries]
        sends = [(f"dispatched {model}", partial(self._dispatch, model)) for model in models]
        return [
            ("redispatched", self._follow_epoch),
            ("rescued", self._rescue),
            ("stalled", self._release_stalled),
            ("expired", self._expire),
            ("moved to another revision", self._follow_revisions),
            *sends,
            ("dispatched of models taken out", self._dispatch_unlisted),
            ("pruned", self._prune),
            ("pruned files", self._prune_files),
            ("checked", self._check),
            ("cleared keys of Redis", self._clear_old_queue),
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
        job_log.returned("rescued", returned)
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
        job_log.returned("stalled", returned)
        publish(self._client, [(job.job_id, job.status) for job in returned])
        return len(returned)

    def _expire(self) -> int:
        with self._sessions.begin() as session:
            expired = jobs.expire(session)
        job_log.ends(expired)
        publish(self._client, [(job.job_id, job.status) for job in expired])
        return len(expired)

    def _follow_revisions(self) -> int:
        moved = self._revisions.look(monotonic())
        publish(self._client, [(job.job_id, status_after(job)) for job in moved])
        return len(moved)

    def _dispatch(self, model: str) -> int:
        if not self._has_redis:
            return 0  # to find that out once a tick is enough: rescue must not wait for it
        return dispatch(self._sessions, self._client, self._catalog.entry_of(model), self._settings)

    def _dispatch_unlisted(self) -> int:
        """A model that models.toml does not name any more takes no jobs, but those it has go on as its workers do."""
        with self._sessions() as session:
            served = {worker.model for worker in workers.list_live(session)}
        return sum(map(self._dispatch, served - {entry.id for entry in self._catalog.entries}))

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

    def _clear_old_queue(self) -> int:
        """What nobody reads any more would lie there for ever. Once per process, as soon as Redis answers."""
        if self._has_cleared or not self._has_redis:
            return 0
        self._has_cleared = True
        return int(self._client.unlink(*priority_keys(OLD_QUEUE), f"_kombu.binding.{OLD_QUEUE}"))


def _run(name: str, rule: Callable[[], int]) -> int | None:
    """None: the rule could not do its work, and Redis is not to blame."""
    try:
        return rule()
    except redis.RedisError as exc:
        logger.warning("janitor rule %r failed, will try again: %s", name, describe_exception(exc))
        return 0
    except Exception as exc:  # an outermost loop: the other rules must go on
        logger.warning("janitor rule %r failed, will try again: %s", name, describe_exception(exc))
        return None
