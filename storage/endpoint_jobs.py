"""What the jobs of the OpenAI and the simple routes need: retries that find their job, repeated requests that find an
answer, what was delivered, what is listed."""

from collections.abc import Mapping, Sequence
from typing import Literal
from uuid import UUID

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from domain.jobs import Endpoint, JobStatus
from storage import job_queries
from storage.job_queries import JobRecord, has_metadata
from storage.jobs_sql import CLOCK
from storage.tables import Job, JobPayload, JobResult

# ruff: noqa: S608  (only CLOCK is put into the text; values are bound)

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
    """The newest job for the same request that is under way, or ended and nobody has its answer. One that failed is
    found, too: its client was cut off before it could be told why."""
    parameters = {"tenant_id": tenant_id, "request_hash": request_hash, "within_seconds": within_seconds}
    job_id: UUID | None = session.scalar(ATTACHABLE, parameters)
    return job_id


def find_completed(session: Session, tenant_id: UUID, request_hash: bytes, *, model_revision: str) -> JobRecord | None:
    """The newest job for the same request that is completed under this revision and still kept, with its request and
    result. Whether its output is this request's, too, is for the caller to judge."""
    parameters = {"tenant_id": tenant_id, "request_hash": request_hash, "model_revision": model_revision}
    job_id: UUID | None = session.scalar(COMPLETED, parameters)
    return None if job_id is None else job_queries.get(session, job_id, tenant_id, with_request=True)


def mark_delivered(session: Session, job_ids: Sequence[UUID]) -> None:
    """Note that a client has the whole answer: a retry of the same request is a new one from now on. The note need not
    survive a crash of the database."""
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
    """One page of the completed jobs that were asked for with store=true, with requests and results, by id."""
    statement = (
        select(Job, JobPayload.request, JobResult.result)
        .join(JobPayload, JobPayload.job_id == Job.id)
        .join(JobResult, JobResult.job_id == Job.id)
        .where(Job.tenant_id == tenant_id, Job.endpoint == endpoint, Job.is_stored)
        .where(Job.status == JobStatus.COMPLETED)
    )
    if model is not None:
        statement = statement.where(Job.model == model)
    for key, value in metadata.items():
        statement = statement.where(has_metadata(key, value))
    if after is not None:
        statement = statement.where(Job.id > after if order == "asc" else Job.id < after)
    statement = statement.order_by(Job.id.asc() if order == "asc" else Job.id.desc()).limit(limit)
    rows = session.execute(statement.execution_options(populate_existing=True)).all()
    for row in rows:
        session.expunge(row[0])
    return [JobRecord(*row) for row in rows]


def set_metadata(session: Session, job_id: UUID, tenant_id: UUID, metadata: Mapping[str, str]) -> None:
    """Replace a stored job's metadata. The caller has looked that there is one."""
    statement = update(Job).where(Job.id == job_id, Job.tenant_id == tenant_id, Job.is_stored)
    session.execute(statement.values(job_metadata=dict(metadata)))
