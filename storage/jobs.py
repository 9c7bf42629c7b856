"""The job protocol: every transition of an accepted job is one fenced compare-and-set statement.

Only this module, `storage/job_accept.py`, where jobs come in, and `storage/answered_jobs.py` and `storage/answers.py`,
where known answers end them, write `Job.status`. All functions are synchronous on a `Session` and do not commit; the
API calls them through `AsyncSession.run_sync`. Leases and deadlines are set and judged only by the database's clock.
The statements are in `storage/job_statements.py` and `storage/job_ends.py`; reading is in `storage/job_queries.py`.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Row, TextClause, select
from sqlalchemy.orm import Session

from domain.jobs import FinishReason, JobError, JobStatus, Lane, external_id
from domain.requests import REQUEST, JobOutput, JobRequest, TokenChunk
from storage import job_ends as ends
from storage import job_statements as sql
from storage.job_accept import Accepted, AcceptOutcome, NewJob, accept
from storage.job_ends import ERRORS
from storage.job_statements import Packed
from storage.partial_results import store_partial_results
from storage.tables import Job, JobPayload
from storage.usage import reasoning_tokens_of
from storage.webhooks import write_deliveries

log = logging.getLogger(__name__)

NUM_SPARE_ROWS = 16  # how many more jobs are read than needed, over all tenants, since those at the head may be locked

NUM_SPARE_TENANTS = 8  # how many more tenants' queues are read

UNREADABLE_SECONDS = 15.0  # before a worker tries a job again that none could read

UNFINISHED = [JobStatus.QUEUED, JobStatus.IN_PROGRESS]


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job that the worker now owns under `attempt`, with all that it needs to start, or to continue an earlier
    attempt."""

    id: UUID
    tenant_id: UUID
    attempt: int
    request: JobRequest
    prompt_token_ids: list[int]
    max_tokens: int
    seed: int
    priority: int
    lane: Lane
    num_suspicions: int  # above 0 if it was in an engine that crashed and has not been cleared since
    committed_chunks: list[TokenChunk]  # in order; empty on a first attempt
    input_lengths: list[int] | None = None
    request_id: str | None = None  # the id of the HTTP request that submitted it
    traceparent: str | None = None  # of that request
    seconds_since_accept: float = 0.0  # at the time of the claim
    seconds_since_start: float = 0.0  # since the first claim; 0 if this is the first one
    seconds_paused: float | None = None  # None if it has not just been paused
    eta: Sequence[float] | None = None  # as estimated at its acceptance; see `domain.eta.Eta.stored`

    @property
    def last_sequence_number(self) -> int:
        return _last_number(self.committed_chunks)

    @property
    def num_committed_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.committed_chunks)


@dataclass(frozen=True, slots=True)
class ChunkCommit:
    """The new chunks of one job. Their sequence numbers are consecutive, from committed_sequence_number + 1 on."""

    job_id: UUID
    attempt: int
    chunks: Sequence[TokenChunk]
    engine_seconds: float = 0.0  # its share of the engine's time so far in this attempt


@dataclass(frozen=True, slots=True)
class Held:
    """The result of a commit or renewal for a job that is still ours: whether it should be stopped, and why."""

    job_id: UUID
    attempt: int
    is_cancel_requested: bool
    is_past_deadline: bool
    has_run_out: bool  # its deadline is the end of its run timeout


@dataclass(frozen=True, slots=True)
class Finalisation:
    """The end of one attempt. `last_sequence_number` is that of the last committed chunk, and serves as a second fence
    besides `attempt`."""

    job_id: UUID
    attempt: int
    last_sequence_number: int
    status: JobStatus
    result: JobOutput | None
    finish_reason: FinishReason | None = None
    error: JobError | None = None
    engine_seconds: float = 0.0  # its share of the engine's time in this attempt


@dataclass(frozen=True, slots=True)
class Returned:
    """The state of a job after it was released, ended from outside or asked to stop: queued, terminal or running."""

    job_id: UUID
    status: JobStatus
    attempt: int
    model: str = ""
    num_tokens: int = 0  # committed output tokens
    seconds: float = 0.0  # time since it was accepted
    request_id: str | None = None
    traceparent: str | None = None
    is_moved: bool = True  # False if it had ended before, so that the call changed nothing

    @classmethod
    def of(cls, row: Row[Any]) -> "Returned":
        """`row` is one of `job_ends.told`."""
        numbers = (row.attempt, row.model, row.num_tokens, row.seconds)
        return cls(row.id, JobStatus(row.status), *numbers, row.request_id, row.traceparent)


@dataclass(frozen=True, slots=True)
class Restarted:
    """A queued job that starts over. `num_tokens` tokens were discarded."""

    job_id: UUID
    attempt: int
    num_tokens: int
    request_id: str | None
    traceparent: str | None


def claimable_soon(session: Session, model: str, *, model_revisions: Sequence[str], limit: int) -> list[UUID]:
    """Up to `limit` jobs that workers with these revisions could claim now, in no particular order. Changes nothing."""
    parameters = {"model": model, "model_revisions": list(model_revisions), "limit": limit}
    return list(session.execute(sql.CLAIMABLE_SOON, parameters).scalars())


def let_lines_in(session: Session, model: str, *, limit: int) -> list[UUID]:
    """Let up to `limit` batch lines of `model` be claimed, fairest tenants first, and return their jobs' ids. They run
    when no other job is waiting. The caller must know their share of the slots."""
    if limit <= 0:
        return []
    return list(session.execute(sql.LET_LINES_IN, {"model": model} | extent(limit)).scalars())


def claim(
    session: Session,
    model: str,
    *,
    limit: int,
    owner: UUID,
    model_revision: str,
    lease_seconds: float,
    lane: Lane = Lane.STANDARD,
    min_suspicions: int = 0,
    num_slots: float = math.inf,
) -> list[ClaimedJob]:
    """Claim up to `limit` queued jobs of a lane, fairest first: increment the attempt, start a lease, and return
    request and committed chunks. Batch lines are claimed if there is no other job. Of `num_slots`, each sequence takes
    one; a job is claimed if there is one for its first.

    A job with output is claimed only if its revision equals `model_revision`; any other job gets this revision.
    `min_suspicions` above 0 selects those that are isolated because of crashes, not because of their tenant or as a
    retry.
    """
    parameters = {
        "model": model,
        "owner": owner,
        "model_revision": model_revision,
        "lease_seconds": lease_seconds,
        "lane": lane.value,
        "min_suspicions": min_suspicions,
        "num_slots": num_slots,
    }
    # Not one after another until there are enough: each locks tenants' loads in order, so two of them could deadlock.
    for min_standing in (0, -1) if lane is Lane.STANDARD else (-1,):
        if rows := session.execute(sql.CLAIM, parameters | {"min_standing": min_standing} | extent(limit)).all():
            return claimed_jobs(session, rows, owner=owner)
    return []


def extent(limit: int) -> dict[str, int]:
    """How many rows are wanted, and how many are read for that, since others may have locked some of them."""
    return {"limit": limit, "num_tenants": limit + NUM_SPARE_TENANTS, "num_rows": 2 * limit + NUM_SPARE_ROWS}


def commit_chunks(
    session: Session, commits: Sequence[ChunkCommit], *, lease_seconds: float, owner: UUID | None = None
) -> list[Held]:
    """Append the new chunks of the whole running batch, renew the leases and read the cancel flags, in one statement.
    Without `owner`, whoever made these attempts has written them.

    A job that is missing from the result was fenced off: abort it and publish nothing. Safe to repeat after an
    ambiguous commit. Each job must appear at most once and have at least one chunk.
    """
    if not commits:
        return []
    parameters = of_commits(commits) | {"lease_seconds": lease_seconds, "owner": owner}
    return [Held(*row) for row in session.execute(sql.COMMIT_CHUNKS, parameters)]


def renew(session: Session, job_ids: Sequence[UUID], *, owner: UUID, lease_seconds: float) -> list[Held]:
    """Renew the leases of jobs without a recent chunk. Jobs that are missing from the result are no longer ours."""
    if not job_ids:
        return []
    parameters = {"ids": list(job_ids), "owner": owner, "lease_seconds": lease_seconds}
    return [Held(*row) for row in session.execute(sql.RENEW, parameters)]


def finalise(session: Session, finalisations: Sequence[Finalisation], *, owner: UUID | None = None) -> list[UUID]:
    """Make jobs terminal and store their results. If there is none, the committed chunks become a partial result.
    Without `owner`, whoever made these attempts ends them.

    Returns the ids of the jobs that we still owned, including those that an earlier call with an ambiguous commit had
    already ended.
    """
    if not finalisations:
        return []
    rows = session.execute(ends.FINALISE, of_endings(finalisations) | {"owner": owner} | ERRORS).all()
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
    """Return running jobs to their old place in the queue, as in a drain: with their committed output and without
    charging a failure. Jobs that were asked to cancel end as cancelled instead."""
    if not job_ids:
        return []
    return _returned(session, ends.RELEASE, {"ids": list(job_ids), "owner": owner})


def pause(session: Session, job_ids: Sequence[UUID], *, owner: UUID) -> list[Returned]:
    """Like `release`, because it is another tenant's turn."""
    if not job_ids:
        return []
    return _returned(session, ends.PAUSE, {"ids": list(job_ids), "owner": owner})


def report_crash(session: Session, weight_by_job_id: dict[UUID, int], *, owner: UUID) -> list[Returned]:
    """Requeue the jobs of a crashed engine. Each is charged one failure, and its suspicions grow by its weight; from 2
    on, it is isolated. An isolated job with a weight above 0 has crashed an engine on its own and fails for good."""
    if not weight_by_job_id:
        return []
    parameters = {"ids": list(weight_by_job_id), "weights": list(weight_by_job_id.values()), "owner": owner}
    return _returned(session, ends.REPORT_CRASH, parameters | ERRORS)


def rescue(
    session: Session, *, as_of: datetime, grace_seconds: float, quiet_seconds: float, limit: int = 200
) -> list[Returned]:
    """Requeue the jobs whose lease had expired at least `grace_seconds` before `as_of` (by the database's clock). Does
    nothing until the server has been up for `quiet_seconds`, since after an outage all leases appear to be expired."""
    parameters = {"as_of": as_of, "grace_seconds": grace_seconds, "quiet_seconds": quiet_seconds, "limit": limit}
    return _returned(session, ends.RESCUE, parameters | ERRORS)


def release_stalled(session: Session, *, as_of: datetime, stall_seconds: float, limit: int = 200) -> list[Returned]:
    """Requeue jobs whose owner renews the lease but, at `as_of`, had not committed a token for `stall_seconds`. They
    are charged a failure, as if the worker had been lost."""
    return _returned(session, ends.STALL, {"as_of": as_of, "stall_seconds": stall_seconds, "limit": limit} | ERRORS)


def cancel(session: Session, job_id: UUID, tenant_id: UUID) -> Returned | None:
    """Cancel a queued job, or ask a running one to stop. Returns its state afterwards, or None if the tenant has no
    such job. Idempotent: a terminal job keeps its status."""
    asked = _returned(session, ends.CANCEL, {"ids": [job_id], "tenant_id": tenant_id, "statuses": UNFINISHED})
    if asked:
        return asked[0]
    row = session.execute(select(Job.status, Job.attempt).where(Job.id == job_id, Job.tenant_id == tenant_id)).first()
    return None if row is None else Returned(job_id, row.status, row.attempt, is_moved=False)


def request_cancel(session: Session, job_ids: Sequence[UUID]) -> list[Returned]:
    """Like `cancel`, but for any tenant's jobs: a worker calls it on behalf of Flower or `celery control`. Returns the
    jobs that were not terminal."""
    if not job_ids:
        return []
    return _returned(session, ends.CANCEL, {"ids": list(job_ids), "tenant_id": None, "statuses": UNFINISHED})


def cancel_queued(session: Session, job_ids: Sequence[UUID]) -> list[Returned]:
    """Like `request_cancel`, but leaves running jobs alone."""
    if not job_ids:
        return []
    return _returned(session, ends.CANCEL, {"ids": list(job_ids), "tenant_id": None, "statuses": [JobStatus.QUEUED]})


def expire(session: Session, *, limit: int = 200) -> list[Returned]:
    """End queued jobs whose deadline or start deadline has passed."""
    return _returned(session, ends.EXPIRE, {"limit": limit} | ERRORS)


def gone_revisions(session: Session, *, live_seconds: float) -> dict[tuple[str, str], int]:
    """By (model, revision), the number of queued jobs with output of a revision that is gone. Reads every queued job,
    so call it at most every few seconds."""
    rows = session.execute(ends.GONE_REVISIONS, {"live_seconds": live_seconds})
    return {(row.model, row.model_revision): row.num_jobs for row in rows}


def restart(
    session: Session, model: str, model_revision: str, *, live_seconds: float, limit: int = 200
) -> list[Restarted]:
    """Let queued jobs with output of this revision, which must be gone, start over under the one that is served. Their
    chunks are discarded, and a reset in their stream tells all readers."""
    parameters = {"model": model, "model_revision": model_revision, "live_seconds": live_seconds, "limit": limit}
    return [Restarted(*row) for row in session.execute(ends.RESTART, parameters)]


def start_over(session: Session, job_ids: Sequence[UUID]) -> list[Restarted]:
    """Discard the chunks of these queued jobs, as `restart` does."""
    return [Restarted(*row) for row in session.execute(ends.START_OVER, {"ids": list(job_ids)})]


def fail_gone(
    session: Session, model: str, model_revision: str, *, live_seconds: float, limit: int = 200
) -> list[Returned]:
    """Fail the jobs that `restart` would restart. Their output is kept."""
    parameters = {"model": model, "model_revision": model_revision, "live_seconds": live_seconds, "limit": limit}
    return _returned(session, ends.FAIL_GONE, parameters | ERRORS)


def prune(session: Session, *, limit: int = 200) -> int:
    """Delete finished jobs that are older than their result_ttl_seconds or their tenant's retention_seconds, with
    everything that belongs to them, and expired poison records. Returns the number of jobs."""
    forget_poison(session)
    return sum(_num_rows(session, statement, {"limit": limit}) for statement in (ends.PRUNE, ends.PRUNE_RETAINED))


def forget_poison(session: Session) -> int:
    """Delete expired poison records."""
    return _num_rows(session, ends.FORGET_POISON, {})


def delete(session: Session, job_id: UUID, tenant_id: UUID) -> bool:
    """Delete a job with its input and output. If it is running, its owner is fenced off. False if the tenant has no
    such job."""
    return session.scalar(ends.DELETE, {"id": job_id, "tenant_id": tenant_id}) is not None


def _returned(session: Session, statement: TextClause, parameters: dict[str, Any]) -> list[Returned]:
    """Execute a statement that ends or requeues jobs. Store partial results and webhook deliveries of those that
    ended."""
    rows = session.execute(statement, parameters).all()
    returned = [Returned.of(row) for row in rows]
    cut_off = {job.job_id: job.status for job, row in zip(returned, rows, strict=True) if row.has_chunks}
    store_partial_results(session, {id: status for id, status in cut_off.items() if status.is_terminal})
    told = [job.job_id for job, row in zip(returned, rows, strict=True) if row.is_told and job.status.is_terminal]
    write_deliveries(session, told)
    return returned


def _num_rows(session: Session, statement: TextClause, parameters: dict[str, Any]) -> int:
    result = session.connection().execute(statement, parameters)
    return int(result.rowcount)


def claimed_jobs(session: Session, rows: Sequence[Row[Any]], *, owner: UUID) -> list[ClaimedJob]:
    """The jobs of a claim's rows. One that cannot be read goes back to the queue, where it waits a while, so that it
    does not hold up the others: a newer worker can run it."""
    # While the statement was waiting for a row, another worker may have claimed, continued and released the job. Its
    # newest chunks are then not in the statement's snapshot.
    stale = [row.id for row in rows if row.last_chunk != row.committed_sequence_number]
    newest = {row.job_id: row.chunks for row in session.execute(sql.CHUNKS_OF, {"ids": stale})} if stale else {}
    claimed, unreadable = [], []
    for row in rows:
        try:
            claimed.append(_claimed_job(row, newest.get(row.id, row.chunks)))
        except ValidationError as exc:
            fields = sorted({".".join(map(str, error["loc"])) for error in exc.errors()})
            log.error("a job cannot be read: see %s", ", ".join(fields), extra={"job_id": external_id(row.id)})
            unreadable.append(row.id)
    if unreadable:  # by one statement, as the session may commit each
        _returned(session, ends.PUT_OFF, {"ids": unreadable, "owner": owner, "seconds": UNREADABLE_SECONDS})
    return claimed


def _claimed_job(row: Row[Any], chunks: Sequence[str] | None) -> ClaimedJob:
    return ClaimedJob(
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
        committed_chunks=_parsed(chunks),
        request_id=row.request_id,
        traceparent=row.traceparent,
        seconds_since_accept=row.seconds_since_accept,
        seconds_since_start=row.seconds_since_start,
        seconds_paused=row.seconds_paused,
        eta=row.eta,
    )


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
        "engine_seconds": [commit.engine_seconds for commit in commits],
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
        "results": Packed(ending.result and ending.result.model_dump_json() for ending in finalisations),
        "cached_tokens": [ending.result.usage.cached_tokens if ending.result else 0 for ending in finalisations],
        "reasoning_tokens": [reasoning_tokens_of(ending.result) for ending in finalisations],
        "engine_seconds": [ending.engine_seconds for ending in finalisations],
    }


def _json_array(chunks: Sequence[TokenChunk]) -> str:
    return "[" + ",".join(chunk.model_dump_json(exclude_defaults=True) for chunk in chunks) + "]"


def retry(session: Session, new_job: NewJob, keeps_output: bool, *, max_queued_jobs: int) -> Accepted:
    """Accept a job whose `retry_of` is an ended job. With `keeps_output`, it continues where that job was cut off,
    provided that the revision is the same. Its idempotency key must be derived from the old job, so that a repeated
    call finds the first retry."""
    known = session.scalar(select(JobPayload.fingerprint).where(JobPayload.job_id == new_job.retry_of))
    new_job = replace(new_job, fingerprint=known or new_job.fingerprint)
    [accepted] = accept(session, [new_job], max_queued_jobs=max_queued_jobs)
    if keeps_output and accepted.outcome is AcceptOutcome.ACCEPTED:
        session.execute(sql.INHERIT, {"id": new_job.id})
    return accepted
