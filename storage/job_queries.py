"""Reading jobs, with one query each, and never those of another tenant. Writing is in `storage/jobs.py`.

This includes the history of jobs (attempts, dead letters) and what the OpenAI and simple routes need: finding the job
of a retried request, finding an answer for a repeated one, delivery marks, and lists of stored chats.
"""

# ruff: noqa: S608  (only constants of this module are inserted into the text; values are bound)

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, TypeVar
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import JSON, ColumnElement, Select, bindparam, case, literal, select, text, type_coerce, update
from sqlalchemy.orm import Session

from domain.errors import JobUnreadable
from domain.jobs import MIN_PRIORITY, Endpoint, JobStatus, external_id, first_id
from domain.model_names import parse_model_name
from domain.requests import RESULT, JobOutput, JobRequest, TokenChunk, is_whole_output
from storage.job_metadata import entries_of
from storage.job_statements import CLOCK
from storage.tables import Job, JobAttempt, JobPayload, JobResult, Worker

STREAM_STATES = text("""
SELECT id, status, attempt, committed_sequence_number FROM jobs WHERE id = ANY(CAST(:ids AS uuid[]))
""")

READ_LOG = text("""
SELECT j.status, j.attempt, j.committed_sequence_number, j.status = 'queued' AND j.paused_at IS NOT NULL AS is_paused, (
    SELECT json_agg(page.chunk ORDER BY page.sequence_number) FROM (
        SELECT c.chunk, c.sequence_number FROM job_chunks c
        WHERE c.job_id = j.id AND c.sequence_number > :after ORDER BY c.sequence_number LIMIT :limit
    ) page
) AS chunks
FROM jobs j WHERE j.id = :job_id
""")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job at one moment; `job` is detached from the session. `request`, `result` and `endpoint_body` are None if they
    were not asked for; `result` is also None while there is none, and `endpoint_body` if the route does not keep it."""

    job: Job
    request: JobRequest | None
    result: JobOutput | None
    endpoint_body: dict[str, Any] | None = None
    worker: str | None = None  # the name of the worker that runs it or ran it last, if asked for
    token_ids: Mapping[int, Sequence[int]] | None = None  # the output of each sequence, if asked for


@dataclass(frozen=True, slots=True)
class StreamState:
    """The state of a stream according to SQL, which a reader checks when Redis is silent."""

    status: JobStatus
    attempt: int
    committed_sequence_number: int
    is_paused: bool = False  # left out where many streams are looked at


# The worker that runs a job, or else the one that ran it last.
WORKER_NAME = case(
    (
        Job.lease_owner.is_not(None),
        select(Worker.hostname).where(Worker.id == Job.lease_owner).correlate(Job).scalar_subquery(),
    ),
    else_=select(JobAttempt.worker_name)
    .where(JobAttempt.job_id == Job.id)
    .order_by(JobAttempt.attempt.desc())
    .limit(1)
    .correlate(Job)
    .scalar_subquery(),
)


def get(
    session: Session, job_id: UUID, tenant_id: UUID, *, with_request: bool = False, with_result: bool = True
) -> JobRecord | None:
    """The job, or None if the tenant has no such job. Raises JobUnreadable, if its input or output was asked for."""
    statement = _get_statement(with_request, with_result)
    try:
        row = session.execute(statement, {"job_id": job_id, "tenant_id": tenant_id}).one_or_none()
    except ValidationError as exc:
        raise unreadable(job_id) from exc
    if row is None:
        return None
    session.expunge(row[0])
    record = JobRecord(*row)
    if with_result and not _is_whole(record.job, record.result):
        raise unreadable(job_id)
    return record


def unreadable(job_id: UUID) -> JobUnreadable:
    return JobUnreadable(
        f"what is stored of {external_id(job_id)} cannot be read: it was changed, or a newer release wrote it; send "
        "its request again, and tell the operator"
    )


def readable_result(job: Job, raw: object) -> JobOutput | None:
    """The result of an ended job as it is stored; None if it has none, or none that can be read."""
    if raw is None:
        return None
    with suppress(ValidationError):
        result = RESULT.validate_python(raw)
        return result if _is_whole(job, result) else None
    return None


def _is_whole(job: Job, result: JobOutput | None) -> bool:
    return job.status is not JobStatus.COMPLETED or is_whole_output(result, job.kind)


@lru_cache
def _get_statement(with_request: bool, with_result: bool) -> Select[Job, Any, Any]:
    """The statement of `get`. Cached, since building it takes as long as executing it."""
    request = JobPayload.request if with_request else literal(None)
    result = JobResult.result if with_result else literal(None)
    body = JobPayload.endpoint_body if with_request else literal(None)
    statement = select(Job, request, result, body, WORKER_NAME)
    if with_request:
        statement = statement.join(JobPayload, JobPayload.job_id == Job.id)
    if with_result:
        statement = statement.outerjoin(JobResult, JobResult.job_id == Job.id)
    statement = statement.where(Job.id == bindparam("job_id"), Job.tenant_id == bindparam("tenant_id"))
    return statement.execution_options(populate_existing=True)


def _is_of(name: str) -> list[ColumnElement[bool]]:
    """Of a model, with any of its adapters or none; or of one adapter, if it is named."""
    model_id, adapter = parse_model_name(name)
    return [Job.model == model_id] + ([] if adapter is None else [Job.adapter == adapter])


S = TypeVar("S", bound=Select[*tuple[Any, ...]])

# How much later than its job's acceptance, by the database's clock, the API may have drawn an id, by its own.
CLOCK_SKEW_SECONDS = 3_600.0


def list_jobs(
    session: Session,
    tenant_id: UUID,
    *,
    status: JobStatus | None = None,
    model: str | None = None,
    created_after: datetime | None = None,
    metadata: Mapping[str, str] | None = None,
    idempotency_key: str | None = None,
    batch: str | None = None,
    after: UUID | None = None,
    limit: int = 20,
    order: Literal["asc", "desc"] = "desc",
) -> list[Job]:
    """One page in the order of ids, which is the order of creation; `after` is the last id of the previous page.
    `batch` is the external id of one, with which the keys of its lines' jobs begin."""
    statement: Select[Job] = select(Job).where(Job.tenant_id == tenant_id)
    if status is not None:
        statement = statement.where(Job.status == status)
    if model is not None:
        statement = statement.where(*_is_of(model))
    if created_after is not None:
        statement = statement.where(Job.created_at > created_after)
    if idempotency_key is not None:
        statement = statement.where(Job.idempotency_key == idempotency_key)
    if batch is not None:
        statement = statement.where(Job.id.in_(lines_of(tenant_id, batch)))
    first = None if created_after is None else first_id(created_after.timestamp() - CLOCK_SKEW_SECONDS)
    statement = _page(statement, tenant_id, metadata or {}, after=after, first=first, order=order).limit(limit)
    found = list(session.scalars(statement.execution_options(populate_existing=True)))
    for job in found:
        session.expunge(job)
    return found


def _page(
    statement: S,
    tenant_id: UUID,
    metadata: Mapping[str, str],
    *,
    after: UUID | None,
    first: UUID | None = None,
    order: Literal["asc", "desc"],
) -> S:
    """The jobs with this metadata, in the order of ids, from `first` on."""
    ids = [Job.id]
    for row, joined in entries_of(tenant_id, metadata):
        statement = statement.join(row, joined)
        ids.append(row.job_id)
    for id in ids:  # of each table, since PostgreSQL takes over only equalities from one to another
        if first is not None:
            statement = statement.where(id > first)
        if after is not None:
            statement = statement.where(id > after if order == "asc" else id < after)
    return statement.order_by(Job.id.asc() if order == "asc" else Job.id.desc())


def lines_of(tenant_id: UUID, batch: str) -> Select[UUID]:
    """The jobs whose keys begin with the id of a batch and a space. By comparisons of bytes, since row-level security
    keeps LIKE from using an index; and kept apart by OFFSET, so that jobs_lines_idx is used, and not that of all of the
    tenant's jobs in order."""
    key = Job.idempotency_key
    begins = (key.bool_op("~>=~")(f"{batch} "), key.bool_op("~<~")(f"{batch}!"))  # "!" follows the space
    return select(Job.id).where(Job.tenant_id == tenant_id, Job.priority < MIN_PRIORITY, *begins).offset(0)


def worker_names(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, str | None]:
    """For each job, the name of the worker that runs it or ran it last."""
    rows = session.execute(select(Job.id, WORKER_NAME).where(Job.id.in_(job_ids)))
    return {row[0]: row[1] for row in rows}


CHUNKS_PER_READ = 500


def read_chunks(session: Session, job_id: UUID, *, after: int = 0, limit: int = CHUNKS_PER_READ) -> list[TokenChunk]:
    """The committed chunks with a sequence number above `after`, in order. The caller must have checked the tenant.
    Raises JobUnreadable."""
    return read_log(session, job_id, after=after, limit=limit)[1]


def read_log(session: Session, job_id: UUID, *, after: int, limit: int) -> tuple[StreamState | None, list[TokenChunk]]:
    """The state of a stream and its next chunks after `after`, from one snapshot. The state is None if the job was
    deleted. Raises JobUnreadable if a chunk is missing or damaged, for which a reader would wait in vain."""
    row = session.execute(READ_LOG, {"job_id": job_id, "after": after, "limit": limit}).one_or_none()
    if row is None:
        return None, []
    state = StreamState(JobStatus(row.status), row.attempt, row.committed_sequence_number, row.is_paused)
    try:
        chunks = [TokenChunk.model_validate(chunk) for chunk in row.chunks or ()]
    except ValidationError as exc:
        raise unreadable(job_id) from exc
    last = after
    for chunk in chunks:
        if chunk.sequence_number != last + 1 and not chunk.is_reset:  # those before a reset are deleted
            raise unreadable(job_id)
        last = chunk.sequence_number
    if len(chunks) < limit and last < state.committed_sequence_number:
        raise unreadable(job_id)
    return state, chunks


def stream_states(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, StreamState]:
    """The states of many streams in one query. Jobs that are missing from the result were deleted."""
    if not job_ids:
        return {}
    rows = session.execute(STREAM_STATES, {"ids": list(job_ids)})
    return {row.id: StreamState(JobStatus(row.status), row.attempt, row.committed_sequence_number) for row in rows}


def attempts_of(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, list[JobAttempt]]:
    """The ended attempts of each job, in order; possibly none. The caller must have checked the jobs' tenant."""
    statement = select(JobAttempt).where(JobAttempt.job_id.in_(job_ids)).order_by(JobAttempt.attempt)
    attempts: dict[UUID, list[JobAttempt]] = {job_id: [] for job_id in job_ids}
    for attempt in session.scalars(statement.execution_options(populate_existing=True)):
        session.expunge(attempt)
        attempts[attempt.job_id].append(attempt)
    return attempts


def list_dead_letters(
    session: Session, tenant_id: UUID, *, after: UUID | None, limit: int
) -> list[tuple[Job, list[JobAttempt]]]:
    """One page of the tenant's failed jobs with their attempts, newest first; `after` is the last id of the previous
    page."""
    statement = select(Job).where(Job.tenant_id == tenant_id, Job.status == JobStatus.FAILED)
    if after is not None:
        statement = statement.where(Job.id < after)
    statement = statement.order_by(Job.id.desc()).limit(limit)
    failed = list(session.scalars(statement.execution_options(populate_existing=True)))
    for job in failed:
        session.expunge(job)
    attempts = attempts_of(session, [job.id for job in failed])
    return [(job, attempts[job.id]) for job in failed]


ATTACHABLE = text(f"""
SELECT id FROM jobs WHERE tenant_id = :tenant_id AND request_hash = :request_hash AND endpoint <> 'jobs'
    AND created_at > {CLOCK} - make_interval(secs => :within_seconds) AND cancel_requested_at IS NULL
    AND status <> 'cancelled' AND delivered_at IS NULL
ORDER BY id DESC LIMIT 1
""")

COMPLETED = text(f"""
SELECT id FROM jobs WHERE tenant_id = :tenant_id AND request_hash = :request_hash AND endpoint <> 'jobs'
    AND status = 'completed' AND model_revision = :model_revision AND prune_at > {CLOCK}
ORDER BY id DESC LIMIT 1
""")

MARK_DELIVERED = text(f"""
UPDATE jobs SET delivered_at = {CLOCK} WHERE id = ANY(CAST(:ids AS uuid[])) AND delivered_at IS NULL
    AND finished_at IS NOT NULL
    AND (SELECT set_config('synchronous_commit', 'off', true)) = 'off'
""")


def find_attachable(session: Session, tenant_id: UUID, request_hash: bytes, *, within_seconds: float) -> UUID | None:
    """The newest job for the same request that is unfinished, or that ended without its answer being delivered. This
    includes failed jobs, whose clients were disconnected before they learnt why."""
    parameters = {"tenant_id": tenant_id, "request_hash": request_hash, "within_seconds": within_seconds}
    job_id: UUID | None = session.scalar(ATTACHABLE, parameters)
    return job_id


def find_completed(session: Session, tenant_id: UUID, request_hash: bytes, *, model_revision: str) -> JobRecord | None:
    """The newest job for the same request that completed under this revision and has not expired, with its request and
    result. The caller must decide whether its output fits the new request."""
    parameters = {"tenant_id": tenant_id, "request_hash": request_hash, "model_revision": model_revision}
    job_id: UUID | None = session.scalar(COMPLETED, parameters)
    return None if job_id is None else get(session, job_id, tenant_id, with_request=True)


def mark_delivered(session: Session, job_ids: Sequence[UUID]) -> None:
    """Record that a client has received the whole answer, so that the same request will create a new job. The record
    need not survive a crash of the database."""
    session.execute(MARK_DELIVERED, {"ids": list(job_ids)})


def list_stored(
    session: Session,
    tenant_id: UUID,
    endpoint: Endpoint,
    *,
    model: str | None,
    metadata: Mapping[str, str],
    after: UUID | None,
    limit: int,
    order: Literal["asc", "desc"],
) -> list[JobRecord]:
    """One page, in the order of ids, of completed jobs that were requested with store=true, with requests and
    results. Raises JobUnreadable."""
    statement = (
        select(Job, JobPayload.request, type_coerce(JobResult.result, JSON))
        .join(JobPayload, JobPayload.job_id == Job.id)
        .join(JobResult, JobResult.job_id == Job.id)
        .where(Job.tenant_id == tenant_id, Job.endpoint == endpoint, Job.is_stored)
        .where(Job.status == JobStatus.COMPLETED)
    )
    if model is not None:
        statement = statement.where(*_is_of(model))
    statement = _page(statement, tenant_id, metadata, after=after, order=order).limit(limit)
    rows = session.execute(statement.execution_options(populate_existing=True)).all()
    for row in rows:
        session.expunge(row[0])
    records = [JobRecord(job, request, readable_result(job, raw)) for job, request, raw in rows]
    for record in records:
        if record.result is None:
            raise unreadable(record.job.id)
    return records


def set_metadata(session: Session, job_id: UUID, tenant_id: UUID, metadata: Mapping[str, str]) -> None:
    """Replace a stored job's metadata. The caller must have checked that the job exists."""
    statement = update(Job).where(Job.id == job_id, Job.tenant_id == tenant_id, Job.is_stored)
    session.execute(statement.values(job_metadata=dict(metadata)))
