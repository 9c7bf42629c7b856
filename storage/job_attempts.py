"""The history of a tenant's jobs: their attempts, and the dead letters, which are the jobs that failed."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from domain.jobs import JobStatus
from storage.tables import Job, JobAttempt


def attempts_of(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, list[JobAttempt]]:
    """The attempts that have ended, in order; jobs without any have an empty list. The caller has checked whose jobs
    they are."""
    statement = select(JobAttempt).where(JobAttempt.job_id.in_(job_ids)).order_by(JobAttempt.attempt)
    attempts: dict[UUID, list[JobAttempt]] = {job_id: [] for job_id in job_ids}
    for attempt in session.scalars(statement.execution_options(populate_existing=True)):
        session.expunge(attempt)
        attempts[attempt.job_id].append(attempt)
    return attempts


def list_dead_letters(
    session: Session, tenant_id: UUID, *, after: UUID | None, limit: int
) -> list[tuple[Job, list[JobAttempt]]]:
    """One page of the tenant's failed jobs with their attempts, newest first; `after` is the last id before it."""
    statement = select(Job).where(Job.tenant_id == tenant_id, Job.status == JobStatus.FAILED)
    if after is not None:
        statement = statement.where(Job.id < after)
    statement = statement.order_by(Job.id.desc()).limit(limit)
    failed = list(session.scalars(statement.execution_options(populate_existing=True)))
    for job in failed:
        session.expunge(job)
    attempts = attempts_of(session, [job.id for job in failed])
    return [(job, attempts[job.id]) for job in failed]
