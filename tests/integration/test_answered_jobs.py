"""Jobs that are born completed: what the accept tells of them is what a reader finds, and nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from domain.eta import Eta
from domain.jobs import Endpoint, FinishReason, JobStatus, Usage
from domain.requests import GenerationResult, ResultChoice, TokenChunk
from storage import answers, job_accept, job_queries, jobs
from storage.answered_jobs import accept_answered
from storage.job_accept import Accepted, AcceptOutcome, NewJob
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import Job, JobChunk, Tenant, TenantLoad
from storage.usage import UsageRecord
from tests.storage_samples import claim, new_job

ANSWER = partial(accept_answered, max_age_seconds=60.0, max_queued_jobs=2, max_poison_jobs_per_hour=3)
KEY = b"k" * 32

Sessions = sessionmaker[Session]


def accept(session: Session, *new_jobs: NewJob) -> list[Accepted]:
    return job_accept.accept(session, new_jobs, answer=ANSWER, max_queued_jobs=2)


@pytest.fixture
def leader(session_factory: Sessions) -> NewJob:
    """A job that has been answered."""
    asked = new_job(answer_key=KEY)
    with session_factory.begin() as session:
        accept(session, asked)
        answers.answer(session, [asked], max_age_seconds=60.0)
        [job] = claim(session, asked.id)
        reason = FinishReason.STOP
        chunk = TokenChunk(sequence_number=1, text="Hello", token_ids=(1, 2), finish_reason=reason)
        jobs.commit_chunks(session, [ChunkCommit(job.id, job.attempt, [chunk])], lease_seconds=60)
        choice = ResultChoice(index=0, text="Hello", finish_reason=reason, num_tokens=2)
        result = GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=2))
        jobs.finalise(session, [Finalisation(job.id, job.attempt, 1, JobStatus.COMPLETED, result, reason)])
    return asked


def again(**fields: object) -> NewJob:
    return new_job(answer_key=KEY, **fields)


def test_what_an_accept_tells_of_a_hit_is_what_is_stored(session_factory: Sessions, leader: NewJob) -> None:
    plain = again()
    rich = again(
        metadata={"a": "b"},
        webhook_url="https://localhost/",
        webhook_statuses=[JobStatus.COMPLETED],
        endpoint=Endpoint.RESPONSES,
        endpoint_body='{"input":"Once"}',
        is_stored=True,
        priority=2,
        start_timeout_seconds=5.0,
        run_timeout_seconds=6.0,
        deadline_at=datetime.now(UTC) + timedelta(hours=1),
        eta=Eta.at(0.5),
        key_id="key",
    )
    with session_factory.begin() as session:
        accepted = accept(session, plain, rich)
    assert [one.outcome for one in accepted] == [AcceptOutcome.ACCEPTED] * 2
    for asked, one in zip((plain, rich), accepted, strict=True):
        with session_factory() as session:
            stored = job_queries.get(session, asked.id, asked.tenant_id, with_request=True)
            assert session.scalar(select(func.count()).where(JobChunk.job_id == asked.id)) == 1
            assert session.scalar(select(func.count()).where(UsageRecord.job_id == asked.id)) == 1
        assert stored is not None
        assert one.record is not None
        assert (one.record.result, one.record.endpoint_body) == (stored.result, stored.endpoint_body)
        assert one.created_at == stored.job.created_at
        assert stored.job.answered_by == leader.id
        for column in Job.__mapper__.column_attrs:
            assert getattr(one.record.job, column.key) == getattr(stored.job, column.key), column.key


def test_hits_leave_the_counters_alone_and_wait_for_no_lock(session_factory: Sessions, leader: NewJob) -> None:
    with session_factory() as other, session_factory.begin() as session:
        load = other.scalars(select(TenantLoad).where(TenantLoad.tenant_id == leader.tenant_id).with_for_update()).one()
        before = load.num_queued, load.num_running, load.virtual_time
        session.execute(text("SET LOCAL lock_timeout = '10s'"))
        statements: list[str] = []
        event.listen(session.connection(), "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        assert all(one.record is not None for one in accept(session, again(), again()))
        assert len(statements) == 2, "one finds the answer, one inserts"
    with session_factory() as session:
        load = session.get_one(TenantLoad, leader.tenant_id)
        assert (load.num_queued, load.num_running, load.virtual_time) == before


def test_hits_that_limits_count_lock_in_the_order_of_ends(session_factory: Sessions, leader: NewJob) -> None:
    """First the counters of the tenant, then what its limits have left; or else both could wait for each other."""
    with session_factory() as other, session_factory() as session:
        other.scalars(select(TenantLoad).where(TenantLoad.tenant_id == leader.tenant_id).with_for_update()).one()
        session.execute(text("SET LOCAL lock_timeout = '100ms'"))
        with pytest.raises(OperationalError, match="lock timeout"):
            accept(session, again(is_limited=True))


def test_an_answer_that_cannot_be_read_is_forgotten_without_waiting(session_factory: Sessions, leader: NewJob) -> None:
    """Who holds it may wait for the counters that this accept has locked."""
    with session_factory.begin() as session:
        session.execute(text("UPDATE job_results SET result = '{}'"))
    for is_held in (True, False):
        with session_factory() as other, session_factory.begin() as session:
            if is_held:
                other.execute(text("SELECT FROM answers FOR UPDATE"))
            session.execute(text("SET LOCAL lock_timeout = '1s'"))
            [one] = accept(session, again())
            assert one.record is None
            assert session.scalar(text("SELECT count(*) FROM answers")) == is_held


def test_only_what_need_not_wait_is_born_completed(session_factory: Sessions, leader: NewJob) -> None:
    keyed, unknown = again(idempotency_key="a"), replace(again(), answer_key=b"u" * 32)
    with session_factory.begin() as session:
        outcomes = accept(session, keyed, again(), unknown)
        assert [one.record is not None for one in outcomes] == [False, True, False]
        assert keyed.id in answers.answer(session, [keyed, unknown], max_age_seconds=60.0)
        assert session.get_one(TenantLoad, leader.tenant_id).num_queued == 1
        accept(session, new_job())
        [refused] = accept(session, again())  # the queue is full, which a hit is told like any other job
        assert refused.outcome is AcceptOutcome.TOO_MANY_QUEUED


def test_a_repeated_hit_is_found(session_factory: Sessions, leader: NewJob) -> None:
    """As after a commit whose answer was lost."""
    asked = again()
    for outcome in (AcceptOutcome.ACCEPTED, AcceptOutcome.DUPLICATE):
        with session_factory.begin() as session:
            [one] = accept(session, asked)
        assert (one.outcome, one.job_id) == (outcome, asked.id)


def test_a_hit_is_of_its_own_tenant(
    session_factory: Sessions, leader: NewJob, make_tenant: Callable[..., Tenant]
) -> None:
    with session_factory.begin() as session:
        [one] = accept(session, again(tenant_id=make_tenant().id))
    assert one.record is None
