"""The janitor: rules that find and repair what processes have left behind, once a second.

Every rule examines the current state, not events, which could be missed. It handles a limited number of rows and skips
those that others have locked. A rule that fails does not stop the others. Any number of janitors may run.

Redis keys
| name                  | type   | lifetime                  | writer           | reader  |
|-----------------------|--------|---------------------------|------------------|---------|
| celeriac-maintenance* | list   | until a janitor sees them | earlier releases | -       |
"""

import logging
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from time import monotonic

import redis
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog
from domain.jobs import AttemptOutcome, JobStatus, external_id
from observability import describe_exception
from settings import Settings
from storage import (
    answers,
    conversations,
    files,
    jobs,
    limits,
    maintenance,
    running_sums,
    usage,
    usage_hours,
    webhook_deliveries,
    workers,
)
from storage.database import statement_factory
from storage.jobs import Restarted, Returned
from storage.maintenance import Due
from storage.streams import publish
from storage.usage_hours import Horizon
from storage.workers import LIVE_SECONDS
from tasks import job_log
from tasks.dispatch import dispatch, raise_overdue_lines
from tasks.messages import priority_keys

log = logging.getLogger(__name__)

LOOK_EVERY_SECONDS = 5.0

Revision = tuple[str, str]  # (model, revision)


class RevisionWatch:
    """Moves jobs away from model revisions that no worker has served for a while. This process measures that time, so
    its restart makes jobs wait longer, and a worker that returns resets it."""

    def __init__(self, sessions: sessionmaker[Session], settings: Settings) -> None:
        self._sessions = sessions
        self._policy = settings.revision_policy
        self._patience_seconds = settings.revision_seconds
        self._look_every_seconds = min(LOOK_EVERY_SECONDS, settings.revision_seconds / 4)
        self._looked_at = float("-inf")
        self._gone_since: dict[Revision, float] = {}

    def look(self, now: float) -> list[Restarted | Returned]:
        """Move the jobs that are due, and return them. `now` is monotonic."""
        if now - self._looked_at < self._look_every_seconds:
            return []
        self._looked_at = now
        with self._sessions.begin() as session:
            num_jobs_by_revision = jobs.gone_revisions(session, live_seconds=LIVE_SECONDS)
            if num_jobs_by_revision or self._gone_since:
                figures = {f"{model}/{revision}": num for (model, revision), num in num_jobs_by_revision.items()}
                maintenance.set_figures(session, "gone_revision_jobs", dict[str, float](figures))
        self._note(num_jobs_by_revision, now)
        return self._move(rev for rev, since in self._gone_since.items() if now - since >= self._patience_seconds)

    def _note(self, num_jobs_by_revision: dict[Revision, int], now: float) -> None:
        for (model, revision), num_jobs in num_jobs_by_revision.items():
            if (model, revision) not in self._gone_since:
                log.warning(
                    "jobs started under a model revision that is no longer served",
                    extra={"model": model, "model_revision": revision, "num_jobs": num_jobs, "policy": self._policy},
                )
        self._gone_since = {rev: self._gone_since.get(rev, now) for rev in num_jobs_by_revision}

    def _move(self, revisions: Iterable[Revision]) -> list[Restarted | Returned]:
        moved: list[Restarted | Returned] = []
        for model, revision in revisions:
            if self._policy == "restart":
                with self._sessions.begin() as session:
                    restarted = jobs.restart(session, model, revision, live_seconds=LIVE_SECONDS)
                job_log.restarted(restarted, "its model revision is no longer served", model_revision=revision)
                moved += restarted
            elif self._policy == "fail":
                with self._sessions.begin() as session:
                    failed = jobs.fail_gone(session, model, revision, live_seconds=LIVE_SECONDS)
                job_log.ended_without_worker(failed)
                moved += failed
        return moved


def status_after(job: Restarted | Returned) -> JobStatus:
    """The status to report to open streams."""
    return job.status if isinstance(job, Returned) else JobStatus.QUEUED


OLD_QUEUE = "celeriac-maintenance"  # earlier releases sent their ticks through it

PRUNE_EVERY_SECONDS = 10.0
PRUNE_SECONDS = 0.3  # in a tick; if more is due, the next tick continues, after the rules that are urgent

EXPIRE_SECONDS = 0.3  # in a tick: claims read all jobs of a queue that are late, as long as they are in it

PING_SECONDS = 5.0  # also without jobs to send
AWAY_SECONDS = 5.0  # for which Redis has not answered, before it is told

CLOSE_EVERY_SECONDS = 60.0
CLOSE_SECONDS = 0.3  # in a tick

CHECK_EVERY_SECONDS = 60.0
CHECK_SHARE = 0.01  # of the time, at most, for which the database is busy with the check, which reads unfinished jobs

UNSERVED_SECONDS = 30.0  # how long jobs may wait for a starting worker before their model counts as unserved


class OutageGuard:
    """Decides when leases can be trusted. After an outage of the database or a step of its clock, all leases appear to
    have expired although their owners are alive. Rescue then waits for the length of one lease, so that the owners can
    renew. `clock` is time.monotonic(), read before the first query."""

    def __init__(self, lease_seconds: float, clock: float) -> None:
        self._lease_seconds = lease_seconds
        self._answered_at = clock
        self._database_now: datetime | None = None  # at the last answer
        self._hold_until = 0.0

    def may_rescue(self, database_now: datetime, clock: float) -> bool:
        """Call at every tick that has reached the database. Only jobs whose leases had expired by `database_now` may be
        rescued, since the server may freeze between this answer and the next statement."""
        silence = clock - self._answered_at
        step = (database_now - (self._database_now or database_now)).total_seconds() - silence
        # Owners renew every third of a lease, so each has at least two thirds of it left at any time. Thus no lease
        # expires because of a shorter silence and a smaller step.
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
        """`on_tick` is called after each tick in which every rule succeeded, except for those that need Redis."""
        self._sessions = sessions
        self._statements = statement_factory(sessions)
        self._client = client
        self._catalog = catalog
        self._settings = settings
        self._on_tick = on_tick
        self.quiet_seconds = settings.lease_seconds + 5  # how long the database server must be up before a rescue
        self._guard = OutageGuard(settings.lease_seconds, monotonic())
        self._revisions = RevisionWatch(sessions, settings)
        self._prune_at = 0.0
        self._is_pruning = False  # whether in this tick it is time to prune
        self._check_at = 0.0
        self._count_at = 0.0
        self._close_at = 0.0
        self._horizon: Horizon | None = None  # of a look before this one
        self._due: Due | None = None  # None if it could not be read: then every rule looks for itself
        self._leases_as_of: datetime | None = None  # None while leases cannot be trusted
        self._has_redis = False  # whether Redis answered in this tick
        self._ping_at = 0.0
        self._redis_error = ""
        self._redis_away_since: float | None = None  # monotonic
        self._has_cleared = False

    def tick(self) -> dict[str, int]:
        """Run every rule once. Returns how many jobs each rule has moved, leaving out those that moved none."""
        count_by_rule = {name: _run(name, rule) for name, rule in self._rules()}
        if None not in count_by_rule.values():
            self._on_tick()
        counts = {name: count for name, count in count_by_rule.items() if count}
        if counts:
            log.info("janitor: %s", ", ".join(f"{name} {count}" for name, count in counts.items()))
        return counts

    def _rules(self) -> list[tuple[str, Callable[[], int]]]:
        """The rules, in an order in which a rescued job is dispatched within the same tick."""
        models = [entry.id for entry in self._catalog.entries]
        sends = [(f"dispatched {model}", partial(self._dispatch, model)) for model in models]
        return [
            ("looked", self._look),
            ("corrected sums", self._correct_sums),
            ("reached Redis", self._ping_redis),
            ("rescued", self._rescue),
            ("stalled", self._release_stalled),
            ("expired", self._expire),
            ("moved to another revision", self._follow_revisions),
            ("answered", self._end_followers),
            *sends,
            ("dispatched of models taken out", self._dispatch_unlisted),
            ("pruned", self._prune),
            ("pruned files", self._prune_files),
            ("pruned conversations", self._prune_conversations),
            ("closed hours", self._close_hours),
            ("counted queued tokens", self._count_queued_tokens),
            ("checked", self._check),
            ("cleared keys of Redis", self._clear_old_queue),
        ]

    def _look(self) -> int:
        """Read with one statement which rules have nothing to do, so that they cost nothing."""
        self._due = self._leases_as_of = None
        with self._statements() as session:
            self._due = maintenance.look_for_work(session, stall_seconds=self._settings.stall_seconds)
        if self._guard.may_rescue(self._due.as_of, monotonic()):
            self._leases_as_of = self._due.as_of
        return 0

    def _correct_sums(self) -> int:
        if self._due is None or not self._due.has_many_running:
            return 0
        with self._sessions.begin() as session:
            corrected = running_sums.correct(session)
        if corrected is not None and corrected.num_skipped:
            with self._sessions.begin() as session:
                running_sums.correct_one(session)
        return 0

    def _rescue(self) -> int:
        if self._leases_as_of is None or not (self._due is None or self._due.has_lapsed):
            return 0
        with self._sessions.begin() as session:
            returned = jobs.rescue(
                session,
                as_of=self._leases_as_of,
                grace_seconds=self._settings.lease_grace_seconds,
                quiet_seconds=self.quiet_seconds,
            )
        job_log.returned(AttemptOutcome.LOST, returned)
        publish(self._client, [(job.job_id, job.status) for job in returned])
        return len(returned)

    def _release_stalled(self) -> int:
        if self._leases_as_of is None or not (self._due is None or self._due.has_stalled):
            return 0
        with self._sessions.begin() as session:
            returned = jobs.release_stalled(
                session, as_of=self._leases_as_of, stall_seconds=self._settings.stall_seconds
            )
            if returned:
                maintenance.count_figure(session, "stalled_jobs", len(returned))
        for job in returned:
            log.error(
                "a job was taken from its worker because it made no progress", extra={"job_id": external_id(job.job_id)}
            )
        job_log.returned(AttemptOutcome.STALLED, returned)
        publish(self._client, [(job.job_id, job.status) for job in returned])
        return len(returned)

    def _expire(self) -> int:
        if not (self._due is None or self._due.has_late):
            return 0
        num_expired, began_at = 0, monotonic()
        while True:
            with self._sessions.begin() as session:
                expired = jobs.expire(session)
            job_log.ended_without_worker(expired)
            publish(self._client, [(job.job_id, job.status) for job in expired])
            num_expired += len(expired)
            if not expired or monotonic() > began_at + EXPIRE_SECONDS:
                return num_expired

    def _end_followers(self) -> int:
        if not (self._due is None or self._due.has_followers):
            return 0
        with self._sessions.begin() as session:
            ended = answers.end_followers(session)
        job_log.ended_without_worker(ended)
        publish(self._client, [(job.job_id, job.status) for job in ended])
        return len(ended)

    def _follow_revisions(self) -> int:
        moved = self._revisions.look(monotonic())
        publish(self._client, [(job.job_id, status_after(job)) for job in moved])
        return len(moved)

    def _dispatch(self, model: str) -> int:
        if not (self._has_redis and self._has_queued):
            return 0  # try Redis only once per tick, since rescue must not wait for it
        entry = self._catalog.entry_of(model)
        raise_overdue_lines(self._sessions, entry, self._settings)
        return dispatch(self._sessions, self._client, entry, self._settings)

    def _dispatch_unlisted(self) -> int:
        """Dispatch jobs of models that models.toml no longer lists. Such models accept no new jobs, but existing ones
        run as long as there are workers."""
        if not self._has_queued:
            return 0
        with self._statements() as session:
            served = {worker.model for worker in workers.list_live(session)}
        return sum(map(self._dispatch, served - {entry.id for entry in self._catalog.entries}))

    @property
    def _has_queued(self) -> bool:
        """Or soon, by an earlier rule of this tick."""
        return self._due is None or self._due.has_queued or self._due.has_lapsed or self._due.has_stalled

    def _ping_redis(self) -> int:
        self._has_redis = False
        if not self._has_queued and self._has_cleared and monotonic() < self._ping_at:
            return 0
        self._ping_at = monotonic() + PING_SECONDS
        try:
            self._client.ping()
        except (redis.RedisError, OSError) as exc:
            self._redis_error = describe_exception(exc)
            self._redis_away_since = self._redis_away_since or monotonic()
            raise
        self._has_redis, self._redis_away_since = True, None
        return 0

    @property
    def redis_trouble(self) -> str | None:
        """In words for operators."""
        if self._redis_away_since is None or monotonic() - self._redis_away_since < AWAY_SECONDS:
            return None
        return f"Redis has not answered it: {self._redis_error}"

    def _prune(self) -> int:
        """Delete what is due, in short transactions, of which each kind has one in turn."""
        began_at = monotonic()
        self._is_pruning = began_at >= self._prune_at
        if not self._is_pruning:
            return 0
        kinds: list[Callable[[Session], int]] = [
            jobs.forget_poison if self._settings.archive_url else jobs.prune,  # which the archiver does
            webhook_deliveries.prune,
            partial(usage.prune, days=self._settings.usage_days),
            partial(usage_hours.prune, days=self._settings.usage_days),
        ]
        num_rows = 0
        while kinds and monotonic() < began_at + PRUNE_SECONDS:
            for prune in tuple(kinds):
                with self._sessions.begin() as session:
                    pruned = prune(session)
                num_rows += pruned
                if not pruned:
                    kinds.remove(prune)
        self._prune_at = began_at if kinds else began_at + PRUNE_EVERY_SECONDS
        return num_rows

    def _prune_files(self) -> int:
        if not self._is_pruning:
            return 0
        with self._sessions.begin() as session:
            num_files = files.prune(session)
        return self._go_on_pruning(num_files)

    def _prune_conversations(self) -> int:
        if not self._is_pruning:
            return 0
        with self._sessions.begin() as session:
            num_conversations = conversations.prune(session)
        return self._go_on_pruning(num_conversations)

    def _go_on_pruning(self, num_rows: int) -> int:
        """In the next tick, if there were any: more may be due than one transaction deletes."""
        if num_rows:
            self._prune_at = 0.0
        return num_rows

    def _close_hours(self) -> int:
        """Sum up hours of the ledger that are complete, in short transactions."""
        began_at = monotonic()
        if began_at < self._close_at:
            return 0
        self._close_at = began_at + CLOSE_EVERY_SECONDS
        with self._statements() as session:
            horizon = usage_hours.horizon(session)
        if self._horizon is None or horizon.own_id < self._horizon.own_id:
            self._horizon = horizon  # ids are less than before if this is another database, such as a restored one
        if not self._horizon.is_passed(horizon):
            return 0
        complete_until, self._horizon = self._horizon.as_of - usage_hours.GRACE, horizon
        while monotonic() < began_at + CLOSE_SECONDS:
            with self._sessions.begin() as session:
                if not usage_hours.close_next(session, complete_until):
                    return 0
        self._close_at = began_at  # the next tick continues
        return 0

    def _count_queued_tokens(self) -> int:
        began_at = monotonic()
        if began_at < self._count_at:
            return 0
        with self._sessions.begin() as session:
            has_all = limits.count_queued_tokens(session)
        pause = CHECK_EVERY_SECONDS if has_all else 0.0
        self._count_at = began_at + max(pause, (monotonic() - began_at) / CHECK_SHARE)
        return 0

    def _check(self) -> int:
        """Count inconsistencies, which should never occur, for the metrics. Returns their sum."""
        began_at = monotonic()
        if began_at < self._check_at:
            return 0
        self._check_at = began_at + CHECK_EVERY_SECONDS
        with self._sessions.begin() as session:
            drift = maintenance.reconcile_load(session)
            maintenance.count_figure(session, "load_drift", drift)
        with self._sessions.begin() as session:
            orphans = maintenance.count_orphans(session)
            maintenance.set_figures(session, "orphans", {"": orphans})
            unserved = maintenance.unserved_jobs(
                session, patience_seconds=UNSERVED_SECONDS, live_seconds=workers.LIVE_SECONDS
            )
            maintenance.set_figures(session, "unserved_jobs", dict[str, float](unserved))
        self._check_at = max(self._check_at, began_at + (monotonic() - began_at) / CHECK_SHARE)
        if drift or orphans:
            log.error("the tables are inconsistent", extra={"load_drift": drift, "orphans": orphans})
        for lane, num_jobs in unserved.items():
            log.error("waiting jobs have no live worker", extra={"lane": lane, "num_jobs": num_jobs})
        return drift + orphans + sum(unserved.values())

    def _clear_old_queue(self) -> int:
        """Delete keys of earlier releases. Runs once per process, as soon as Redis answers."""
        if self._has_cleared or not self._has_redis:
            return 0
        self._has_cleared = True
        return int(self._client.unlink(*priority_keys(OLD_QUEUE), f"_kombu.binding.{OLD_QUEUE}"))


def _run(name: str, rule: Callable[[], int]) -> int | None:
    """Run one rule. None if it failed for a reason other than Redis."""
    try:
        return rule()
    except redis.RedisError as exc:
        log.warning("janitor rule %r failed, will try again: %s", name, describe_exception(exc))
        return 0
    except Exception as exc:  # an outermost loop: the other rules must run
        log.warning("janitor rule %r failed, will try again: %s", name, describe_exception(exc))
        return None
