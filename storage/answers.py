"""Answers that are known: a job gets the output of an earlier job of its tenant that asked for the same.

A row of `answers` names, for a tenant and a key, the job that has the answer or will have it, its leader. A job that
asks for what its leader has completed is completed with a copy of the output. While the leader waits or runs, it
follows: it is put off, and ends with the leader, which is as urgent as the most urgent of those that it runs for, as
far as the keys of both allow. If the leader is cancelled, expires or is deleted, one of its followers leads the others,
in the place that it had in the queue; if it fails, each goes on by itself. A job is only ever ended while it waits and
has never been claimed, so whatever happens between these statements, it runs.

`answer` is part of the transaction that accepts the jobs, after `storage/answered_jobs.py`, which has inserted most of
those whose answers are known as completed. So what follows another request of its tenant sees it: the
accept holds a lock on the tenant's load until the commit. Nobody but the accept waits for locks in `answers`.

All functions are synchronous on a `Session` and do not commit. docs/adr/0057 says why this is not in Redis.
"""

# ruff: noqa: S608  (only constants of the storage modules are inserted into the text; values are bound)

from collections.abc import Mapping, Sequence
from contextlib import suppress
from uuid import UUID

import orjson
from pydantic import ValidationError
from sqlalchemy import ARRAY, JSON, Row, Uuid, any_, bindparam, case, func, select, text, type_coerce
from sqlalchemy.orm import Session

from domain.jobs import JobKind
from domain.requests import RESULT, JobOutput, is_whole_output
from storage.job_accept import NewJob
from storage.job_ends import is_gone, told
from storage.job_queries import JobRecord
from storage.job_statements import CLOCK, COUNTED, LEAVES_QUEUE, Packed
from storage.jobs import Returned
from storage.tables import Job, JobResult
from storage.usage import RECORDED_COLUMNS, ends_recorded
from storage.webhooks import IS_TOLD, write_deliveries
from storage.workers import LIVE_SECONDS

MAX_PRIORITY = 10  # of any key

NEVER_CLAIMED = "j.status || '' = 'queued' AND j.attempt = 0"  # found by id; see RUNNING in job_statements

PUT_OFF_SECONDS = 3_600  # how long a job follows at most

FOLLOWS = f"j.status = 'queued' AND j.attempt = 0 AND j.available_at > {CLOCK}"

# Whether the leader `l` has all that another job is completed with: its chunks, of which a reset is the first, too.
HAS_OUTPUT = """l.status = 'completed' AND EXISTS (SELECT FROM job_results r WHERE r.job_id = l.id)
    AND (SELECT count(*) FROM job_chunks c WHERE c.job_id = l.id)
        = l.committed_sequence_number - greatest(l.reset_sequence_number - 1, 0)"""

# Those that are followed, each once: to count its chunks takes time. Those that are deleted have no row here.
LEADER = f"""
leader AS MATERIALIZED (
    SELECT l.id, l.status, l.attempt, l.status IN ('queued', 'in_progress') OR ({HAS_OUTPUT}) AS may_answer,
        l.cancel_requested_at IS NOT NULL AS is_cancelled
    FROM (SELECT DISTINCT leader_id FROM job_followers) f JOIN jobs l ON l.id = f.leader_id
)"""

# Completes the jobs of the CTE `pair(id, leader_id)` with their leaders' output. In the ledger they have an end and no
# attempt, and no tokens: nothing was computed. A job that somebody else has locked is left alone for now.
COMPLETED = f"""
pick AS MATERIALIZED (
    SELECT j.id, pair.leader_id FROM pair JOIN jobs j ON j.id = pair.id
    WHERE {NEVER_CLAIMED} AND j.cancel_requested_at IS NULL
    ORDER BY j.id FOR NO KEY UPDATE OF j SKIP LOCKED
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
    RETURNING j.id, j.model, j.tenant_id, j.status, j.attempt, j.num_committed_tokens, j.created_at, {IS_TOLD},
        {RECORDED_COLUMNS}
),
{ends_recorded("answered", outcome="o.status", condition="true")},
moved AS (SELECT id, tenant_id, {LEAVES_QUEUE} FROM answered),
{COUNTED}
{told("answered", has_chunks="false")}"""


def _max_priority(job: str) -> str:
    """That of the key of the job, as in `job_statements.lead`."""
    of_key = f"coalesce((SELECT k.max_priority FROM api_keys k WHERE k.id = {job}.key_id), 0)"
    return f"CASE WHEN {job}.key_id IS NULL THEN {MAX_PRIORITY} ELSE {of_key} END"


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
        AND (l.status IN ('queued', 'in_progress') OR ({HAS_OUTPUT} AND NOT ({is_gone("l.model", "l.model_revision")})))
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
fresh AS MATERIALIZED (  -- all that change
    SELECT j.id, k.is_answered, coalesce(k.leader_id, l.id) AS leader_id
    FROM known k LEFT JOIN leaders l ON l.tenant_id = k.tenant_id AND l.key = k.key JOIN jobs j ON j.id = k.id
    WHERE coalesce(k.leader_id, l.id) <> k.id AND {NEVER_CLAIMED} ORDER BY j.id FOR NO KEY UPDATE OF j
),
put_off AS (  -- its start was estimated as if it would wait for a slot only
    UPDATE jobs j SET available_at = {CLOCK} + make_interval(secs => {PUT_OFF_SECONDS}), eta = NULL
    FROM fresh WHERE j.id = fresh.id AND fresh.is_answered IS NOT TRUE
    RETURNING j.id, fresh.leader_id, j.priority, j.key_id
),
wished AS MATERIALIZED (  -- no lead over other tenants' jobs that the follower itself would not have
    SELECT p.leader_id, max(CASE WHEN {_max_priority("p")} >= {_max_priority("l")} THEN p.priority
        ELSE least(p.priority, {_max_priority("p")}) END) AS priority
    FROM put_off p JOIN jobs l ON l.id = p.leader_id GROUP BY 1
),
urged AS MATERIALIZED (  -- a claim, which holds its row and waits for the tenant's load, is not waited for
    SELECT l.id, wished.priority FROM wished JOIN jobs l ON l.id = wished.leader_id
    WHERE l.status || '' = 'queued' AND l.priority < wished.priority ORDER BY l.id FOR NO KEY UPDATE OF l SKIP LOCKED
),
raised AS (UPDATE jobs l SET priority = urged.priority FROM urged WHERE l.id = urged.id),
followed AS (
    INSERT INTO job_followers (job_id, leader_id) SELECT id, leader_id FROM put_off ON CONFLICT DO NOTHING
),
pair AS MATERIALIZED (  -- the count locks all of them before tenant_load
    SELECT id, leader_id FROM fresh WHERE is_answered AND (SELECT count(*) FROM fresh) >= 0
),
{COMPLETED}
""")

_IS_FIRST = func.row_number().over(partition_by=Job.answered_by, order_by=Job.id) == 1

# The output of each leader once, as many of the jobs may have the same one. It may be one that cannot be read.
COMPLETE = (
    select(Job, case((_IS_FIRST, type_coerce(JobResult.result, JSON))).label("result"))
    .join(JobResult, JobResult.job_id == Job.id)
    .where(Job.id == any_(bindparam("ids", type_=ARRAY(Uuid))))
)

END_FOLLOWERS = text(f"""
WITH {LEADER},
pair AS MATERIALIZED (
    SELECT f.job_id AS id, f.leader_id
    FROM job_followers f JOIN jobs j ON j.id = f.job_id JOIN leader l ON l.id = f.leader_id
    WHERE {NEVER_CLAIMED} AND l.status = 'completed' AND l.may_answer LIMIT :limit
),
{COMPLETED}
""")

# Of leaders whose result cannot be read: whoever asks next leads. Another accept that forgets them may have locked the
# counters for which this one will wait, so what it has locked here is left to it.
FORGET = text("""
DELETE FROM answers WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM answers WHERE job_id = ANY(CAST(:leader_ids AS uuid[])) FOR UPDATE SKIP LOCKED))
""")

# Forgets followers that have ended, and those that will not end with their leader: of those that one leader had, the
# first is the next leader, its heir, and the others follow it before it goes on. Only if the leader has failed does
# each go on by itself, as its heirs might fail one after another. If the leader had been started, which met the
# start_timeout of its followers, that begins anew. As when a job is deleted, its row is locked before the one in
# job_followers. In `answers` nothing is waited for: who has locked the entry is accepting another leader, or takes it
# away.
LET_GO = text(f"""
WITH {LEADER},
stray AS MATERIALIZED (
    SELECT j.id, f.leader_id, NOT ({FOLLOWS}) OR coalesce(l.status = 'failed', false) AS is_alone,
        coalesce(l.attempt > 0, true) AS was_started
    FROM job_followers f JOIN jobs j ON j.id = f.job_id LEFT JOIN leader l ON l.id = f.leader_id
    WHERE NOT ({FOLLOWS}) OR l.id IS NULL OR l.is_cancelled OR NOT l.may_answer
    LIMIT :limit FOR NO KEY UPDATE OF j SKIP LOCKED
),
heir AS MATERIALIZED (
    SELECT DISTINCT ON (f.leader_id) j.id, f.leader_id FROM job_followers f JOIN jobs j ON j.id = f.job_id
    WHERE f.leader_id IN (SELECT s.leader_id FROM stray s WHERE NOT s.is_alone) AND {FOLLOWS}
    ORDER BY f.leader_id, j.priority DESC, j.id
),
left_over AS MATERIALIZED (
    SELECT f.leader_id FROM job_followers f JOIN jobs j ON j.id = f.job_id
    WHERE f.leader_id IN (SELECT leader_id FROM heir) AND f.job_id NOT IN (SELECT id FROM stray) AND {FOLLOWS}
),
alone AS MATERIALIZED (
    SELECT s.id, h.leader_id FROM stray s LEFT JOIN heir h ON h.id = s.id
    WHERE s.is_alone OR (h.id IS NOT NULL AND h.leader_id NOT IN (SELECT leader_id FROM left_over))
),
forgotten AS (DELETE FROM job_followers f USING alone WHERE f.job_id = alone.id),
handed_over AS (
    UPDATE job_followers f SET leader_id = h.id FROM stray s JOIN heir h USING (leader_id)
    WHERE f.job_id = s.id AND NOT s.is_alone AND h.id <> s.id
),
entry AS MATERIALIZED (
    SELECT a.tenant_id, a.key, alone.id FROM answers a JOIN alone ON alone.leader_id = a.job_id
    FOR UPDATE OF a SKIP LOCKED
),
inherited AS (
    UPDATE answers a SET job_id = entry.id, created_at = {CLOCK} FROM entry
    WHERE a.tenant_id = entry.tenant_id AND a.key = entry.key
),
let_go AS (
    SELECT id, true AS goes_on FROM alone
    UNION ALL
    SELECT s.id, false FROM stray s JOIN heir h USING (leader_id) WHERE NOT s.is_alone AND h.id <> s.id
)
UPDATE jobs j SET available_at = CASE WHEN let_go.goes_on THEN j.created_at ELSE j.available_at END,
    start_deadline_at = CASE WHEN s.was_started THEN {CLOCK} + (j.start_deadline_at - j.created_at)
        ELSE j.start_deadline_at END
FROM let_go JOIN stray s ON s.id = let_go.id
WHERE j.id = let_go.id AND {NEVER_CLAIMED}
    AND (let_go.goes_on OR (s.was_started AND j.start_deadline_at IS NOT NULL))
""")


class UnreadableAnswers(Exception):
    """What was done with them is to be undone, and they are to be forgotten."""

    def __init__(self, leader_ids: Sequence[UUID]) -> None:
        super().__init__(f"the results of {len(leader_ids)} jobs cannot be read")
        self.leader_ids = leader_ids


def forget(session: Session, leader_ids: Sequence[UUID]) -> None:
    session.execute(FORGET, {"leader_ids": leader_ids})


def answer(session: Session, new_jobs: Sequence[NewJob], *, max_age_seconds: float) -> dict[UUID, JobRecord]:
    """Complete those of these accepted jobs whose answers are known, and have the others lead or follow. Each must have
    an `answer_key`. Returns those that were completed, by their ids. Raises UnreadableAnswers."""
    parameters = {
        "ids": [job.id for job in new_jobs],
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "keys": Packed(job.answer_key for job in new_jobs),
        "max_age_seconds": max_age_seconds,
        "live_seconds": LIVE_SECONDS,
    }
    completed = _ended(session, session.execute(ANSWER, parameters).all())
    if not completed:
        return {}
    rows = session.execute(COMPLETE, {"ids": [one.job_id for one in completed]}).all()
    result_by_leader = _read_results({job.answered_by: (job.kind, raw) for job, raw in rows if raw is not None})
    unreadable = {job.answered_by for job, _ in rows} - result_by_leader.keys()
    if unreadable:
        raise UnreadableAnswers(sorted(unreadable))
    new_job_by_id = {job.id: job for job in new_jobs}
    return {job.id: _record(job, result_by_leader[job.answered_by], new_job_by_id[job.id]) for job, _ in rows}


def _read_results(raw_by_leader: Mapping[UUID, tuple[JobKind, object]]) -> dict[UUID, JobOutput]:
    """Those that can be read."""
    results: dict[UUID, JobOutput] = {}
    for leader_id, (kind, raw) in raw_by_leader.items():
        with suppress(ValidationError):
            result = RESULT.validate_python(raw)
            if is_whole_output(result, kind):
                results[leader_id] = result
    return results


def _record(job: Job, result: JobOutput, new_job: NewJob) -> JobRecord:
    body = None if new_job.endpoint_body is None else orjson.loads(new_job.endpoint_body)
    return JobRecord(job, new_job.request, result, body)


def end_followers(session: Session, *, limit: int = 200) -> list[Returned]:
    """Let jobs whose leaders will never complete go on, and complete those whose leaders have. Returns those that were
    completed."""
    session.execute(LET_GO, {"limit": 2 * limit})  # those that were completed before, and others
    return _ended(session, session.execute(END_FOLLOWERS, {"limit": limit}).all())


def _ended(session: Session, rows: Sequence[Row[tuple[object, ...]]]) -> list[Returned]:
    ended = [Returned.of(row) for row in rows]
    told_ids: list[UUID] = [row.id for row in rows if row.is_told]
    write_deliveries(session, told_ids)
    return ended
