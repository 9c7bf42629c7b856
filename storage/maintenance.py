"""Consistency checks for the janitor, figures for the metrics, and statistics on the newest jobs."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.jobs import first_id
from storage.job_statements import CLOCK
from storage.running_sums import MANY_RUNNING
from storage.tables import MaintenanceFigure, MaintenanceTick

CLOCKS = ("janitor", "batches", "webhooks")  # every maintenance process has one of each

# In the snapshot of one statement, the counters must always agree with the rows, since they change together.
DRIFT = text("""
SELECT l.tenant_id, abs(l.num_queued - count(j.id) FILTER (WHERE j.status = 'queued'))
    + abs(l.num_running - count(j.id) FILTER (WHERE j.status = 'in_progress')) AS drift
FROM tenant_load l LEFT JOIN jobs j ON j.tenant_id = l.tenant_id AND j.status IN ('queued', 'in_progress')
GROUP BY l.tenant_id, l.num_queued, l.num_running
""")

LOCK_LOAD = text("SELECT FROM tenant_load WHERE tenant_id = ANY(CAST(:ids AS uuid[])) ORDER BY tenant_id FOR UPDATE")

# A concurrent change of a job waits for our lock, and then adds to the numbers that we have written.
RECOUNT = text("""
UPDATE tenant_load l SET
    num_queued = (SELECT count(*) FROM jobs j WHERE j.tenant_id = l.tenant_id AND j.status = 'queued'),
    num_running = (SELECT count(*) FROM jobs j WHERE j.tenant_id = l.tenant_id AND j.status = 'in_progress')
WHERE l.tenant_id = ANY(CAST(:ids AS uuid[]))
""")

MAX_UNSERVED = 10_000  # jobs of a model, that are counted

# Jobs that could run but have no live worker of their model. Every worker serves both lanes. The models come from one
# look into the index for each, so that jobs of those that are served are not read.
UNSERVED = text(f"""
WITH RECURSIVE queued(model) AS (
    (SELECT model FROM jobs WHERE status = 'queued' ORDER BY model LIMIT 1)
    UNION ALL
    SELECT (SELECT j.model FROM jobs j WHERE j.status = 'queued' AND j.model > q.model ORDER BY j.model LIMIT 1)
    FROM queued q WHERE q.model IS NOT NULL
)
SELECT j.model, j.lane, count(*) AS num_jobs FROM queued q CROSS JOIN LATERAL (
    SELECT * FROM jobs j WHERE j.status = 'queued' AND j.model = q.model
        AND j.available_at < {CLOCK} - make_interval(secs => :patience_seconds) LIMIT {MAX_UNSERVED}) j
WHERE NOT EXISTS (SELECT FROM workers w WHERE w.model = q.model AND w.state = 'ready'
        AND w.seen_at > {CLOCK} - make_interval(secs => :live_seconds))
GROUP BY j.model, j.lane
""")  # noqa: S608  (CLOCK is a constant)

CHECKED_SECONDS = 3_600.0  # only jobs that were accepted within these, so that a long queue is not read every minute

# Rows that no statement of the protocol leaves behind.
ORPHANS = text(f"""
SELECT (SELECT count(*) FROM jobs j WHERE j.status IN ('queued', 'in_progress') AND j.id > :since
        AND NOT EXISTS (SELECT FROM job_payloads p WHERE p.job_id = j.id))
    + (SELECT count(*) FROM jobs j WHERE j.status = 'in_progress' AND j.lease_expires_at IS NULL)
    + (SELECT count(*) FROM jobs j WHERE j.status = 'completed' AND j.prune_at > {CLOCK} AND j.id > :since
        AND j.finished_at > {CLOCK} - interval '5 minutes' AND (
            NOT EXISTS (SELECT FROM job_results r WHERE r.job_id = j.id)
            OR j.committed_sequence_number <> (SELECT coalesce(max(c.sequence_number), 0) FROM job_chunks c
                WHERE c.job_id = j.id)))
""")  # noqa: S608  (CLOCK is a constant)

# Several processes may have a clock of the same name; the newest tick counts. A database crash may lose one.
RECORD_TICKS = text(f"""
INSERT INTO maintenance_ticks (clock, ticked_at)
SELECT clock, {CLOCK} - make_interval(secs => age)
FROM unnest(CAST(:clocks AS text[]), CAST(:ages AS float8[])) AS t(clock, age) ORDER BY clock
ON CONFLICT (clock) DO UPDATE SET ticked_at = greatest(maintenance_ticks.ticked_at, excluded.ticked_at)
""")  # noqa: S608  (CLOCK is a constant)


# What the janitor's rules may have to do: for each of them a condition that holds whenever the rule would move a row,
# and that an index answers from a few entries. On an idle system this is all that the janitor asks.
DUE = text(f"""
SELECT clock_timestamp() AS as_of,
    EXISTS (SELECT FROM jobs WHERE status = 'in_progress' AND lease_expires_at < {CLOCK}) AS has_lapsed,
    EXISTS (SELECT FROM jobs WHERE status = 'in_progress'
        AND progressed_at < {CLOCK} - make_interval(secs => CAST(:stall_seconds AS float8))) AS has_stalled,
    EXISTS (SELECT FROM jobs WHERE status = 'queued' AND least(deadline_at, start_deadline_at) <= {CLOCK}) AS has_late,
    EXISTS (SELECT FROM jobs WHERE status = 'queued') AS has_queued,
    EXISTS (SELECT FROM job_followers) AS has_followers,
    EXISTS (SELECT FROM jobs WHERE status = 'in_progress' OFFSET {MANY_RUNNING - 1}) AS has_many_running
""")  # noqa: S608  (CLOCK is a constant)


@dataclass(frozen=True, slots=True)
class Due:
    """Which rules may have something to do, as of a time of the database's clock."""

    as_of: datetime
    has_lapsed: bool
    has_stalled: bool
    has_late: bool
    has_queued: bool
    has_followers: bool
    has_many_running: bool


def look_for_work(session: Session, *, stall_seconds: float) -> Due:
    row = session.execute(DUE, {"stall_seconds": stall_seconds}).one()
    return Due(*row)


def reconcile_load(session: Session) -> int:
    """Compare the tenants' counters with the rows that they count, and correct them. Returns by how many jobs they were
    off; anything but 0 is a bug."""
    drift_by_tenant = {row.tenant_id: row.drift for row in session.execute(DRIFT) if row.drift}
    if drift_by_tenant:
        session.execute(LOCK_LOAD, {"ids": list(drift_by_tenant)})
        session.execute(RECOUNT, {"ids": list(drift_by_tenant)})
    return sum(drift_by_tenant.values())


def unserved_jobs(session: Session, *, patience_seconds: float, live_seconds: float) -> dict[str, int]:
    """By "model/lane", how many jobs are waiting without a live worker. Of a model only MAX_UNSERVED are looked at, so
    that beyond these, isolated ones may be missing: they have no index of their own, and few models have so many."""
    rows = session.execute(UNSERVED, {"patience_seconds": patience_seconds, "live_seconds": live_seconds})
    return {f"{row.model}/{row.lane}": row.num_jobs for row in rows}


def count_orphans(session: Session) -> int:
    """The number of rows that violate the protocol; anything but 0 is a bug."""
    return int(session.scalar(ORPHANS, {"since": first_id(time.time() - CHECKED_SECONDS)}) or 0)


def set_figures(session: Session, name: str, value_by_label: dict[str, float]) -> None:
    """Replace all values of a figure with these."""
    session.execute(delete(MaintenanceFigure).where(MaintenanceFigure.name == name))
    for label, value in value_by_label.items():
        _add(session, name, label, value)


def count_figure(session: Session, name: str, more: int) -> None:
    """Increase a counter."""
    _add(session, name, "", more)


def _add(session: Session, name: str, label: str, value: float) -> None:
    statement = insert(MaintenanceFigure).values(
        name=name, label=label, value=value, updated_at=func.statement_timestamp()
    )
    total = MaintenanceFigure.value + statement.excluded.value
    changed = {"value": total, "updated_at": statement.excluded.updated_at}
    session.execute(statement.on_conflict_do_update(index_elements=["name", "label"], set_=changed))


def figures(session: Session) -> dict[tuple[str, str], float]:
    """All figures by (name, label)."""
    return {(row.name, row.label): row.value for row in session.scalars(select(MaintenanceFigure))}


# When the clocks of maintenance ticked


def record_ticks(session: Session, age_by_clock: Mapping[str, float]) -> None:
    """Record how many seconds ago each clock of this process last ticked."""
    session.execute(text("SET LOCAL synchronous_commit = off"))
    session.execute(RECORD_TICKS, {"clocks": list(age_by_clock), "ages": list(age_by_clock.values())})


def seconds_since_ticks(session: Session) -> dict[str, float]:
    """By clock, the time since its newest tick in any process. Clocks that have never ticked are left out."""
    age = func.extract("epoch", func.clock_timestamp() - MaintenanceTick.ticked_at)
    return {row[0]: float(row[1]) for row in session.execute(select(MaintenanceTick.clock, age))}


WINDOW_SECONDS = 300.0

MAX_JOBS = 1_000  # if there are more, only the newest are considered

# Ids start with their creation time, so the primary key finds the newest jobs.
RECENT = text(f"""
SELECT count(*) AS num_jobs, extract(epoch FROM {CLOCK} - min(created_at))::float8 AS age_seconds,
    count(finished_at) AS num_ended, count(*) FILTER (WHERE status = 'failed') AS num_failed,
    count(*) FILTER (WHERE status = 'completed') AS num_completed,
    coalesce(sum(num_committed_tokens), 0)::bigint AS num_tokens,
    percentile_cont(CAST(:fractions AS float8[])) WITHIN GROUP (
        ORDER BY extract(epoch FROM finished_at - created_at)::float8) FILTER (WHERE status = 'completed') AS latency,
    avg(extract(epoch FROM finished_at - created_at)) FILTER (WHERE status = 'completed')::float8 AS latency_mean,
    percentile_cont(CAST(:fractions AS float8[])) WITHIN GROUP (
        ORDER BY extract(epoch FROM started_at - created_at)::float8) FILTER (WHERE started_at IS NOT NULL) AS wait,
    avg(extract(epoch FROM started_at - created_at)) FILTER (WHERE started_at IS NOT NULL)::float8 AS wait_mean,
    percentile_cont(CAST(:fractions AS float8[])) WITHIN GROUP (ORDER BY extract(epoch FROM first_token_at - created_at)
        ::float8) FILTER (WHERE first_token_at IS NOT NULL) AS ttft,
    avg(extract(epoch FROM first_token_at - created_at)) FILTER (WHERE first_token_at IS NOT NULL)::float8 AS ttft_mean
FROM (SELECT * FROM jobs WHERE id >= :since ORDER BY id DESC LIMIT :limit) newest
""")  # noqa: S608  (CLOCK is a constant)


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution of durations in seconds; its figures are None if there are no jobs to measure."""

    p50: float | None
    p95: float | None
    p99: float | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class RecentJobs:
    seconds: float  # the age of the oldest job that was considered
    num_ended: int
    num_failed: int
    num_completed: int
    num_tokens: int  # output tokens, including those of unfinished jobs
    latency: Spread  # from accept to end, for completed jobs
    wait: Spread  # from accept to first claim
    time_to_first_token: Spread  # from accept to the commit of the first chunk


def recent_jobs(session: Session) -> RecentJobs:
    """Statistics on the jobs accepted within the last WINDOW_SECONDS, at most MAX_JOBS of them, over all tenants. Takes
    a millisecond or two."""
    since = first_id(time.time() - WINDOW_SECONDS)
    parameters = {"since": since, "limit": MAX_JOBS, "fractions": [0.5, 0.95, 0.99]}
    row = session.execute(RECENT, parameters).one()
    return RecentJobs(
        seconds=max(row.age_seconds, 0.001) if row.num_jobs == MAX_JOBS else WINDOW_SECONDS,
        num_ended=row.num_ended,
        num_failed=row.num_failed,
        num_completed=row.num_completed,
        num_tokens=row.num_tokens,
        latency=_spread(row.latency, row.latency_mean),
        wait=_spread(row.wait, row.wait_mean),
        time_to_first_token=_spread(row.ttft, row.ttft_mean),
    )


def _spread(percentiles: list[float] | None, mean: float | None) -> Spread:
    p50, p95, p99 = percentiles or (None, None, None)
    return Spread(p50, p95, p99, mean)
