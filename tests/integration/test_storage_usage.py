"""The ledger: every way in which an attempt or a job can end leaves records that add up to the job's usage."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from domain.jobs import FinishReason, JobError, JobStatus, Usage
from domain.requests import GenerationResult, ResultChoice
from storage import jobs, usage
from storage.job_accept import accept
from storage.jobs import ChunkCommit, Finalisation
from storage.limits import OF_TENANT, LimitSet, LimitUse
from storage.tables import Job, TenantLoad
from storage.usage import UsageQuery, UsageRecord
from storage.workers import WorkerReport, heartbeat
from tests.conftest import MakeJob
from tests.storage_samples import MODEL, PAST, chunk, claim, new_job, result

OWNER = uuid4()

Story = Callable[[Session, UUID], None]


def begin(session: Session, job_id: UUID, *, chunks: int = 2) -> None:
    """One more attempt, which commits some tokens."""
    [claimed] = claim(session, job_id, owner=OWNER)
    first = claimed.last_sequence_number + 1
    new = [chunk(number) for number in range(first, first + chunks)]
    assert jobs.commit_chunks(session, [ChunkCommit(job_id, claimed.attempt, new, 0.25)], lease_seconds=60)


def end(session: Session, job_id: UUID, status: JobStatus = JobStatus.COMPLETED) -> None:
    job = session.get_one(Job, job_id, populate_existing=True)
    output = result(job.num_committed_tokens) if status is JobStatus.COMPLETED else None
    error = JobError(code="engine_error", message="") if status is JobStatus.FAILED else None
    ending = Finalisation(job_id, job.attempt, job.committed_sequence_number, status, output, error=error)
    assert jobs.finalise(session, [replace(ending, engine_seconds=0.5)]) == [job_id]


def lapse(session: Session, job_id: UUID, **columns: object) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(lease_expires_at=PAST, **columns))
    assert jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=0, quiet_seconds=0)


def complete(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    end(session, job_id)


def fail(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    end(session, job_id, JobStatus.FAILED)


def complete_after_losses(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    lapse(session, job_id)
    begin(session, job_id, chunks=3)
    assert jobs.release(session, [job_id], owner=OWNER)
    begin(session, job_id)
    assert jobs.report_crash(session, {job_id: 0}, owner=OWNER)
    begin(session, job_id, chunks=1)
    end(session, job_id)


def be_lost_for_good(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    lapse(session, job_id, max_failures=0)


def cancel_in_the_queue(session: Session, job_id: UUID) -> None:
    assert jobs.cancel_queued(session, [job_id])


def cancel_between_attempts(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    jobs.release(session, [job_id], owner=OWNER)
    assert jobs.cancel_queued(session, [job_id])


def expire_in_the_queue(session: Session, job_id: UUID) -> None:
    session.execute(update(Job).where(Job.id == job_id).values(deadline_at=PAST))
    assert jobs.expire(session)


def start_over(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    jobs.release(session, [job_id], owner=OWNER)
    assert jobs.start_over(session, [job_id])
    begin(session, job_id, chunks=3)
    end(session, job_id)


def fail_with_its_revision(session: Session, job_id: UUID) -> None:
    begin(session, job_id)
    jobs.release(session, [job_id], owner=OWNER)
    heartbeat(session, WorkerReport(uuid4(), "gpu@here", MODEL, 8, 0, 0.0, model_revision="other"))
    assert jobs.fail_gone(session, MODEL, "main", live_seconds=60)


STORIES: list[Story] = [complete, fail, complete_after_losses, be_lost_for_good, cancel_in_the_queue]
STORIES += [cancel_between_attempts, expire_in_the_queue, start_over, fail_with_its_revision]


def records_of(session: Session, job_id: UUID) -> list[UsageRecord]:
    statement = select(UsageRecord).where(UsageRecord.job_id == job_id).order_by(UsageRecord.ended_at)
    return list(session.scalars(statement))


@pytest.mark.parametrize("story", STORIES)
def test_the_records_of_a_job_add_up_to_its_usage(session: Session, make_job: MakeJob, story: Story) -> None:
    [accepted] = accept(session, [new_job(key_id="k1")], max_queued_jobs=9)
    story(session, accepted.job_id)
    job = session.get_one(Job, accepted.job_id, populate_existing=True)
    records = records_of(session, job.id)
    assert job.finished_at is not None
    assert sum(one.num_output_tokens for one in records) == job.num_committed_tokens
    assert sum(one.num_prompt_tokens for one in records) == (job.num_prompt_tokens if job.started_at else 0)
    assert sum(one.is_attempt for one in records) == job.attempt
    assert [one.is_end for one in records] == [False] * (len(records) - 1) + [True]
    assert {(one.key_id, one.model, one.is_batch) for one in records} == {("k1", MODEL, False)}


def test_an_attempt_that_died_has_the_engine_seconds_that_it_had_committed(session: Session) -> None:
    [accepted] = accept(session, [new_job()], max_queued_jobs=9)
    begin(session, accepted.job_id)
    lapse(session, accepted.job_id)
    begin(session, accepted.job_id)
    end(session, accepted.job_id)
    lost, completed = records_of(session, accepted.job_id)
    assert (lost.outcome, lost.engine_seconds) == ("lost", 0.25)
    assert (completed.outcome, completed.engine_seconds) == ("completed", 0.5)


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.IN_PROGRESS, JobStatus.COMPLETED])
def test_erasing_a_job_keeps_its_records(session: Session, status: JobStatus) -> None:
    [accepted] = accept(session, [new_job()], max_queued_jobs=9)
    if status is not JobStatus.QUEUED:
        begin(session, accepted.job_id)
    if status is JobStatus.COMPLETED:
        end(session, accepted.job_id)
    assert jobs.delete(session, accepted.job_id, new_job().tenant_id)
    [record] = records_of(session, accepted.job_id)
    assert record.is_end
    assert record.num_output_tokens == (0 if status is JobStatus.QUEUED else 2)


def test_a_repeated_end_is_recorded_once(session: Session) -> None:
    [accepted] = accept(session, [new_job()], max_queued_jobs=9)
    complete(session, accepted.job_id)
    end(session, accepted.job_id)
    assert len(records_of(session, accepted.job_id)) == 1


def test_output_taken_over_from_another_job_is_recorded_there(session: Session) -> None:
    [first] = accept(session, [new_job()], max_queued_jobs=9)
    begin(session, first.job_id)
    jobs.release(session, [first.job_id], owner=OWNER)
    jobs.cancel_queued(session, [first.job_id])
    session.add(LimitSet(tenant_id=new_job().tenant_id, key_id=OF_TENANT))
    session.flush()
    session.add(LimitUse(tenant_id=new_job().tenant_id, key_id=OF_TENANT))
    session.flush()
    again = jobs.retry(session, new_job(retry_of=first.job_id), True, max_queued_jobs=9)
    begin(session, again.job_id, chunks=1)
    end(session, again.job_id)
    assert session.get_one(Job, again.job_id, populate_existing=True).num_committed_tokens == 3
    assert sum(one.num_output_tokens for one in records_of(session, again.job_id)) == 1
    [unused] = session.scalars(select(LimitUse.num_unused_tokens))
    assert unused == new_job().cost - 3 - 1, "its prompt, and the token that it generated itself"


def test_cached_and_reasoning_tokens_are_recorded(session: Session) -> None:
    [accepted] = accept(session, [new_job()], max_queued_jobs=9)
    begin(session, accepted.job_id)
    choice = ResultChoice(index=0, text="", finish_reason=FinishReason.STOP, num_tokens=2, num_reasoning_tokens=1)
    output = GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=2))
    assert jobs.finalise(session, [Finalisation(accepted.job_id, 1, 2, JobStatus.COMPLETED, output)])
    [record] = records_of(session, accepted.job_id)
    assert (record.num_cached_tokens, record.num_reasoning_tokens) == (2, 1)


def test_times_add_up_to_that_since_acceptance(session: Session) -> None:
    [accepted] = accept(session, [new_job()], max_queued_jobs=9)
    session.execute(update(Job).values(created_at=datetime.now(UTC) - timedelta(seconds=40)))
    begin(session, accepted.job_id)
    for column, seconds in (("attempt_started_at", 30), ("first_token_at", 20)):
        session.execute(update(Job).values({column: datetime.now(UTC) - timedelta(seconds=seconds)}))
    end(session, accepted.job_id)
    [record] = records_of(session, accepted.job_id)
    assert record.queue_seconds == pytest.approx(10, abs=1)
    assert record.prefill_seconds == pytest.approx(10, abs=1)
    assert record.decode_seconds >= 20


def test_totals_are_of_the_groups_asked_for_and_never_of_another_tenant(
    session: Session, make_tenant: Callable[..., object]
) -> None:
    other = make_tenant(name="other").id  # type: ignore[attr-defined]
    session.get_one(TenantLoad, other)
    ends = [new_job(key_id=key, tenant_id=tenant) for tenant in (new_job().tenant_id, other) for key in ("a", "b", "b")]
    for accepted in accept(session, ends, max_queued_jobs=9):
        complete(session, accepted.job_id)
    now = datetime.now(UTC)
    query = UsageQuery(start=now - timedelta(hours=1), end=now + timedelta(hours=1))
    [everything] = usage.totals(session, query)
    assert (everything.num_jobs, everything.num_prompt_tokens, everything.num_output_tokens) == (6, 18, 12)
    own = usage.totals(session, replace(query, tenant_id=other, by_key=True, by_tenant=True))
    assert [(one.tenant, one.key_id, one.num_jobs) for one in own] == [("other", "a", 1), ("other", "b", 2)]
    assert usage.totals(session, replace(query, tenants=["nobody"])) == []
    [only] = usage.totals(session, replace(query, key_ids=["a"], bucket_seconds=86_400 * 365))
    assert (only.num_jobs, only.bucket is not None) == (2, True)
    assert usage.totals(session, replace(query, is_batch=True)) == []


def test_old_records_are_pruned(session: Session) -> None:
    [accepted] = accept(session, [new_job()], max_queued_jobs=9)
    complete(session, accepted.job_id)
    assert usage.prune(session, days=10) == 0
    session.execute(update(UsageRecord).values(ended_at=datetime.now(UTC) - timedelta(days=11)))
    assert usage.prune(session, days=10) == 1


def test_totals_that_nobody_waits_for_are_given_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "TOTALS_SECONDS", 0.05)
    monkeypatch.setattr(usage, "TOTALS", text("SELECT pg_sleep(60) WHERE :start < now()"))
    with pytest.raises(OperationalError, match="statement timeout"):
        usage.totals(session, UsageQuery(start=PAST, end=datetime.now(UTC)))
