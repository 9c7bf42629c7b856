"""The job protocol: every transition of an accepted job is one fenced compare-and-set statement.

This module is the only writer of `Job.status`, except for `storage/job_accept.py`, where jobs come in. All functions
are synchronous on a `Session` and do not commit; the API calls them through `AsyncSession.run_sync`. Only the
database's clock sets and judges leases and deadlines. The statements are in `storage/job_statements.py` and
`storage/job_ends.py`; reading is in `storage/job_queries.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, TextClause, select
from sqlalchemy.orm import Session

from domain.jobs import MIN_PRIORITY, FinishReason, JobError, JobStatus, Lane
from domain.requests import REQUEST, JobOutput, JobRequest, TokenChunk
from storage import job_ends as ends
from storage import job_statements as sql
from storage.job_accept import Accepted, AcceptOutcome, NewJob, accept
from storage.job_ends import ERRORS, store_partial_results
from storage.job_statements import Packed
from storage.tables import Job, JobPayload
from storage.webhooks import write_deliveries

DEPTH = 16  # how much further than needed a tenant's queue is read, since others may hold locks at its head


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job this worker now owns under `attempt`, with all it needs to start or to continue earlier attempts."""

    id: UUID
    tenant_id: UUID
    attempt: int
    request: JobRequest
    prompt_token_ids: list[int]
    max_tokens: int
    seed: int
    priority: int
    lane: Lane
    num_suspicions: int  # above 0: it was in an engine that crashed and has not been cleared since
    committed_chunks: list[TokenChunk]  # in order; empty on a first attempt
    input_lengths: list[int] | None = None
    request_id: str | None = None  # of the HTTP request that submitted it
    seconds_since_accept: float = 0.0  # at the claim
    seconds_since_start: float = 0.0  # since the first claim; 0 if this is the first

    @property
    def last_sequence_number(self) -> int:
        return _last_number(self.committed_chunks)

    @property
    def num_committed_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.committed_chunks)


@dataclass(frozen=True, slots=True)
class ChunkCommit:
    """The chunks one job gained in this flush: consecutive, starting at committed_sequence_number + 1."""

    job_id: UUID
    attempt: int
    chunks: Sequence[TokenChunk]


@dataclass(frozen=True, slots=True)
class Held:
    """What a successful commit or renewal returns for a job that is still ours: what its client wants."""

    job_id: UUID
    attempt: int
    is_cancel_requested: bool
    is_past_deadline: bool


@dataclass(frozen=True, slots=True)
class Finalisation:
    """The end of one attempt. `last_sequence_number` is the last chunk committed: a second fence besides `attempt`."""

    job_id: UUID
    attempt: int
    last_sequence_number: int
    status: JobStatus
    result: JobOutput | None
    finish_reason: FinishReason | None = None
    error: JobError | None = None


@dataclass(frozen=True, slots=True)
class Returned:
    """The state of a job that was given back, cut off or asked to stop: `queued` again, terminal, or still running."""

    job_id: UUID
    status: JobStatus
    attempt: int
    model: str = ""
    num_tokens: int = 0  # committed
    seconds: float = 0.0  # since it was accepted
    request_id: str | None = None
    is_moved: bool = True  # False: it had ended before, and the call changed nothing


@dataclass(frozen=True, slots=True)
class Restarted:
    """A queued job that starts over under another revision of its model; `num_tokens` were discarded."""

    job_id: UUID
    attempt: int
    num_tokens: int
    request_id: str | None


def dispatch(session: Session, model: str, *, room: int, min_priority: int = MIN_PRIORITY) -> list[UUID]:
    """Mark up to `room` due jobs of `model` as dispatched, fairest first, and return their ids in order. They become
    due again if nobody claims them. Jobs below `min_priority` (batch lines) are skipped; they are dispatched separately
    within their share."""
    if room <= 0:
        return []
    parameters = {"model": model, "room": room, "depth": 2 * room + DEPTH, "min_priority": min_priority}
    return list(session.execute(sql.DISPATCH, parameters).scalars())


def claim(
    session: Session,
    job_ids: Sequence[UUID],
    *,
    owner: UUID,
    model_revision: str,
    lease_seconds: float,
    lane: Lane = Lane.STANDARD,
) -> list[ClaimedJob]:
    """Take the queued ones among `job_ids`: attempt + 1, lease, request and committed prefix, in one round trip. A job
    with output is only taken under its own `model_revision`; any other gets this revision. A job missing from the
    result is done, cancelled, expired, or claimed by another worker: drop its message."""
    if not job_ids:
        return []
    parameters = {
        "ids": list(job_ids),
        "owner": owner,
        "model_revision": model_revision,
        "lease_seconds": lease_seconds,
        "lane": lane.value,
    }
    return _claimed_jobs(session, session.execute(sql.CLAIM, parameters).all())


def claim_next(
    session: Session,
    model: str,
    *,
    limit: int,
    owner: UUID,
    model_revision: str,
    lease_seconds: float,
    lane: Lane = Lane.STANDARD,
    min_suspicions: int = 0,
) -> list[ClaimedJob]:
    """Claim due jobs directly from SQL, fairest first, for a worker with free slots that gets no messages. It also
    takes dispatched jobs; the receiver of their message then finds nothing to claim. Only this serves the isolated
    lane, whose jobs are never dispatched. With `min_suspicions` only those isolated because of crashes, not because of
    their tenant or a retry."""
    if limit <= 0:
        return []
    parameters = {
        "model": model,
        "limit": limit,
        "depth": 2 * limit + DEPTH,
        "owner": owner,
        "model_revision": model_revision,
        "lease_seconds": lease_seconds,
        "lane": lane.value,
        "min_suspicions": min_suspicions,
    }
    return _claimed_jobs(session, session.execute(sql.CLAIM_NEXT, parameters).all())


def commit_chunks(session: Session, commits: Sequence[ChunkCommit], *, lease_seconds: float) -> list[Held]:
    """Append the chunks of the whole running batch, renew the leases and read the cancel flags, in one statement. A job
    missing from the result was fenced off: abort its sequences and publish nothing. Safe to repeat after an ambiguous
    commit. Pass each job at most once, with at least one chunk."""
    if not commits:
        return []
    parameters = of_commits(commits) | {"lease_seconds": lease_seconds}
    return [Held(*row) for row in session.execute(sql.COMMIT_CHUNKS, parameters)]


def renew(session: Session, job_ids: Sequence[UUID], *, owner: UUID, lease_seconds: float) -> list[Held]:
    """Renew the leases of jobs without a recent chunk. Jobs missing from the result are no longer ours."""
    if not job_ids:
        return []
    parameters = {"ids": list(job_ids), "owner": owner, "lease_seconds": lease_seconds}
    return [Held(*row) for row in session.execute(sql.RENEW, parameters)]


def finalise(session: Session, finalisations: Sequence[Finalisation]) -> list[UUID]:
    """Make jobs terminal, with their results. Returns the ids that were ours to end, including those already ended by
    an earlier call with an ambiguous commit. Without a result, the committed chunks become a partial one."""
    if not finalisations:
        return []
    rows = session.execute(ends.FINALISE, of_endings(finalisations)).all()
    ended = [row.id for row in rows]
    without_result = {
        ending.job_id: ending.status
        for ending in finalisations
        if ending.result is None and ending.last_sequence_number > 0 and ending.job_id in ended
    }
    store_partial_results(session, without_result)
    write_deliveries(session, [row.id for row in rows if row.is_told])
    return ended


def release(session: Session, job_ids: Sequence[UUID], *, owner: UUID) -> list[Returned]:
    """Give running jobs back to their old place in the queue, with the committed prefix and without charging a failure
    (drain). Jobs with a requested cancel end as cancelled instead."""
    if not job_ids:
        return []
    return _returned(session, ends.RELEASE, {"ids": list(job_ids), "owner": owner})


def report_crash(session: Session, weight_by_job_id: dict[UUID, int], *, owner: UUID) -> list[Returned]:
    """Give back the jobs of a crashed engine: each is charged one failure, suspicion grows by weight, and from 2 on the
    job is isolated. A job with a weight that crashed an engine while isolated (alone) fails for good."""
    if not weight_by_job_id:
        return []
    parameters = {"ids": list(weight_by_job_id), "weights": list(weight_by_job_id.values()), "owner": owner}
    return _returned(session, ends.REPORT_CRASH, parameters | ERRORS)


def rescue(
    session: Session, *, as_of: datetime, grace_seconds: float, quiet_seconds: float, limit: int = 200
) -> list[Returned]:
    """Give back the jobs whose lease had lapsed `grace_seconds` before `as_of` (database clock). Does nothing until the
    server has been up for `quiet_seconds`, since after an outage every lease looks lapsed."""
    parameters = {"as_of": as_of, "grace_seconds": grace_seconds, "quiet_seconds": quiet_seconds, "limit": limit}
    return _returned(session, ends.RESCUE, parameters | ERRORS)


def release_stalled(session: Session, *, as_of: datetime, stall_seconds: float, limit: int = 200) -> list[Returned]:
    """Take jobs from owners that renew leases but had not committed a token for `stall_seconds` at `as_of`; charged
    like a lost worker."""
    return _returned(session, ends.STALL, {"as_of": as_of, "stall_seconds": stall_seconds, "limit": limit} | ERRORS)


def cancel(session: Session, job_id: UUID, tenant_id: UUID) -> Returned | None:
    """Cancel a queued job now, or ask a running one to stop. Returns its state afterwards; None: the tenant has no such
    job. Idempotent: a terminal job keeps its status."""
    asked = _returned(session, ends.CANCEL, {"ids": [job_id], "tenant_id": tenant_id})
    if asked:
        return asked[0]
    row = session.execute(select(Job.status, Job.attempt).where(Job.id == job_id, Job.tenant_id == tenant_id)).first()
    return None if row is None else Returned(job_id, row.status, row.attempt, is_moved=False)


def request_cancel(session: Session, job_ids: Sequence[UUID]) -> list[Returned]:
    """Cancel jobs on behalf of Flower or `celery control`, called by the worker that owns them: as `cancel`, without a
    tenant. Returns those that were not terminal."""
    if not job_ids:
        return []
    return _returned(session, ends.CANCEL, {"ids": list(job_ids), "tenant_id": None})


def expire(session: Session, *, limit: int = 200) -> list[Returned]:
    """End queued jobs whose deadline or start deadline passed."""
    return _returned(session, ends.EXPIRE, {"limit": limit} | ERRORS)


def gone_revisions(session: Session, *, live_seconds: float) -> dict[tuple[str, str], int]:
    """By (model, revision), how many queued jobs have output of a revision that is gone. Reads every queued job: call
    at most every few seconds."""
    rows = session.execute(ends.GONE_REVISIONS, {"live_seconds": live_seconds})
    return {(row.model, row.model_revision): row.num_jobs for row in rows}


def restart(
    session: Session, model: str, model_revision: str, *, live_seconds: float, limit: int = 200
) -> list[Restarted]:
    """Let queued jobs with output of this revision, which must be gone, start over under the one that is served: their
    chunks are discarded, and a reset in their stream tells every reader."""
    parameters = {"model": model, "model_revision": model_revision, "live_seconds": live_seconds, "limit": limit}
    return [Restarted(*row) for row in session.execute(ends.RESTART, parameters)]


def fail_gone(
    session: Session, model: str, model_revision: str, *, live_seconds: float, limit: int = 200
) -> list[Returned]:
    """End such jobs as failed instead; their output is kept."""
    parameters = {"model": model, "model_revision": model_revision, "live_seconds": live_seconds, "limit": limit}
    return _returned(session, ends.FAIL_GONE, parameters | ERRORS)


def prune(session: Session, *, limit: int = 200) -> int:
    """Delete finished jobs older than their result_ttl_seconds with all that belongs to them, and expired poison
    records."""
    session.execute(ends.FORGET_POISON)
    return _num_rows(session, ends.PRUNE, {"limit": limit})


def redispatch_all(session: Session) -> int:
    """Make every queued job due for a message now: Redis lost what it held."""
    return _num_rows(session, sql.REDISPATCH_ALL, {})


def delete(session: Session, job_id: UUID, tenant_id: UUID) -> bool:
    """Delete a job with its input and output; the owner of a running one is fenced off."""
    return session.scalar(ends.DELETE, {"id": job_id, "tenant_id": tenant_id}) is not None


def _returned(session: Session, statement: TextClause, parameters: dict[str, Any]) -> list[Returned]:
    """Run a statement that ends jobs or gives them back; store partial results and webhook deliveries of the ended."""
    rows = session.execute(statement, parameters).all()
    returned = [
        Returned(row.id, JobStatus(row.status), row.attempt, row.model, row.num_tokens, row.seconds, row.request_id)
        for row in rows
    ]
    cut_off = {job.job_id: job.status for job, row in zip(returned, rows, strict=True) if row.has_chunks}
    store_partial_results(session, {id: status for id, status in cut_off.items() if status.is_terminal})
    told = [job.job_id for job, row in zip(returned, rows, strict=True) if row.is_told and job.status.is_terminal]
    write_deliveries(session, told)
    return returned


def _num_rows(session: Session, statement: TextClause, parameters: dict[str, Any]) -> int:
    result = session.connection().execute(statement, parameters)
    return int(result.rowcount)


def _claimed_jobs(session: Session, rows: Sequence[Row[Any]]) -> list[ClaimedJob]:
    # While the statement waited for a row, another worker may have claimed, continued and released the job, whose
    # newest chunks are then not in the statement's snapshot.
    chunks = {row.id: _parsed(row.chunks) for row in rows}
    stale = [row.id for row in rows if _last_number(chunks[row.id]) != row.committed_sequence_number]
    if stale:
        chunks |= {row.job_id: _parsed(row.chunks) for row in session.execute(sql.CHUNKS_OF, {"ids": stale})}
    return [
        ClaimedJob(
            id=row.id,
            tenant_id=row.tenant_id,
            attempt=row.attempt,
            request=REQUEST.validate_json(row.request),
            prompt_token_ids=row.prompt_token_ids,
            max_tokens=row.max_tokens,
            seed=row.seed,
            priority=row.priority,
            input_lengths=row.input_lengths,
            lane=Lane(row.lane),
            num_suspicions=row.num_suspicions,
            committed_chunks=chunks[row.id],
            request_id=row.request_id,
            seconds_since_accept=row.seconds_since_accept,
            seconds_since_start=row.seconds_since_start,
        )
        for row in rows
    ]


def _parsed(chunks: Sequence[str] | None) -> list[TokenChunk]:
    return [TokenChunk.model_validate_json(chunk) for chunk in chunks or ()]


def _last_number(chunks: Sequence[TokenChunk]) -> int:
    return chunks[-1].sequence_number if chunks else 0


def of_commits(commits: Sequence[ChunkCommit]) -> dict[str, Any]:
    return {
        "ids": [commit.job_id for commit in commits],
        "attempts": [commit.attempt for commit in commits],
        "before": [commit.chunks[0].sequence_number - 1 for commit in commits],
        "after": [commit.chunks[-1].sequence_number for commit in commits],
        "num_tokens": [sum(len(chunk.token_ids) for chunk in commit.chunks) for commit in commits],
        "chunks": Packed(_json_array(commit.chunks) for commit in commits),
    }


def of_endings(finalisations: Sequence[Finalisation]) -> dict[str, Any]:
    return {
        "ids": [ending.job_id for ending in finalisations],
        "attempts": [ending.attempt for ending in finalisations],
        "last": [ending.last_sequence_number for ending in finalisations],
        "statuses": [ending.status.value for ending in finalisations],
        "finish_reasons": [ending.finish_reason and ending.finish_reason.value for ending in finalisations],
        "errors": Packed(ending.error and ending.error.model_dump_json() for ending in finalisations),
        "error_codes": [ending.error and ending.error.code for ending in finalisations],
        "results": Packed(ending.result and ending.result.model_dump_json() for ending in finalisations),
    }


def _json_array(chunks: Sequence[TokenChunk]) -> str:
    return "[" + ",".join(chunk.model_dump_json(exclude_defaults=True) for chunk in chunks) + "]"


def retry(session: Session, new_job: NewJob, keeps_output: bool, *, max_queued_jobs: int) -> Accepted:
    """Accept a job that is a `retry_of` an ended one; with `keeps_output` it continues where that was cut off, if the
    revision is the same. Its idempotency key must name the old job, so that a repeated call finds the first one."""
    known = session.scalar(select(JobPayload.fingerprint).where(JobPayload.job_id == new_job.retry_of))
    new_job = replace(new_job, fingerprint=known or new_job.fingerprint)
    [accepted] = accept(session, [new_job], max_queued_jobs=max_queued_jobs)
    if keeps_output and accepted.outcome is AcceptOutcome.ACCEPTED:
        session.execute(sql.INHERIT, {"id": new_job.id})
    return accepted
