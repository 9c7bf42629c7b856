"""An ended job once more, as a new one that may begin with the output of the old."""

from dataclasses import replace

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.jobs_accept import Accepted, AcceptOutcome, NewJob, accept
from storage.jobs_sql import INHERIT
from storage.tables import JobPayload


def retry(session: Session, new_job: NewJob, keeps_output: bool, *, max_queued_jobs: int) -> Accepted:
    """Accept a job that is a `retry_of` an ended one; with `keeps_output` it goes on where that was cut off, if that
    ran under the same revision. Its idempotency key must name the old job: the same call again finds the first."""
    known = session.scalar(select(JobPayload.fingerprint).where(JobPayload.job_id == new_job.retry_of))
    new_job = replace(new_job, fingerprint=known or new_job.fingerprint)
    [accepted] = accept(session, [new_job], max_queued_jobs=max_queued_jobs)
    if keeps_output and accepted.outcome is AcceptOutcome.ACCEPTED:
        session.execute(INHERIT, {"id": new_job.id})
    return accepted
