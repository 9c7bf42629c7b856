"""One flush, committed on a real database: repeated, fenced, and with output that no row can hold."""

from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, event, text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import ModelSpec
from domain.jobs import JobStatus, Lane
from gpu_worker.commits import FlushPacer, JobFlush, JobStorage, commit
from gpu_worker.job import RunningJob
from settings import Settings
from storage import job_statements
from storage.tables import Job, JobChunk
from tests.conftest import MakeJob
from tests.integration.runner_harness import listening
from tests.runner_parts import make_output

SPEC = ModelSpec(id="test-model", path="none", backend="fake", max_model_len=64)


@pytest.fixture
def settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url)


@pytest.fixture
def storage(settings: Settings) -> Iterator[JobStorage]:
    storage = JobStorage(settings, SPEC, uuid4(), "gpu@here")
    yield storage
    storage.close()


@pytest.fixture
def pacer(settings: Settings) -> FlushPacer:
    return FlushPacer(settings)


def claim(storage: JobStorage, job_ids: list[UUID], *, is_repeated: bool = False) -> list[RunningJob]:
    """As many as these, which are all that are queued."""
    claimed = storage.claim(
        len(job_ids), Lane.STANDARD, frozenset(), num_slots=16, min_suspicions=0, is_repeated=is_repeated
    )
    return [RunningJob(job, claimed_at=0.0) for job in claimed]


def say(pacer: FlushPacer, jobs: list[RunningJob], text: str, *, is_last: bool = False) -> list[JobFlush]:
    for job in jobs:
        job.absorb(make_output(job, text, finish_reason="stop" if is_last else None))
    return pacer.take(jobs, 0.0)


def num_chunks(sessions: sessionmaker[Session], job_id: UUID) -> int:
    with sessions() as session:
        return session.query(JobChunk).where(JobChunk.job_id == job_id).count()


def test_a_flush_whose_answer_was_lost_may_be_repeated(
    storage: JobStorage, pacer: FlushPacer, make_job: MakeJob
) -> None:
    running, ending = claim(storage, [make_job().id, make_job().id])
    flushes = say(pacer, [running], "a") + say(pacer, [ending], "b", is_last=True)
    outcomes = [commit(storage, flushes) for _ in range(2)]
    for outcome in outcomes:
        assert running.id in outcome.held
        assert outcome.ended == {ending.id: JobStatus.COMPLETED}
    assert num_chunks(storage.sessions, running.id) == num_chunks(storage.sessions, ending.id) == 1


def test_a_job_that_was_fenced_off_is_in_neither_answer_and_publishes_nothing(
    storage: JobStorage, settings: Settings, pacer: FlushPacer, make_job: MakeJob
) -> None:
    fenced, deleted, ours = claim(storage, [make_job().id for _ in range(3)])
    with storage.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == fenced.id).values(attempt=2))
        session.execute(delete(Job).where(Job.id == deleted.id))
    with listening(settings.redis_url, fenced.id) as read:
        outcome = commit(storage, say(pacer, [fenced, deleted, ours], "a", is_last=True))
        assert read() == []
    assert set(outcome.held) == set(outcome.ended) == {ours.id}
    assert num_chunks(storage.sessions, fenced.id) == 0


def test_output_that_no_row_can_hold_fails_its_job_alone(
    storage: JobStorage, settings: Settings, pacer: FlushPacer, make_job: MakeJob
) -> None:
    bad, good = claim(storage, [make_job().id, make_job().id])
    commit(storage, say(pacer, [bad, good], "fine"))
    flushes = say(pacer, [bad], "half a surrogate: \ud800") + say(pacer, [good], "good", is_last=True)
    with listening(settings.redis_url, bad.id) as read:
        outcome = commit(storage, flushes)
        assert read() == [{"status": "failed"}]
    assert outcome.ended == {bad.id: JobStatus.FAILED, good.id: JobStatus.COMPLETED}
    assert (num_chunks(storage.sessions, bad.id), num_chunks(storage.sessions, good.id)) == (1, 2)


def test_a_claim_whose_answer_was_lost_may_be_repeated(storage: JobStorage, make_job: MakeJob) -> None:
    job_ids = [make_job().id, make_job().id]
    claim(storage, job_ids)
    again = claim(storage, job_ids, is_repeated=True)
    assert {job.id for job in again} == set(job_ids)
    assert {job.attempt for job in again} == {2}
    with storage.sessions() as session:
        assert {session.get_one(Job, job_id).num_failures for job_id in job_ids} == {0}


def plans(storage: JobStorage) -> dict[str, tuple[int, int]]:
    """How often the connection has executed its prepared statements by a plan that it keeps, and by a new one."""
    query = text("SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements")
    with storage.statements() as session:
        return {row.statement: (row.generic_plans, row.custom_plans) for row in session.execute(query)}


def test_a_job_waits_for_no_plans(
    storage: JobStorage, pacer: FlushPacer, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim and its first chunk are two statements, whose plans are kept; those of an idle worker are made anew."""
    for _ in range(8):  # the client prepares what it has executed five times
        [job] = claim(storage, [make_job().id])
        commit(storage, say(pacer, [job], "a"))
        commit(storage, say(pacer, [job], "b", is_last=True))
    before = plans(storage)
    for statement in (job_statements.CLAIM, job_statements.COMMIT_CHUNKS):
        [(num_kept, num_new)] = [before[sql] for sql in before if sql.startswith(statement.text[:30])]
        assert num_kept > 0 == num_new
    monkeypatch.setattr("storage.database.PLAN_SECONDS", 0.0)
    executed: list[str] = []
    event.listen(storage._database, "before_cursor_execute", lambda *args: executed.append(args[2].split()[0]))
    storage.plan_ahead()
    assert executed == ["DISCARD", "WITH"]


def test_a_repeated_look_into_sql_gives_back_what_the_first_one_took_but_nothing_that_runs(
    storage: JobStorage, make_job: MakeJob
) -> None:
    (running,) = claim(storage, [make_job().id])
    lost = make_job().id
    storage.claim(1, Lane.STANDARD, frozenset({running.id}), num_slots=16, min_suspicions=0, is_repeated=False)
    (found,) = storage.claim(
        1, Lane.STANDARD, frozenset({running.id}), num_slots=16, min_suspicions=0, is_repeated=True
    )
    assert (found.id, found.attempt) == (lost, 2)
    with storage.sessions() as session:
        assert session.get_one(Job, running.id).attempt == 1
