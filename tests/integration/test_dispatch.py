"""Dispatch: a bounded window per queue, fairest first, and a broker in trouble is never the API's trouble."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
import redis.asyncio
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog, ModelSpec
from domain.jobs import JobStatus, WorkerState, external_id, new_id
from local.servers import EmbeddedRedis
from settings import Settings
from storage import workers
from storage.database import async_session_factory, open_async_database
from storage.tables import Job
from tasks.dispatch import Dispatcher, count_waiting, dispatch, push
from tasks.messages import MAX_RINGS, bell_key
from tests.integration.consumer_harness import MakePlant, make_plant
from tests.waiting import slowness

__all__ = ["make_plant"]

MakeJob = Callable[..., Job]
SPEC = ModelSpec(id="test-model", path="none", backend="fake", max_model_len=64)
SETTINGS = Settings(dispatch_window_min=4, dispatch_window_factor=2.0)

pytestmark = pytest.mark.anyio


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=2) as client:
        yield client


@pytest.fixture
async def dispatcher(database_url: str, redis_url: str) -> AsyncIterator[Dispatcher]:
    database = open_async_database(database_url)
    client = redis.asyncio.Redis.from_url(redis_url)
    dispatcher = Dispatcher(async_session_factory(database), client, Catalog([SPEC]), SETTINGS)
    yield dispatcher
    await dispatcher.aclose()
    await client.aclose()
    await database.dispose()


def sent_jobs(client: redis.Redis) -> list[str]:
    """External ids in the queue, the next one first."""
    messages: list[Any] = client.lrange(SPEC.queue, 0, -1)
    return [json.loads(message)["headers"]["id"] for message in reversed(messages)]


def heartbeat(session_factory: sessionmaker[Session], num_slots: int, *, is_draining: bool = False) -> None:
    report = workers.WorkerReport(
        id=uuid4(),
        hostname="gpu@test",
        model=SPEC.id,
        max_num_seqs=num_slots,
        num_running=0,
        tokens_per_second=0.0,
        state=WorkerState.DRAINING if is_draining else WorkerState.READY,
    )
    with session_factory.begin() as session:
        workers.heartbeat(session, report)


def test_a_dispatch_fills_the_window_and_no_more(
    client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    jobs = [make_job() for _ in range(7)]
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 4
    assert sent_jobs(client) == [external_id(job.id) for job in jobs[:4]]
    assert client.llen(bell_key(SPEC.queue)) == 4
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 0

    client.rpop(SPEC.queue)
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 1
    assert sent_jobs(client) == [external_id(job.id) for job in jobs[1:5]]


def test_the_window_grows_with_the_slots_of_live_workers(
    client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    for _ in range(9):
        make_job()
    heartbeat(session_factory, 3)
    heartbeat(session_factory, 100, is_draining=True)
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 6


def test_a_job_is_sent_once(client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob) -> None:
    make_job()
    make_job(status=JobStatus.IN_PROGRESS)
    make_job(model="another-model")
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 1
    client.delete(SPEC.queue)
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 0  # it comes due again by itself, later


def test_a_job_whose_mark_was_committed_without_an_answer_is_sent(
    client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    make_job()

    class LossySession(Session):
        """Its connection breaks behind the commit."""

    sessions: sessionmaker[Session] = sessionmaker(session_factory.kw["bind"], class_=LossySession)

    @event.listens_for(LossySession, "after_commit")
    def lose_the_answer(_: Session) -> None:
        raise OperationalError("COMMIT", {}, Exception("the connection is lost"))

    with pytest.raises(OperationalError):
        dispatch(sessions, client, SPEC, SETTINGS)
    assert count_waiting(client, SPEC.queue) == 1
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 0, "it is marked"


def test_rings_are_bounded(client: redis.Redis) -> None:
    push(client, SPEC.queue, [new_id() for _ in range(200)])
    push(client, SPEC.queue, [])
    assert count_waiting(client, SPEC.queue) == 200
    assert client.llen(bell_key(SPEC.queue)) == MAX_RINGS


async def test_nudges_in_a_burst_become_two_dispatches(
    dispatcher: Dispatcher, client: redis.Redis, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_dispatches = 0
    dispatch_once = dispatcher.dispatch

    async def counted(spec: ModelSpec) -> int:
        nonlocal num_dispatches
        num_dispatches += 1
        return await dispatch_once(spec)

    monkeypatch.setattr(dispatcher, "dispatch", counted)
    jobs = [make_job() for _ in range(3)]
    for _ in range(50):
        dispatcher.nudge(SPEC.id)
    await dispatcher.aclose()
    assert num_dispatches == 1  # all nudges came before it began
    dispatcher.nudge(SPEC.id)
    await asyncio.sleep(0)  # it has begun
    for _ in range(50):
        dispatcher.nudge(SPEC.id)
    await dispatcher.aclose()
    assert num_dispatches == 3
    assert sent_jobs(client) == [external_id(job.id) for job in jobs]


async def test_a_broker_that_is_down_fails_no_nudge_and_spends_no_job(
    dispatcher: Dispatcher, redis_server: EmbeddedRedis, redis_url: str, make_job: MakeJob
) -> None:
    job = make_job()
    redis_server.stop()
    dispatcher.nudge(SPEC.id)
    dispatcher.revoke_running(job.id)
    await dispatcher.aclose()
    redis_server.start()
    assert await dispatcher.dispatch(SPEC) == 1


async def test_a_broker_that_hangs_costs_the_deadline(
    dispatcher: Dispatcher, redis_server: EmbeddedRedis, make_job: MakeJob
) -> None:
    job = make_job()
    await dispatcher.dispatch(SPEC)  # a connection stands
    pid = redis_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        started_at = time.monotonic()
        dispatcher.nudge(SPEC.id)
        dispatcher.revoke_running(job.id)
        assert time.monotonic() - started_at < 0.05 * slowness()
        await dispatcher.aclose()
        assert time.monotonic() - started_at < 2 * slowness()
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_database_that_refuses_fails_no_nudge(redis_url: str, tmp_path: Path) -> None:
    database = open_async_database(f"postgresql:///none?host={tmp_path}")
    client = redis.asyncio.Redis.from_url(redis_url)
    dispatcher = Dispatcher(async_session_factory(database), client, Catalog([SPEC]), SETTINGS)
    dispatcher.nudge(SPEC.id)
    await dispatcher.aclose()
    await client.aclose()
    await database.dispose()


async def test_a_cancel_reaches_the_worker_that_runs_the_job(dispatcher: Dispatcher, make_plant: MakePlant) -> None:
    plant = make_plant()
    plant.start_worker()
    job_ids: list[UUID] = plant.send(2)
    plant.wait_for("claimed", job_ids)
    dispatcher.revoke_running(job_ids[0])
    await dispatcher.aclose()
    plant.wait_for("cancelled", job_ids[:1])
    assert plant.jobs("completed") == []
