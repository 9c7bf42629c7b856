"""How the newest jobs fared: of all tenants together, numbers only. For /health."""

import time
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from storage.jobs_sql import CLOCK

WINDOW_SECONDS = 300.0
MAX_JOBS = 1_000  # that are looked at: the newest, where more came within the window

# An id begins with the time of its creation, so the primary key finds the newest jobs.
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
    """Seconds; None where no job says."""

    p50: float | None
    p95: float | None
    p99: float | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class RecentJobs:
    seconds: float  # back to where jobs were looked at
    num_ended: int
    num_failed: int
    num_completed: int
    num_tokens: int  # of output, unfinished jobs included
    latency: Spread  # accept to end, of completed jobs
    wait: Spread  # accept to first claim
    time_to_first_token: Spread  # accept to the commit of the first chunk


def recent_jobs(session: Session) -> RecentJobs:
    """Of the jobs accepted within WINDOW_SECONDS, at most the newest MAX_JOBS. Costs a millisecond or two."""
    since = UUID(int=int((time.time() - WINDOW_SECONDS) * 1000) << 80)
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
