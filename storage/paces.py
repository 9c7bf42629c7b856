"""What estimates are made of: what the newest jobs took, what tenants have received, what is ahead in a queue."""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from domain.eta import Errors, Load, Pace
from domain.jobs import MIN_PRIORITY, WaitingJob, first_id
from storage.job_queues import TOKENS_LEFT, WAITING_JOB, read_waiting_job
from storage.job_statements import CHARGE, CLOCK, EXCESS, FAIR_TIME, RANK

NUM_NEWEST = 256  # records of a model; further back, the load was another

# Rates are those of jobs that completed; errors are those of first attempts: what was estimated, and what came. Not of
# cancelled ones: where many are cancelled together, each has started early because of the others. The
# condition on the records is that of usage_records_model_idx, so that no others are read.
PACES = text(f"""
SELECT newest.model, count(*) FILTER (WHERE outcome = 'completed') AS num_jobs,
    avg(prefill_seconds) FILTER (WHERE outcome = 'completed') AS seconds_to_first_output,
    sum(decode_seconds) FILTER (WHERE outcome = 'completed')
        / nullif(sum(num_output_tokens) FILTER (WHERE outcome = 'completed'), 0)::float8 AS seconds_per_token,
    sum(num_output_tokens) FILTER (WHERE outcome = 'completed')::float8
        / nullif(sum(num_allowed_tokens) FILTER (WHERE outcome = 'completed'), 0) AS token_share,
    array_agg(ARRAY[eta_start_seconds, queue_seconds] ORDER BY ended_at DESC)
        FILTER (WHERE eta_start_seconds IS NOT NULL AND outcome <> 'cancelled') AS starts,
    array_agg(ARRAY[eta_end_seconds, queue_seconds + prefill_seconds + decode_seconds] ORDER BY ended_at DESC)
        FILTER (WHERE eta_end_seconds IS NOT NULL AND outcome = 'completed') AS ends
FROM unnest(CAST(:models AS text[])) AS m(model) CROSS JOIN LATERAL (
    SELECT u.* FROM usage_records u WHERE u.model = m.model AND u.ended_at > {CLOCK} - interval '1 hour'
        AND u.is_attempt AND NOT u.is_batch
    ORDER BY u.ended_at DESC LIMIT {NUM_NEWEST}
) newest
GROUP BY newest.model
""")


def read(session: Session, models: Sequence[str]) -> dict[str, Pace]:
    """By model; those of which no job has completed lately are left out."""
    rows = session.execute(PACES, {"models": list(models)})
    return {
        row.model: Pace(
            num_jobs=row.num_jobs,
            seconds_to_first_output=row.seconds_to_first_output,
            seconds_per_token=row.seconds_per_token or 0.0,
            token_share=1.0 if row.token_share is None else row.token_share,
            start_errors=Errors(row.starts or ()),
            end_errors=Errors(row.ends or ()),
        )
        for row in rows
        if row.num_jobs
    }


STANDINGS = text(f"""
WITH {EXCESS}
SELECT l.tenant_id, {FAIR_TIME} AS virtual_time, t.weight, l.num_running
FROM tenant_load l JOIN tenants t ON t.id = l.tenant_id LEFT JOIN excess e ON e.tenant_id = l.tenant_id
WHERE l.num_queued + l.num_running > 0
""")


@dataclass(frozen=True, slots=True)
class Standing:
    """How much a tenant has received, and what it may."""

    virtual_time: float
    weight: float
    num_running: int


def standing_rows(session: Session) -> Sequence[Row[Any]]:
    """Of the tenants that have jobs queued or running."""
    return session.execute(STANDINGS).all()


def standings_of(rows: Sequence[Row[Any]]) -> dict[UUID, Standing]:
    return {row.tenant_id: Standing(row.virtual_time, row.weight, row.num_running) for row in rows}


NUM_ARRIVALS = 64  # of a model, from which rates are taken

ARRIVAL_SECONDS = 60.0  # if there are fewer within these, all of them count

MAX_ARRIVALS = 1_000  # of all models, that are read

# Without batch lines, which wait for all others, and without jobs that take another one's output.
ARRIVALS = text(f"""
WITH newest AS (
    SELECT j.* FROM jobs j WHERE j.id > CAST(:since AS uuid) ORDER BY j.id DESC LIMIT {MAX_ARRIVALS}
),
placed AS (
    SELECT j.model, j.tenant_id, j.cost, j.cost - j.num_prompt_tokens AS num_tokens, j.created_at,
        row_number() OVER (PARTITION BY j.model ORDER BY j.id DESC) AS place
    FROM newest j WHERE j.priority >= {MIN_PRIORITY} AND j.answered_by IS NULL
        AND NOT EXISTS (SELECT FROM job_followers f WHERE f.job_id = j.id)
),
timed AS (
    SELECT *, CASE WHEN count(*) OVER of_model < {NUM_ARRIVALS} AND (SELECT count(*) FROM newest) < {MAX_ARRIVALS}
        THEN {ARRIVAL_SECONDS}
        ELSE extract(epoch FROM {CLOCK} - min(created_at) OVER of_model) END AS seconds
    FROM placed WHERE place <= {NUM_ARRIVALS} WINDOW of_model AS (PARTITION BY model)
)
SELECT t.model, t.tenant_id, w.weight, greatest(0.1, min(t.seconds))::float8 AS seconds, count(*)::float8 AS num_jobs,
    sum(t.cost)::float8 AS cost, sum(t.num_tokens)::float8 AS num_tokens
FROM timed t JOIN tenants w ON w.id = t.tenant_id GROUP BY t.model, t.tenant_id, w.weight
""")


@dataclass(frozen=True, slots=True)
class Arriving:
    """What a tenant submitted lately."""

    weight: float
    per_second: Load


def arrivals(session: Session) -> dict[str, dict[UUID, Arriving]]:
    """By model and tenant. Reads the newest jobs by their ids, which begin with the time; takes a few milliseconds."""
    since = first_id(time.time() - ARRIVAL_SECONDS)
    found: dict[str, dict[UUID, Arriving]] = {}
    for row in session.execute(ARRIVALS, {"since": since}):
        load = Load(row.num_jobs, row.cost, row.num_tokens).times(1 / row.seconds)
        found.setdefault(row.model, {})[row.tenant_id] = Arriving(row.weight, load)
    return found


MAX_COUNTED = 1_000  # jobs of the own tenant that are counted one by one

_OWN_QUEUE = "j.status = 'queued' AND j.model = q.model AND j.tenant_id = q.tenant_id"

# Each tenant's queue for a model is read once, however many of its jobs are asked for: its first jobs, in their order,
# and the ranks at its ends, all from jobs_ready_idx.
OWN_AHEAD = text(f"""
WITH asked AS MATERIALIZED (
    SELECT j.id, j.model, j.tenant_id, {RANK} AS rank, {TOKENS_LEFT} AS num_tokens, {WAITING_JOB}
    FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'queued'
),
queues AS MATERIALIZED (SELECT DISTINCT model, tenant_id FROM asked),
heads AS MATERIALIZED (
    SELECT q.model, q.tenant_id, x.id, row_number() OVER own - 1 AS num_jobs,
        sum(x.cost) OVER own - x.cost AS cost, sum(x.tokens) OVER own - x.tokens AS tokens
    FROM queues q CROSS JOIN LATERAL (
        SELECT j.id, {RANK} AS rank, {CHARGE} AS cost, {TOKENS_LEFT} AS tokens FROM jobs j WHERE {_OWN_QUEUE}
        ORDER BY {RANK}, j.id LIMIT {MAX_COUNTED} + 1) x
    WINDOW own AS (PARTITION BY q.model, q.tenant_id ORDER BY x.rank, x.id ROWS UNBOUNDED PRECEDING)
),
lengths AS MATERIALIZED (
    SELECT q.model, q.tenant_id, max(h.num_jobs) AS num_jobs, max(h.cost) AS cost, max(h.tokens) AS tokens,
        (SELECT {RANK} FROM jobs j WHERE {_OWN_QUEUE} ORDER BY {RANK}, j.id LIMIT 1) AS first_rank,
        (SELECT {RANK} FROM jobs j WHERE {_OWN_QUEUE} ORDER BY {RANK} DESC, j.id DESC LIMIT 1) AS last_rank
    FROM queues q JOIN heads h USING (model, tenant_id) GROUP BY q.model, q.tenant_id
)
SELECT a.*, coalesce(h.num_jobs, l.num_jobs)::int AS num_jobs, coalesce(h.cost, l.cost)::bigint AS cost,
    coalesce(h.tokens, l.tokens)::bigint AS tokens,
    coalesce((a.rank - l.first_rank) / nullif(l.last_rank - l.first_rank, 0), 0)::float8 AS share
FROM asked a JOIN lengths l USING (model, tenant_id) LEFT JOIN heads h USING (id)
""")


@dataclass(frozen=True, slots=True)
class OwnAhead:
    """What a tenant has ahead of one of its jobs."""

    model: str
    tenant_id: UUID
    load: Load
    share: float | None  # of its queue, by time, if it is too long to be counted
    num_tokens: int  # that the job itself may generate
    job: WaitingJob


def own_ahead(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, OwnAhead]:
    """For queued jobs; others are left out. Takes a few milliseconds for each tenant, however long the queues are."""
    rows = session.execute(OWN_AHEAD, {"ids": list(job_ids)}) if job_ids else ()
    return {
        row.id: OwnAhead(
            row.model,
            row.tenant_id,
            Load(row.num_jobs, row.cost, row.tokens),
            row.share if row.num_jobs == MAX_COUNTED else None,
            row.num_tokens,
            read_waiting_job(row),
        )
        for row in rows
    }
