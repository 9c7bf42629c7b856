"""What estimates are made of: what the newest jobs took, what tenants have received, what is ahead in a queue."""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from domain.eta import FLOOR_SECONDS, MIN_SAMPLES, QUANTILES, Load, Pace, Quantiles
from domain.jobs import WaitingJob
from storage.job_queues import TOKENS_LEFT, WAITING_JOB, read_waiting_job
from storage.job_statements import CHARGE, CLOCK, RANK

NUM_NEWEST = 128  # records of a model; further back, the load was another

# Rates are those of jobs that completed; errors are those of all first attempts. The condition on the records is that
# of usage_records_model_idx, so that no others are read.
PACES = text(f"""
SELECT newest.model, count(*) FILTER (WHERE outcome = 'completed') AS num_jobs,
    avg(prefill_seconds) FILTER (WHERE outcome = 'completed') AS seconds_to_first_output,
    sum(decode_seconds) FILTER (WHERE outcome = 'completed')
        / nullif(sum(num_output_tokens) FILTER (WHERE outcome = 'completed'), 0)::float8 AS seconds_per_token,
    sum(num_output_tokens) FILTER (WHERE outcome = 'completed')::float8
        / nullif(sum(num_allowed_tokens) FILTER (WHERE outcome = 'completed'), 0) AS token_share,
    sum(seconds * seconds) / nullif(2 * sum(seconds), 0) AS seconds_left,
    count(start_error) AS num_start_errors, count(end_error) AS num_end_errors,
    percentile_cont(CAST(:quantiles AS float8[])) WITHIN GROUP (ORDER BY start_error) AS start_errors,
    percentile_cont(CAST(:quantiles AS float8[])) WITHIN GROUP (ORDER BY end_error) AS end_errors
FROM unnest(CAST(:models AS text[])) AS m(model) CROSS JOIN LATERAL (
    SELECT u.*, u.prefill_seconds + u.decode_seconds AS seconds,
        (u.queue_seconds + {FLOOR_SECONDS}) / (u.eta_start_seconds + {FLOOR_SECONDS}) AS start_error,
        CASE WHEN u.outcome = 'completed' THEN (u.queue_seconds + u.prefill_seconds + u.decode_seconds
            + {FLOOR_SECONDS}) / (u.eta_end_seconds + {FLOOR_SECONDS}) END AS end_error
    FROM usage_records u WHERE u.model = m.model AND u.ended_at > {CLOCK} - interval '1 hour'
        AND u.is_attempt AND NOT u.is_batch
    ORDER BY u.ended_at DESC LIMIT {NUM_NEWEST}
) newest
GROUP BY newest.model
""")


def read(session: Session, models: Sequence[str]) -> dict[str, Pace]:
    """By model; those of which no job has completed lately are left out."""
    rows = session.execute(PACES, {"models": list(models), "quantiles": list(QUANTILES)})
    return {
        row.model: Pace(
            num_jobs=row.num_jobs,
            seconds_to_first_output=row.seconds_to_first_output,
            seconds_per_token=row.seconds_per_token or 0.0,
            token_share=1.0 if row.token_share is None else row.token_share,
            seconds_left=row.seconds_left or 0.0,
            start_errors=Quantiles(*row.start_errors) if row.num_start_errors >= MIN_SAMPLES else None,
            end_errors=Quantiles(*row.end_errors) if row.num_end_errors >= MIN_SAMPLES else None,
        )
        for row in rows
        if row.num_jobs
    }


STANDINGS = text("""
SELECT l.tenant_id, l.virtual_time, t.weight, l.num_running FROM tenant_load l JOIN tenants t ON t.id = l.tenant_id
WHERE l.num_queued + l.num_running > 0
""")


@dataclass(frozen=True, slots=True)
class Standing:
    """How much a tenant has received, and what it may."""

    virtual_time: float
    weight: float
    num_running: int


def standings(session: Session) -> dict[UUID, Standing]:
    """Of the tenants that have jobs queued or running."""
    rows = session.execute(STANDINGS)
    return {row.tenant_id: Standing(row.virtual_time, row.weight, row.num_running) for row in rows}


MAX_COUNTED = 1_000  # jobs of the own tenant that are counted one by one

RANK_OF_OTHER = RANK.replace("j.", "x.")

CHARGE_OF_OTHER = CHARGE.replace("j.", "x.")

TOKENS_OF_OTHER = TOKENS_LEFT.replace("j.", "x.")

OWN_QUEUE = "x.status = 'queued' AND x.model = j.model AND x.tenant_id = j.tenant_id"

# Each part reads a bounded number of rows from jobs_ready_idx.
OWN_AHEAD = text(f"""
SELECT j.id, j.model, j.tenant_id, {TOKENS_LEFT} AS num_tokens, {WAITING_JOB},
    a.num_jobs, a.cost, a.tokens,
    coalesce(({RANK} - first.rank) / nullif(last.rank - first.rank, 0), 0)::float8 AS share
FROM jobs j
CROSS JOIN LATERAL (
    SELECT count(*)::int AS num_jobs, coalesce(sum(cost), 0)::bigint AS cost,
        coalesce(sum(tokens), 0)::bigint AS tokens
    FROM (SELECT {CHARGE_OF_OTHER} AS cost, {TOKENS_OF_OTHER} AS tokens FROM jobs x
          WHERE {OWN_QUEUE} AND ({RANK_OF_OTHER}, x.id) < ({RANK}, j.id)
          ORDER BY {RANK_OF_OTHER}, x.id LIMIT {MAX_COUNTED}) x
) a
CROSS JOIN LATERAL (
    SELECT {RANK_OF_OTHER} AS rank FROM jobs x WHERE {OWN_QUEUE} ORDER BY {RANK_OF_OTHER}, x.id LIMIT 1
) first
CROSS JOIN LATERAL (
    SELECT {RANK_OF_OTHER} AS rank FROM jobs x WHERE {OWN_QUEUE} ORDER BY {RANK_OF_OTHER} DESC, x.id DESC LIMIT 1
) last
WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.status = 'queued'
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
    """For queued jobs; others are left out. Takes about a millisecond for each, however long the queues are."""
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
