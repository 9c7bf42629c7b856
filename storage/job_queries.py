"""Reading jobs: one query each, and never a job of another tenant. Writing is in `storage/jobs.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ColumnElement, Select, Text, bindparam, case, cast, literal, select, text
from sqlalchemy.orm import Session

from domain.chunks import TokenChunk
from domain.jobs import JobStatus
from domain.kinds import JobOutput, JobRequest
from storage.jobs_sql import CLOCK, LIFTED, RANK
from storage.tables import Job, JobChunk, JobPayload, JobResult

STREAM_STATES = text("""
SELECT id, status, attempt, committed_sequence_number FROM jobs WHERE id = ANY(CAST(:ids AS uuid[]))
""")

QUEUE_FIGURES = text(f"""
SELECT model, sum(num_queued)::int, sum(num_running)::int, coalesce(max(oldest_seconds), 0)::float8,
    sum(queued_cost)::bigint, sum(running_cost)::bigint
FROM (
    SELECT model, count(*) AS num_queued, 0 AS num_running, sum(cost) AS queued_cost, 0 AS running_cost,
        extract(epoch FROM {CLOCK} - min(created_at)) AS oldest_seconds
    FROM jobs WHERE status = 'queued' GROUP BY model
    UNION ALL
    SELECT model, 0, count(*), 0, sum(greatest(0, cost - num_prompt_tokens - num_committed_tokens)), NULL
    FROM jobs WHERE status = 'in_progress' GROUP BY model
) per_status GROUP BY model
""")  # noqa: S608  (CLOCK is a constant)

POSITIONS = text(f"""
WITH timed AS (
    SELECT j.id, j.model, {RANK} AS rank, j.cost,
        least({LIFTED}, max(j.priority) OVER (PARTITION BY j.model)) AS priority, l.virtual_time + (sum(j.cost) OVER (
        PARTITION BY j.model, j.tenant_id ORDER BY {RANK}, j.id) - j.cost) / t.weight AS fair_time
    FROM jobs j JOIN tenant_load l USING (tenant_id) JOIN tenants t ON t.id = j.tenant_id
    WHERE j.status = 'queued' AND j.model IN (SELECT model FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])))
),
ranked AS (
    SELECT id, row_number() OVER ahead - 1 AS num_ahead, sum(cost) OVER ahead - cost AS cost_ahead FROM timed
    WINDOW ahead AS (PARTITION BY model ORDER BY priority DESC, fair_time, rank, id ROWS UNBOUNDED PRECEDING)
)
SELECT id, num_ahead, cost_ahead FROM ranked WHERE id = ANY(CAST(:ids AS uuid[]))
""")  # noqa: S608  (constants)

READ_LOG = text("""
SELECT j.status, j.attempt, j.committed_sequence_number, (
    SELECT json_agg(page.chunk ORDER BY page.sequence_number) FROM (
        SELECT c.chunk, c.sequence_number FROM job_chunks c
        WHERE c.job_id = j.id AND c.sequence_number > :after ORDER BY c.sequence_number LIMIT :limit
    ) page
) AS chunks
FROM jobs j WHERE j.id = :job_id
""")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as it stood; `job` is detached from the session. `request`, `result` and `endpoint_body` are None where not
    asked for; `result` also while there is none, and `endpoint_body` where the route keeps none."""

    job: Job
    request: JobRequest | None
    result: JobOutput | None
    endpoint_body: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """What one model has to do."""

    num_queued: int
    num_running: int
    oldest_queued_seconds: float  # 0 where nothing waits
    queued_cost: int  # tokens, prompt and the most that may come
    running_cost: int  # the same of the jobs under way, less what they committed


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream stands in SQL; what a reader without news from Redis asks."""

    status: JobStatus
    attempt: int
    committed_sequence_number: int


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """How many queued jobs of the model run earlier under the current order, and the tokens they may take."""

    num_ahead: int
    cost_ahead: int


def get(
    session: Session, job_id: UUID, tenant_id: UUID, *, with_request: bool = False, with_result: bool = True
) -> JobRecord | None:
    """None: no such job of this tenant."""
    statement = _get_statement(with_request, with_result)
    row = session.execute(statement, {"job_id": job_id, "tenant_id": tenant_id}).one_or_none()
    if row is None:
        return None
    session.expunge(row[0])
    return JobRecord(*row)


@lru_cache
def _get_statement(with_request: bool, with_result: bool) -> Select[Job, Any, Any]:
    """Built once: building it takes as long as running it."""
    request = JobPayload.request if with_request else literal(None)
    result = JobResult.result if with_result else literal(None)
    body = JobPayload.endpoint_body if with_request else literal(None)
    statement = select(Job, request, result, body)
    if with_request:
        statement = statement.join(JobPayload, JobPayload.job_id == Job.id)
    if with_result:
        statement = statement.outerjoin(JobResult, JobResult.job_id == Job.id)
    statement = statement.where(Job.id == bindparam("job_id"), Job.tenant_id == bindparam("tenant_id"))
    return statement.execution_options(populate_existing=True)


def list_jobs(
    session: Session,
    tenant_id: UUID,
    *,
    status: JobStatus | None = None,
    model: str | None = None,
    created_after: datetime | None = None,
    metadata: Mapping[str, str] | None = None,
    after: UUID | None = None,
    limit: int = 20,
    order: Literal["asc", "desc"] = "desc",
) -> list[Job]:
    """One page in the order of ids, which is that of creation; `after` is the last id of the page before."""
    statement: Select[Job] = select(Job).where(Job.tenant_id == tenant_id)
    if status is not None:
        statement = statement.where(Job.status == status)
    if model is not None:
        statement = statement.where(Job.model == model)
    if created_after is not None:
        statement = statement.where(Job.created_at > created_after)
    for key, value in (metadata or {}).items():
        statement = statement.where(has_metadata(key, value))
    if after is not None:
        statement = statement.where(Job.id > after if order == "asc" else Job.id < after)
    statement = statement.order_by(Job.id.asc() if order == "asc" else Job.id.desc()).limit(limit)
    found = list(session.scalars(statement.execution_options(populate_existing=True)))
    for job in found:
        session.expunge(job)
    return found


def read_chunks(session: Session, job_id: UUID, *, after: int = 0, limit: int = 500) -> list[TokenChunk]:
    """The committed chunks with a sequence number above `after`, in order. The caller has checked whose job it is."""
    statement = (
        select(JobChunk.chunk)
        .where(JobChunk.job_id == job_id, JobChunk.sequence_number > after)
        .order_by(JobChunk.sequence_number)
        .limit(limit)
    )
    return list(session.scalars(statement))


def read_log(session: Session, job_id: UUID, *, after: int, limit: int) -> tuple[StreamState | None, list[TokenChunk]]:
    """What a stream that has come to `after` needs to go on, as of one moment. No state: the job was deleted."""
    row = session.execute(READ_LOG, {"job_id": job_id, "after": after, "limit": limit}).one_or_none()
    if row is None:
        return None, []
    state = StreamState(JobStatus(row.status), row.attempt, row.committed_sequence_number)
    return state, [TokenChunk.model_validate(chunk) for chunk in row.chunks or ()]


def stream_states(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, StreamState]:
    """Where many streams stand, in one query. A job that is missing was deleted."""
    if not job_ids:
        return {}
    rows = session.execute(STREAM_STATES, {"ids": list(job_ids)})
    return {row.id: StreamState(JobStatus(row.status), row.attempt, row.committed_sequence_number) for row in rows}


def queue_figures(session: Session) -> dict[str, QueueFigures]:
    """By model; models without an unfinished job are missing. Reads every unfinished job: ask at most once a second."""
    return {row.model: QueueFigures(*row[1:]) for row in session.execute(QUEUE_FIGURES)}


def positions(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, QueuePosition]:
    """Where queued jobs stand, exact under the order that `dispatch` and `claim_next` follow now; later arrivals may
    still overtake. Jobs that do not wait are missing. Ranks every queued job of their models (milliseconds for each
    thousand), so ask for many jobs at once, at most once a second."""
    if not job_ids:
        return {}
    rows = session.execute(POSITIONS, {"ids": list(job_ids)})
    return {row.id: QueuePosition(row.num_ahead, row.cost_ahead) for row in rows}


def position(session: Session, job_id: UUID) -> QueuePosition | None:
    """As `positions`, for one job."""
    return positions(session, [job_id]).get(job_id)


def has_metadata(key: str, value: str) -> ColumnElement[bool]:
    """Whether a job's metadata has this entry. PostgreSQL cannot take a value out of JSON that holds an escaped NUL, so
    such metadata matches nothing."""
    metadata = Job.__table__.c.metadata
    holds_nul = cast(metadata, Text).contains("\\u0000", autoescape=True)
    return case((holds_nul, False), else_=metadata.op("->>")(key) == value)
