"""Jobs that are born completed: their answer is known when they come in, so they never wait (storage/answers.py).

Two statements for a whole group: one finds the answers, once for each question; one inserts the jobs with their status,
chunks, result and place in the ledger. What the caller knows of its job is not read back. No counter changes, since
such a job neither waits nor runs, and no lock is taken but those of limits: whatever has an idempotency key, which
another transaction may be about to use, is accepted to wait instead, and completed by the next statement of its
transaction.

Such a job counts as delivered from its birth, which saves an update of each. Delivery matters to retries without a key:
they are attached to a job whose answer did not arrive, so that nothing is generated twice. A retry of a hit is a hit.

All functions are synchronous on a `Session` and do not commit.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import orjson
from pydantic import ValidationError
from sqlalchemy import JSON, Row, text
from sqlalchemy.orm import Session

from domain.jobs import FinishReason, JobStatus, Lane
from domain.requests import RESULT, JobOutput, is_whole_output
from storage.answers import HAS_OUTPUT, forget
from storage.job_accept import Accepted, AcceptOutcome, NewJob, document_of, row_of
from storage.job_ends import is_gone
from storage.job_queries import JobRecord
from storage.job_statements import CLOCK, FRESH, HAS_ROOM, NEW, NEW_COLUMNS, NEW_VALUES, PAYLOAD, Packed, room
from storage.tables import Job
from storage.usage import RECORDED_COLUMNS, ends_recorded
from storage.webhooks import IS_TOLD, write_deliveries
from storage.workers import LIVE_SECONDS

log = logging.getLogger(__name__)

# Each leader once, with the hash of the question that it has answered. A model's files may have been replaced without
# the API having been restarted, whose keys have the old revision then, but its workers.
FIND = text(f"""
WITH asked AS MATERIALIZED (
    SELECT DISTINCT * FROM unnest(CAST(:tenant_ids AS uuid[]), CAST(:keys AS bytea[])) AS q(tenant_id, key)
)
SELECT a.tenant_id, a.key, l.id AS leader_id, r.result FROM asked q
JOIN answers a ON a.tenant_id = q.tenant_id AND a.key = q.key
    AND a.created_at > {CLOCK} - make_interval(secs => :max_age_seconds)
JOIN jobs l ON l.id = a.job_id AND l.tenant_id = q.tenant_id AND {HAS_OUTPUT}
    AND l.cancel_requested_at IS NULL
JOIN job_results r ON r.job_id = l.id
WHERE NOT ({is_gone("l.model", "l.model_revision")})
""").columns(result=JSON)

# A leader that has been deleted since it was found answers nobody.
ACCEPT_ANSWERED = text(f"""
WITH {NEW},
{room("")},
{FRESH},
inserted AS (
    INSERT INTO jobs AS j ({NEW_COLUMNS}, status, answered_by, model_revision, finish_reason, committed_sequence_number,
        reset_sequence_number, num_committed_tokens, started_at, first_token_at, finished_at, prune_at, delivered_at)
    SELECT {NEW_VALUES}, 'completed', l.id, l.model_revision, l.finish_reason, l.committed_sequence_number,
        l.reset_sequence_number, l.num_committed_tokens, {CLOCK},
        CASE WHEN l.first_token_at IS NOT NULL THEN {CLOCK} END, {CLOCK},
        {CLOCK} + make_interval(secs => f.result_ttl_seconds), {CLOCK}
    FROM fresh f JOIN load USING (tenant_id) JOIN jobs l ON l.id = f.leader_id AND l.tenant_id = f.tenant_id
    WHERE {HAS_ROOM} AND EXISTS (SELECT FROM job_results r WHERE r.job_id = l.id)
    ON CONFLICT DO NOTHING
    RETURNING j.id, j.tenant_id, j.attempt, j.answered_by, j.lane, j.model_revision, j.finish_reason,
        j.committed_sequence_number, j.reset_sequence_number, j.num_committed_tokens, {IS_TOLD}, {RECORDED_COLUMNS}
),
{PAYLOAD},
copied AS (
    INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
    SELECT i.id, c.sequence_number, 0, c.chunk FROM inserted i JOIN job_chunks c ON c.job_id = i.answered_by
),
written AS (
    INSERT INTO job_results (job_id, attempt, result)
    SELECT i.id, 0, r.result FROM inserted i JOIN job_results r ON r.job_id = i.answered_by
),
{ends_recorded("inserted", outcome="'completed'", condition="true")}
SELECT id, answered_by, lane, model_revision, finish_reason, committed_sequence_number, reset_sequence_number,
    num_committed_tokens, accepted_at, first_token_at, is_told FROM inserted
""")


def accept_answered(
    session: Session,
    new_jobs: Sequence[NewJob],
    *,
    max_age_seconds: float,
    max_queued_jobs: int,
    max_poison_jobs_per_hour: int,
) -> dict[UUID, Accepted]:
    """Insert those of these jobs whose answers are known, as completed, and return them by their ids. Nothing has
    become of the others."""
    asking = [job for job in new_jobs if job.answer_key is not None and job.idempotency_key is None]
    leaders = _find(session, asking, max_age_seconds) if asking else {}
    answered = [(job, leaders[key]) for job in asking if (key := (job.tenant_id, job.answer_key)) in leaders]
    if not answered:
        return {}
    parameters = {
        "jobs": document_of([row_of(place, job, leader) for place, (job, (leader, _)) in enumerate(answered)]),
        "max_queued_jobs": max_queued_jobs,
        "max_poison_jobs_per_hour": max_poison_jobs_per_hour,
    }
    row_by_id = {row.id: row for row in session.execute(ACCEPT_ANSWERED, parameters)}
    write_deliveries(session, [row.id for row in row_by_id.values() if row.is_told])
    return {job.id: _accepted(job, row_by_id[job.id], result) for job, (_, result) in answered if job.id in row_by_id}


def _find(
    session: Session, asking: Sequence[NewJob], max_age_seconds: float
) -> dict[tuple[UUID, bytes | None], tuple[UUID, JobOutput]]:
    """The leader and its output by what was asked."""
    kinds = {(job.tenant_id, job.answer_key): job.request.kind for job in asking}
    parameters = {
        "tenant_ids": [tenant_id for tenant_id, _ in kinds],
        "keys": Packed(key for _, key in kinds),
        "max_age_seconds": max_age_seconds,
        "live_seconds": LIVE_SECONDS,
    }
    found: dict[tuple[UUID, bytes | None], tuple[UUID, JobOutput]] = {}
    unreadable: list[UUID] = []
    for row in session.execute(FIND, parameters):
        key = row.tenant_id, bytes(row.key)
        result: JobOutput | None = None
        with suppress(ValidationError):
            result = RESULT.validate_python(row.result)
        if result is None or not is_whole_output(result, kinds[key]):
            unreadable.append(row.leader_id)
            continue
        found[key] = row.leader_id, result
    if unreadable:
        log.warning("answers that cannot be read are forgotten", extra={"num_jobs": len(unreadable)})
        forget(session, unreadable)
    return found


def _accepted(new_job: NewJob, row: Row[Any], result: JobOutput) -> Accepted:
    body = None if new_job.endpoint_body is None else orjson.loads(new_job.endpoint_body)
    record = JobRecord(_born(new_job, row), new_job.request, result, body)
    return Accepted(new_job.id, AcceptOutcome.ACCEPTED, row.accepted_at, record)


def _born(new_job: NewJob, row: Row[Any]) -> Job:
    """The job's row. Its attributes are set as SQLAlchemy's loader sets them, without noting a change of each."""
    now, request, is_to_start = row.accepted_at, new_job.request, new_job.start_timeout_seconds is not None
    job: Job = Job.__mapper__.class_manager.new_instance()
    job.__dict__.update(
        id=new_job.id,
        tenant_id=new_job.tenant_id,
        model=request.model_id,
        adapter=request.adapter,
        model_revision=row.model_revision,
        endpoint=new_job.endpoint,
        is_stored=new_job.is_stored,
        kind=request.kind,
        lane=Lane(row.lane),
        priority=new_job.priority,
        idempotency_key=None,
        request_hash=new_job.request_hash,
        status=JobStatus.COMPLETED,
        attempt=0,
        num_failures=0,
        max_failures=new_job.max_failures,
        num_suspicions=0,
        available_at=now,
        start_deadline_at=now + timedelta(seconds=new_job.start_timeout_seconds or 0.0) if is_to_start else None,
        deadline_at=new_job.deadline_at,
        asked_deadline_at=new_job.deadline_at,
        run_timeout_seconds=new_job.run_timeout_seconds,
        dispatch_at=now,
        num_dispatches=0,
        lease_owner=None,
        lease_expires_at=None,
        cancel_requested_at=None,
        committed_sequence_number=row.committed_sequence_number,
        reset_sequence_number=row.reset_sequence_number,
        num_committed_tokens=row.num_committed_tokens,
        num_prompt_tokens=len(new_job.prompt_token_ids),
        max_tokens=new_job.max_tokens,
        seed=new_job.seed,
        cost=new_job.cost,
        finish_reason=row.finish_reason and FinishReason(row.finish_reason),
        error=None,
        job_metadata=new_job.metadata,
        result_ttl_seconds=new_job.result_ttl_seconds,
        webhook_url=new_job.webhook_url,
        webhook_statuses=list(new_job.webhook_statuses) if new_job.webhook_url else None,
        created_at=now,
        started_at=now,
        first_token_at=row.first_token_at,
        finished_at=now,
        delivered_at=now,
        prune_at=now + timedelta(seconds=new_job.result_ttl_seconds),
        attempt_started_at=None,
        progressed_at=None,
        num_tokens_at_claim=0,
        paused_at=None,
        retry_of=new_job.retry_of,
        answered_by=row.answered_by,
        key_id=new_job.key_id,
        engine_seconds=0.0,
        eta=new_job.eta and list(new_job.eta.stored),
    )
    return job
