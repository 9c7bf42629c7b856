"""The three clocks of a job, each of which ends it with a code of its own, whoever notices."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from domain.jobs import JobError, JobStatus
from storage import jobs
from storage.job_accept import accept
from storage.jobs import Finalisation
from storage.tables import Job
from tests.storage_samples import PAST, claim, new_job

Notice = Callable[[Session, UUID], object]

OWNER = uuid4()


def by_its_worker(session: Session, job_id: UUID) -> None:
    error = JobError(code="deadline_exceeded", message="which clock it was, the worker does not know")
    assert jobs.finalise(session, [Finalisation(job_id, 1, 0, JobStatus.EXPIRED, None, error=error)])


def by_the_janitor(session: Session, job_id: UUID) -> None:
    session.execute(update(Job).values(lease_expires_at=PAST))
    assert jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=0, quiet_seconds=0)


def between_attempts(session: Session, job_id: UUID) -> None:
    jobs.release(session, [job_id], owner=OWNER)
    assert jobs.expire(session)


@pytest.mark.parametrize("notice", [by_its_worker, by_the_janitor, between_attempts])
@pytest.mark.parametrize(
    ("run_timeout_seconds", "deadline_in_seconds", "code"),
    [(60, None, "run_timeout_exceeded"), (60, 3600, "run_timeout_exceeded"), (3600, 60, "deadline_exceeded")],
)
def test_a_job_that_has_started_ends_with_the_clock_that_ran_out(
    session: Session, run_timeout_seconds: float, deadline_in_seconds: float | None, code: str, notice: Notice
) -> None:
    deadline_at = deadline_in_seconds and datetime.now(UTC) + timedelta(seconds=deadline_in_seconds)
    fields = {"run_timeout_seconds": run_timeout_seconds, "deadline_at": deadline_at or None}
    [accepted] = accept(session, [new_job(**fields)], max_queued_jobs=9)
    assert claim(session, accepted.job_id, owner=OWNER)
    late = timedelta(minutes=2)
    session.execute(update(Job).values(started_at=Job.started_at - late, deadline_at=Job.deadline_at - late))
    [held] = jobs.renew(session, [accepted.job_id], owner=OWNER, lease_seconds=60)
    assert held.is_past_deadline
    assert held.has_run_out is (code == "run_timeout_exceeded"), "which its worker logs"
    notice(session, accepted.job_id)
    job = session.get_one(Job, accepted.job_id, populate_existing=True)
    assert job.error is not None
    assert (job.status, job.error.code) == (JobStatus.EXPIRED, code)


@pytest.mark.parametrize(
    ("columns", "code"),
    [({"start_deadline_at": PAST}, "start_timeout_exceeded"), ({"deadline_at": PAST}, "deadline_exceeded")],
)
def test_a_job_that_has_not_started_ends_with_the_clock_that_ran_out(
    session: Session, columns: dict[str, datetime], code: str
) -> None:
    [accepted] = accept(session, [new_job(run_timeout_seconds=60.0)], max_queued_jobs=9)
    session.execute(update(Job).values(**columns))
    assert jobs.expire(session)
    job = session.get_one(Job, accepted.job_id, populate_existing=True)
    assert job.error is not None
    assert (job.status, job.error.code) == (JobStatus.EXPIRED, code)
