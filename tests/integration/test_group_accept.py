"""Group commit: what arrives together is committed together, and one job's trouble is its own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from domain.errors import ServerOverloaded, StorageUnavailable
from domain.jobs import new_id
from domain.requests import GenerationRequest
from settings import Settings
from storage import answers, job_accept
from storage.database import async_session_factory, keep_plans, open_statement_database
from storage.job_accept import Accepted, AcceptOutcome, CannotSendTogether, NewJob
from storage.tables import DEFAULT_TENANT_ID, Job
from tasks import accept as group_accept
from tasks.accept import GroupAcceptor, open_acceptor
from tests.waiting import SECONDS, slowness, wait_until_async


def make_new_job(**fields: Any) -> NewJob:
    request = GenerationRequest(model="fake", prompt="Hello")
    defaults: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": DEFAULT_TENANT_ID,
        "request": request,
        "prompt_token_ids": [1, 2, 3],
        "model_revision": "main",
        "max_tokens": 16,
        "seed": 7,
        "max_failures": 3,
        "result_ttl_seconds": 3600,
        "request_hash": b"hash",
    }
    return NewJob(**defaults | fields)


@pytest.fixture
async def async_database(database_url: str) -> AsyncIterator[AsyncEngine]:
    database = open_statement_database(database_url, pool_size=4)
    yield database
    await database.dispose()


@pytest.fixture
def sessions(async_database: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    return async_session_factory(async_database)


@pytest.fixture
async def acceptor(sessions: async_sessionmaker[AsyncSession]) -> AsyncIterator[GroupAcceptor]:
    acceptor = GroupAcceptor(sessions, max_queued_jobs=1000)
    acceptor.start()
    yield acceptor
    await acceptor.stop()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the groups that reach SQL."""
    sizes: list[int] = []
    accept = job_accept.accept

    def counted(session: Session, new_jobs: list[NewJob], **bounds: Any) -> list[Accepted]:
        sizes.append(len(new_jobs))
        return accept(session, new_jobs, **bounds)

    monkeypatch.setattr(job_accept, "accept", counted)
    return sizes


async def count_jobs(sessions: async_sessionmaker[AsyncSession]) -> int:
    async with sessions() as session:
        return await session.scalar(select(func.count()).select_from(Job)) or 0


async def test_what_arrives_together_is_committed_in_few_groups(
    acceptor: GroupAcceptor, sessions: async_sessionmaker[AsyncSession], groups: list[int]
) -> None:
    new_jobs = [make_new_job() for _ in range(100)]
    accepted = await asyncio.gather(*(acceptor.accept(job) for job in new_jobs))
    assert [answer.job_id for answer in accepted] == [job.id for job in new_jobs]
    assert {answer.outcome for answer in accepted} == {AcceptOutcome.ACCEPTED}
    assert all(answer.created_at is not None for answer in accepted)
    assert await count_jobs(sessions) == sum(groups) == 100
    assert len(groups) <= 4


async def test_workers_are_told_after_the_commit_and_before_the_clients(
    async_database: AsyncEngine, sessions: async_sessionmaker[AsyncSession], session_factory: sessionmaker[Session]
) -> None:
    told: list[str] = []
    sending: list[asyncio.Task[None]] = []
    new_jobs = [make_new_job(idempotency_key=key) for key in ("a", "b", "a")]

    async def send(job_id: UUID) -> None:
        with session_factory() as session:
            told.append(f"sent {[job.id for job in new_jobs].index(job_id)} {session.get_one(Job, job_id).status}")

    acceptor = GroupAcceptor(
        sessions,
        max_queued_jobs=10,
        ring=lambda model, job_id: sending.append(asyncio.get_running_loop().create_task(send(job_id))),
    )
    acceptor.start()

    async def submit(number: int) -> None:
        told.append(f"{(await acceptor.accept(new_jobs[number])).outcome} {number}")

    await asyncio.gather(*map(submit, range(3)))
    assert told == ["sent 0 queued", "sent 1 queued", "accepted 0", "accepted 1", "duplicate 2"]
    await acceptor.stop()


async def test_what_a_busy_loop_reads_one_by_one_goes_in_one_group(acceptor: GroupAcceptor, groups: list[int]) -> None:
    submissions = []
    for _ in range(10):
        submissions.append(asyncio.create_task(acceptor.accept(make_new_job())))
        await asyncio.sleep(0)  # a turn of the event loop, which brings one of them
    await asyncio.gather(*submissions)
    assert groups == [10]


async def test_long_prompts_are_committed_in_several_groups(
    acceptor: GroupAcceptor, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_accept, "MAX_GROUP_TOKENS", 10)
    new_jobs = [make_new_job(prompt_token_ids=[1] * 6) for _ in range(8)]
    await asyncio.gather(*(acceptor.accept(job) for job in new_jobs))
    assert groups == [2] * 4


async def test_a_group_that_is_too_long_is_sent_in_parts(
    acceptor: GroupAcceptor, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_accept, "MAX_DOCUMENT_BYTES", 20_000)
    new_jobs = [make_new_job(endpoint_body=f'"{" " * length}"') for length in (8_000, 8_000, 8_000, 50_000)]
    accepted = await asyncio.gather(*(acceptor.accept(job) for job in new_jobs))
    assert {answer.outcome for answer in accepted} == {AcceptOutcome.ACCEPTED}
    assert len(groups) > 2, "all were sent at once"


async def test_a_job_that_cannot_be_written_takes_nobody_with_it(acceptor: GroupAcceptor) -> None:
    new_jobs = [make_new_job(request_id=request_id) for request_id in ("a", "b", "\ud800", "c")]
    outcomes = await asyncio.gather(*(acceptor.accept(job) for job in new_jobs), return_exceptions=True)
    assert [isinstance(outcome, Accepted) for outcome in outcomes] == [True, True, False, True]


async def test_what_is_committed_is_accepted_though_the_rest_of_its_group_fails(
    acceptor: GroupAcceptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_jobs = [make_new_job() for _ in range(128)]
    accept = job_accept.accept

    def accept_first_half(session: Session, jobs: list[NewJob], **bounds: Any) -> list[Accepted]:
        if len(jobs) > 64:
            raise CannotSendTogether
        if jobs[0] is not new_jobs[0]:
            raise ValueError("no outage, and nothing that the database says")
        return accept(session, jobs, **bounds)

    monkeypatch.setattr(job_accept, "accept", accept_first_half)
    outcomes = await asyncio.gather(*(acceptor.accept(job) for job in new_jobs), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Accepted] * 64 + [ValueError] * 64


async def test_what_is_committed_is_accepted_by_an_acceptor_that_stops(
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    stopping: list[asyncio.Task[None]] = []

    def stop(model: str, job_id: UUID) -> None:
        stopping.append(asyncio.get_running_loop().create_task(stopped.stop()))

    stopped = GroupAcceptor(sessions, max_queued_jobs=100, ring=stop)
    stopped.start()
    accepted = await asyncio.gather(*(stopped.accept(make_new_job()) for _ in range(12)))
    assert {answer.outcome for answer in accepted} == {AcceptOutcome.ACCEPTED}
    await asyncio.gather(*stopping)


async def test_each_job_of_a_group_gets_its_own_answer(acceptor: GroupAcceptor) -> None:
    first, same, other = (
        make_new_job(idempotency_key="k"),
        make_new_job(idempotency_key="k"),
        make_new_job(idempotency_key="k", request_hash=b"another"),
    )
    answers = await asyncio.gather(*(acceptor.accept(job) for job in (first, same, other)))
    assert [answer.outcome for answer in answers] == [
        AcceptOutcome.ACCEPTED,
        AcceptOutcome.DUPLICATE,
        AcceptOutcome.KEY_REUSED,
    ]
    assert answers[1].job_id == first.id


async def test_a_job_that_sql_refuses_takes_nobody_with_it(
    acceptor: GroupAcceptor, sessions: async_sessionmaker[AsyncSession]
) -> None:
    good = [make_new_job() for _ in range(9)]
    bad = make_new_job(max_tokens=2**40)
    answers = await asyncio.gather(*(acceptor.accept(job) for job in [*good, bad]), return_exceptions=True)
    assert isinstance(answers[-1], RuntimeError)
    assert all(isinstance(answer, Accepted) for answer in answers[:-1])
    assert await count_jobs(sessions) == 9


async def test_jobs_run_if_their_answers_cannot_be_looked_up(
    acceptor: GroupAcceptor, sessions: async_sessionmaker[AsyncSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "ANSWER", text("SELECT 1 / (cardinality(CAST(:ids AS uuid[])) - 1)"))
    accepted = await acceptor.accept(make_new_job(answer_key=b"key"))
    assert (accepted.outcome, accepted.record) == (AcceptOutcome.ACCEPTED, None)
    assert await count_jobs(sessions) == 1


async def test_plans_are_kept_but_not_for_long(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = open_statement_database(database_url, pool_size=1, max_overflow=0)
    keep_plans(database.sync_engine)
    sessions = async_session_factory(database)
    query = text(
        "SELECT sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements WHERE statement ~ 'FROM jobs'"
    )
    async with sessions() as session:
        for _ in range(9):
            await session.scalar(select(func.count()).select_from(Job).where(Job.model == "fake"))
        num_generic, num_custom = (await session.execute(query)).one()
    assert num_generic > 0 == num_custom
    monkeypatch.setattr("storage.database.PLAN_SECONDS", 0.0)
    async with sessions() as session:
        pid = await session.scalar(text("SELECT pg_backend_pid()"))
    admin = open_statement_database(database_url)
    async with async_session_factory(admin)() as session:
        await session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
    async with sessions() as session:
        assert await session.scalar(text("SELECT pg_backend_pid()")) != pid, "a lost connection is replaced"
    await admin.dispose()
    await database.dispose()


async def test_while_no_job_comes_plans_are_made_anew(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.database.PLAN_SECONDS", 0.0)
    monkeypatch.setattr(group_accept, "AHEAD_SECONDS", 0.02)
    monkeypatch.setattr(group_accept, "QUIET_SECONDS", 0.02)
    executed: list[str] = []
    async with open_acceptor(Settings(database_url=database_url), ring=lambda model, job_id: None) as acceptor:
        database = acceptor._sessions.kw["bind"].sync_engine
        event.listen(database, "before_cursor_execute", lambda *args: executed.append(args[2].split()[0]))
        await wait_until_async(lambda: executed.count("WITH") >= 2)
    assert [word for word in executed if word in ("DISCARD", "WITH")][:4] == ["DISCARD", "WITH"] * 2


async def test_plans_are_made_between_jobs_and_after_any_failure(
    sessions: async_sessionmaker[AsyncSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_accept, "AHEAD_SECONDS", 0.0)
    monkeypatch.setattr(group_accept, "QUIET_SECONDS", 0.02)
    planned: list[Session] = []

    def plan_ahead(session: Session, **bounds: int) -> None:
        planned.append(session)
        raise ValueError("no outage, and nothing that the database says")

    monkeypatch.setattr(job_accept, "plan_ahead", plan_ahead)
    acceptor = GroupAcceptor(sessions, max_queued_jobs=10)
    acceptor.start()
    for _ in range(3):
        await acceptor.accept(make_new_job())
        planned.clear()
        await wait_until_async(lambda: planned, "plans are made after this job")
    await acceptor.stop()


async def test_a_commit_whose_answer_was_lost_is_found_and_not_repeated(
    acceptor: GroupAcceptor,
    async_database: AsyncEngine,
    sessions: async_sessionmaker[AsyncSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The connection breaks after the server committed."""
    num_cut = 0
    commit = Session.commit

    def commit_and_lose(self: Session) -> None:
        nonlocal num_cut
        commit(self)
        if num_cut < 2:
            num_cut += 1
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))

    monkeypatch.setattr(Session, "commit", commit_and_lose)
    new_jobs = [make_new_job() for _ in range(5)]
    answers = await asyncio.gather(*(acceptor.accept(job) for job in new_jobs))
    assert {answer.outcome for answer in answers} == {AcceptOutcome.ACCEPTED}
    assert await count_jobs(sessions) == 5
    assert num_cut == 2


async def test_a_connection_that_breaks_in_the_statement_is_replaced(
    acceptor: GroupAcceptor, async_database: AsyncEngine, sessions: async_sessionmaker[AsyncSession]
) -> None:
    await acceptor.accept(make_new_job())
    num_cut = 0

    @event.listens_for(async_database.sync_engine, "before_cursor_execute")
    def cut(connection: Any, cursor: Any, statement: str, *rest: object) -> None:
        nonlocal num_cut
        if "INSERT INTO jobs" in statement and num_cut == 0:
            num_cut += 1
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    answer = await acceptor.accept(make_new_job())
    assert (num_cut, answer.outcome) == (1, AcceptOutcome.ACCEPTED)
    assert await count_jobs(sessions) == 2


async def test_a_database_that_is_down_is_said_at_once() -> None:
    database = open_statement_database("postgresql://nobody@127.0.0.1:1/none", pool_size=2)
    acceptor = GroupAcceptor(async_session_factory(database), max_queued_jobs=10)
    acceptor.start()
    async with asyncio.timeout(3 * slowness()):
        with pytest.raises(StorageUnavailable):
            await acceptor.accept(make_new_job())
    await acceptor.stop()
    await database.dispose()


@pytest.fixture
async def hang(sessions: async_sessionmaker[AsyncSession]) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Makes accepts wait for a row until the test ends: a database that hangs, as far as they can tell."""
    released, held = asyncio.Event(), asyncio.Event()
    holders: list[asyncio.Task[None]] = []

    async def hold() -> None:
        async with sessions() as session:
            await session.execute(text("BEGIN"))
            await session.execute(text("SELECT FROM tenant_load FOR UPDATE"))
            held.set()
            await released.wait()
            await session.execute(text("ROLLBACK"))

    async def begin() -> None:
        holders.append(asyncio.create_task(hold()))
        await held.wait()

    yield begin
    released.set()
    await asyncio.gather(*holders)


async def test_a_database_that_hangs_is_not_waited_for(
    acceptor: GroupAcceptor,
    groups: list[int],
    hang: Callable[[], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_accept, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(group_accept, "STALLED_SECONDS", 0.1)
    await hang()
    first = [asyncio.create_task(acceptor.accept(make_new_job())) for _ in range(2)]
    await wait_until_async(lambda: groups, "they were sent")
    first.append(asyncio.create_task(acceptor.accept(make_new_job())))
    for answer in await asyncio.gather(*first, return_exceptions=True):
        assert isinstance(answer, StorageUnavailable)
        assert "Idempotency-Key" in answer.message
    monkeypatch.setattr(group_accept, "ANSWER_SECONDS", 600.0)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(StorageUnavailable, match="does not answer"):
            await acceptor.accept(make_new_job())


async def test_more_than_can_wait_is_refused(
    sessions: async_sessionmaker[AsyncSession], hang: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_accept, "MAX_WAITING", 6)  # half of it for one tenant
    acceptor = GroupAcceptor(sessions, max_queued_jobs=1000)
    acceptor.start()
    await hang()
    waiting = []
    for _ in range(group_accept.NUM_FLUSHERS):  # each flusher takes one and hangs
        waiting.append(asyncio.create_task(acceptor.accept(make_new_job())))
        await asyncio.sleep(0.05)
    waiting += [asyncio.create_task(acceptor.accept(make_new_job())) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ServerOverloaded):
        await acceptor.accept(make_new_job())
    another = asyncio.create_task(acceptor.accept(make_new_job(tenant_id=uuid4())))
    await asyncio.sleep(0)
    assert not another.done(), "another tenant is refused"
    for task in (*waiting, another):
        task.cancel()
    await asyncio.gather(*waiting, another, return_exceptions=True)
    await acceptor.stop()


async def test_a_client_that_left_before_its_turn_leaves_no_job(
    sessions: async_sessionmaker[AsyncSession], groups: list[int]
) -> None:
    acceptor = GroupAcceptor(sessions, max_queued_jobs=10)
    leaving = asyncio.create_task(acceptor.accept(make_new_job()))
    staying = asyncio.create_task(acceptor.accept(make_new_job()))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait((leaving,))
    acceptor.start()
    assert (await staying).outcome is AcceptOutcome.ACCEPTED
    assert groups == [1]
    assert await count_jobs(sessions) == 1
    await acceptor.stop()


async def test_stopping_answers_everybody(sessions: async_sessionmaker[AsyncSession]) -> None:
    acceptor = GroupAcceptor(sessions, max_queued_jobs=10)  # never started: nobody takes what waits
    waiting = asyncio.create_task(acceptor.accept(make_new_job()))
    await asyncio.sleep(0)
    await acceptor.stop()
    with pytest.raises(StorageUnavailable, match="shutting down"):
        await waiting


async def test_unknown_tenants_cannot_be_accepted_for(acceptor: GroupAcceptor) -> None:
    stranger: UUID = uuid4()
    answer = await acceptor.accept(make_new_job(tenant_id=stranger))
    assert answer.outcome is AcceptOutcome.TOO_MANY_QUEUED
