"""Answers that are known: a job gets the output of an earlier job of its tenant that asked for the same.

A row of `answers` names, for a tenant and a key, the job that has the answer or will have it, its leader. A job that
asks for what its leader has completed is completed with a copy of the output. While the leader waits or runs, it
follows: it is put off, and ends with the leader. If the leader ends in any other way or is deleted, its followers go on
by themselves, in the place that they had in the queue. A job is only ever ended while it waits and has never been
claimed, so whatever happens between these statements, it runs.

All functions are synchronous on a `Session` and do not commit. docs/adr/0057 says why this is not in Redis.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from domain.jobs import JobStatus
from storage.job_accept import NewJob
from storage.job_ends import told
from storage.job_statements import CLOCK, COUNTED, Packed
from storage.jobs import Returned
from storage.webhooks import IS_TOLD, write_deliveries

PUT_OFF_SECONDS = 3_600  # how long a job follows at most

# Completes the jobs of the CTE `pair(id, leader_id)` with their leaders' output.
COMPLETED = f"""
pick AS MATERIALIZED (
    SELECT j.id, pair.leader_id FROM pair JOIN jobs j ON j.id = pair.id
    WHERE j.status = 'queued' AND j.attempt = 0 AND j.cancel_requested_at IS NULL ORDER BY j.id FOR NO KEY UPDATE OF j
),
copied AS (
    INSERT INTO job_chunks (job_id, sequence_number, attempt, chunk)
    SELECT pick.id, c.sequence_number, 0, c.chunk FROM pick JOIN job_chunks c ON c.job_id = pick.leader_id
),
written AS (
    INSERT INTO job_results (job_id, attempt, result)
    SELECT pick.id, 0, r.result FROM pick JOIN job_results r ON r.job_id = pick.leader_id
),
answered AS (
    UPDATE jobs j SET status = 'completed', answered_by = l.id, finish_reason = l.finish_reason,
        model_revision = l.model_revision, committed_sequence_number = l.committed_sequence_number,
        reset_sequence_number = l.reset_sequence_number, num_committed_tokens = l.num_committed_tokens,
        started_at = {CLOCK}, first_token_at = CASE WHEN l.first_token_at IS NOT NULL THEN {CLOCK} END,
        finished_at = {CLOCK}, prune_at = {CLOCK} + make_interval(secs => j.result_ttl_seconds)
    FROM pick JOIN jobs l ON l.id = pick.leader_id WHERE j.id = pick.id
    RETURNING j.id, j.model, j.tenant_id, j.status, j.attempt, j.num_committed_tokens, j.created_at, {IS_TOLD}
),
moved AS (SELECT id, tenant_id, -1 AS queued, 0 AS running, 0 AS charge FROM answered),
{COUNTED}
{told("answered", has_chunks="false")}"""

# A leader counts as long as it may still complete, or as its output is there and young enough.
ANSWER = text(f"""
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:tenant_ids AS uuid[]), CAST(:keys AS bytea[]))
        WITH ORDINALITY AS a(id, tenant_id, key, place)
),
known AS MATERIALIZED (
    SELECT s.*, l.id AS leader_id, l.status = 'completed' AS is_answered FROM asked s
    LEFT JOIN answers a ON a.tenant_id = s.tenant_id AND a.key = s.key
        AND a.created_at > {CLOCK} - make_interval(secs => :max_age_seconds)
    LEFT JOIN jobs l ON l.id = a.job_id AND l.tenant_id = s.tenant_id AND l.cancel_requested_at IS NULL
        AND (l.status IN ('queued', 'in_progress')
            OR (l.status = 'completed' AND EXISTS (SELECT FROM job_results r WHERE r.job_id = l.id)))
),
leaders AS MATERIALIZED (
    SELECT DISTINCT ON (tenant_id, key) id, tenant_id, key FROM known WHERE leader_id IS NULL
    ORDER BY tenant_id, key, place
),
led AS (
    INSERT INTO answers (tenant_id, key, job_id, created_at)
    SELECT tenant_id, key, id, {CLOCK} FROM leaders ORDER BY tenant_id, key
    ON CONFLICT (tenant_id, key) DO UPDATE SET job_id = excluded.job_id, created_at = excluded.created_at
),
put_off AS (
    UPDATE jobs j SET available_at = {CLOCK} + make_interval(secs => {PUT_OFF_SECONDS})
    FROM known k LEFT JOIN leaders l ON l.tenant_id = k.tenant_id AND l.key = k.key
    WHERE j.id = k.id AND k.is_answered IS NOT TRUE AND coalesce(k.leader_id, l.id) <> k.id
        AND j.status = 'queued' AND j.attempt = 0
    RETURNING j.id, coalesce(k.leader_id, l.id) AS leader_id
),
followed AS (
    INSERT INTO job_followers (job_id, leader_id) SELECT id, leader_id FROM put_off ON CONFLICT DO NOTHING
),
pair AS (SELECT id, leader_id FROM known WHERE is_answered),
{COMPLETED}
""")

END_FOLLOWERS = text(f"""
WITH pair AS MATERIALIZED (
    SELECT f.job_id AS id, f.leader_id FROM job_followers f JOIN jobs l ON l.id = f.leader_id
    WHERE l.status = 'completed' AND EXISTS (SELECT FROM job_results r WHERE r.job_id = l.id) LIMIT :limit
),
forgotten AS (DELETE FROM job_followers f USING pair WHERE f.job_id = pair.id),
{COMPLETED}
""")

LET_GO = text(f"""
WITH alone AS (
    DELETE FROM job_followers f USING jobs j WHERE j.id = f.job_id AND (
        j.status <> 'queued' OR j.attempt > 0 OR j.available_at <= {CLOCK}
        OR NOT EXISTS (SELECT FROM jobs l WHERE l.id = f.leader_id AND l.cancel_requested_at IS NULL
            AND (l.status IN ('queued', 'in_progress')
                OR (l.status = 'completed' AND EXISTS (SELECT FROM job_results r WHERE r.job_id = l.id)))))
    RETURNING f.job_id
)
UPDATE jobs j SET available_at = j.created_at FROM alone
WHERE j.id = alone.job_id AND j.status = 'queued' AND j.attempt = 0 AND j.available_at > {CLOCK}
""")


def answer(session: Session, new_jobs: Sequence[NewJob], *, max_age_seconds: float) -> list[Returned]:
    """Complete those of these accepted jobs whose answers are known, and have the others lead or follow. Each must have
    an `answer_key`. Returns those that were completed."""
    parameters = {
        "ids": [job.id for job in new_jobs],
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "keys": Packed(job.answer_key for job in new_jobs),
        "max_age_seconds": max_age_seconds,
    }
    return _ended(session, session.execute(ANSWER, parameters).all())


def end_followers(session: Session, *, limit: int = 200) -> list[Returned]:
    """Complete jobs whose leaders have completed, and let go of those whose leaders never will. Returns those that were
    completed."""
    ended = _ended(session, session.execute(END_FOLLOWERS, {"limit": limit}).all())
    session.execute(LET_GO)
    return ended


def _ended(session: Session, rows: Sequence[Row[tuple[object, ...]]]) -> list[Returned]:
    ended = [
        Returned(row.id, JobStatus(row.status), row.attempt, row.model, row.num_tokens, row.seconds, row.request_id)
        for row in rows
    ]
    told_ids: list[UUID] = [row.id for row in rows if row.is_told]
    write_deliveries(session, told_ids)
    return ended
