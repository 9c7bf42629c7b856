"""Messages: a bounded window per queue, sent again when lost, and a broker in trouble is never the API's trouble."""

import base64
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
import redis.asyncio
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog, ModelSpec
from domain.jobs import BATCH_PRIORITY, BatchStatus, JobStatus, WorkerState, external_id, new_id
from local.servers import EmbeddedRedis
from settings import Settings
from storage import batch_lines, jobs, workers
from storage.database import async_session_factory, open_async_database
from storage.files import Batch, BatchLine
from storage.tables import Job
from tasks.dispatch import BROKER_DEADLINE_SECONDS, Dispatcher, count_waiting, dispatch, raise_overdue_lines, send
from tasks.messages import MAX_RINGS, bell_key, revoke_channel
from tests.conftest import MakeTenant
from tests.integration.consumer_harness import MakePlant, make_plant
from tests.waiting import slowness, wait_until

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
    ids = {external_id(make_job().id) for _ in range(7)}
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 4
    assert set(sent_jobs(client)) < ids
    assert client.llen(bell_key(SPEC.queue)) == 4
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 0

    client.rpop(SPEC.queue)
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 1


def test_the_window_grows_with_the_slots_of_live_workers(
    client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    for _ in range(9):
        make_job()
    heartbeat(session_factory, 3)
    heartbeat(session_factory, 100, is_draining=True)
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 6


def test_there_are_no_more_messages_than_jobs(
    client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    make_job()
    make_job(status=JobStatus.IN_PROGRESS)
    make_job(model="another-model")
    make_job(priority=BATCH_PRIORITY)  # not let in
    make_job(lane="isolated")
    make_job(committed_sequence_number=1, model_revision="that nobody serves")
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 1
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 0


@pytest.mark.parametrize("num_dispatches", [0, 1], ids=["held", "let in before"])
@pytest.mark.parametrize(
    ("window_hours", "age_minutes", "is_overdue"),
    [(1, 14, False), (1, 16, True), (24, 195, False), (24, 205, True), (168, 205, True)],
)
def test_a_batch_yields_to_a_neighbours_endless_jobs_for_a_part_of_its_window(
    session_factory: sessionmaker[Session],
    make_job: MakeJob,
    make_tenant: MakeTenant,
    *,
    num_dispatches: int,
    window_hours: int,
    age_minutes: int,
    is_overdue: bool,
) -> None:
    """More of them wait than there are messages, so that there is never room for a line."""
    heartbeat(session_factory, 4)
    noisy, quiet = make_tenant(), make_tenant()
    for _ in range(3 * SETTINGS.dispatch_window_min):
        make_job(tenant_id=noisy.id, model=SPEC.id)
    lines = [
        make_job(tenant_id=quiet.id, model=SPEC.id, priority=BATCH_PRIORITY, num_dispatches=num_dispatches).id
        for _ in range(5)
    ]
    created_at = datetime.now(UTC) - timedelta(minutes=age_minutes)
    with session_factory.begin() as session:
        add_batch(session, quiet.id, lines, created_at=created_at, window=timedelta(hours=window_hours))
    raise_overdue_lines(session_factory, SPEC, SETTINGS)
    with session_factory.begin() as session:
        running = jobs.claim(session, SPEC.id, limit=4, owner=uuid4(), model_revision="main", lease_seconds=60)
        served = [job.id for job in running if job.id in lines]
        assert len(served) == (2 if is_overdue else 0), "as any other tenant's jobs"
    with session_factory.begin() as session:
        outstanding = batch_lines.num_outstanding(session, SPEC.id)
        assert outstanding == (5 if num_dispatches else 3 if is_overdue else 0), "within the share of all lines"


def add_batch(
    session: Session, tenant_id: UUID, job_ids: Sequence[UUID], *, created_at: datetime, window: timedelta
) -> None:
    batch = Batch(
        id=new_id(),
        tenant_id=tenant_id,
        status=BatchStatus.IN_PROGRESS,
        endpoint="/v1/completions",
        input_file_id=new_id(),
        completion_window="24h",
        batch_metadata={},
        output_ttl_seconds=60,
        model=SPEC.id,
        created_at=created_at,
        expires_at=created_at + window,
    )
    session.add(batch)
    session.flush()
    for number, job_id in enumerate(job_ids):
        place = {"first_byte": number, "num_bytes": 1, "prefix_hash": 0}
        session.add(BatchLine(batch_id=batch.id, line=number, custom_id=str(number), job_id=job_id, **place))


def test_a_message_that_is_lost_is_sent_again_at_the_next_look(
    client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    make_job()
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 1
    client.flushall()
    assert dispatch(session_factory, client, SPEC, SETTINGS) == 1


def test_rings_are_bounded(client: redis.Redis) -> None:
    assert send(client, SPEC.queue, [new_id() for _ in range(300)], window=200) == 200
    assert send(client, SPEC.queue, [], window=300) == 0
    assert count_waiting(client, SPEC.queue) == 200
    assert client.llen(bell_key(SPEC.queue)) == MAX_RINGS


async def test_jobs_accepted_in_a_burst_are_sent_in_order_and_within_the_window(
    dispatcher: Dispatcher, client: redis.Redis
) -> None:
    """Without a look at the jobs, which may not be there."""
    job_ids = [new_id() for _ in range(9)]
    for job_id in job_ids:
        dispatcher.ring(SPEC.id, job_id)
    await dispatcher.aclose()
    assert sent_jobs(client) == [external_id(job_id) for job_id in job_ids[:4]]
    client.rpop(SPEC.queue)
    late = new_id()
    dispatcher.ring(SPEC.id, late)
    await dispatcher.aclose()
    assert sent_jobs(client) == [external_id(job_id) for job_id in (*job_ids[1:4], late)]


async def test_a_broker_that_is_down_fails_no_accept(
    dispatcher: Dispatcher, redis_server: EmbeddedRedis, client: redis.Redis
) -> None:
    redis_server.stop()
    dispatcher.ring(SPEC.id, new_id())
    dispatcher.revoke_running(new_id())
    await dispatcher.aclose()
    redis_server.start()
    later = new_id()
    dispatcher.ring(SPEC.id, later)
    await dispatcher.aclose()
    assert sent_jobs(client) == [external_id(later)]


async def test_a_broker_that_hangs_costs_the_deadline(dispatcher: Dispatcher, redis_server: EmbeddedRedis) -> None:
    dispatcher.ring(SPEC.id, new_id())
    await dispatcher.aclose()  # a connection stands
    pid = redis_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        started_at = time.monotonic()
        dispatcher.ring(SPEC.id, new_id())
        dispatcher.revoke_running(new_id())
        assert time.monotonic() - started_at < BROKER_DEADLINE_SECONDS / 2 * slowness(), "neither waits"
        await dispatcher.aclose()
        assert time.monotonic() - started_at < 2 * slowness()
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_database_that_refuses_fails_no_accept(redis_url: str, tmp_path: Path) -> None:
    database = open_async_database(f"postgresql:///none?host={tmp_path}")
    client = redis.asyncio.Redis.from_url(redis_url)
    dispatcher = Dispatcher(async_session_factory(database), client, Catalog([SPEC]), SETTINGS)
    dispatcher.ring(SPEC.id, new_id())
    await dispatcher.aclose()
    await client.aclose()
    await database.dispose()


async def test_a_storm_of_cancels_is_few_broadcasts(dispatcher: Dispatcher, client: redis.Redis) -> None:
    """Each is work for every worker."""
    channel = revoke_channel(int(client.connection_pool.connection_kwargs.get("db") or 0))
    with client.pubsub(ignore_subscribe_messages=True) as listener:  # type: ignore[no-untyped-call]
        listener.subscribe(channel)
        wait_until(lambda: client.pubsub_numsub(channel)[0][1] == 1)
        job_ids = [new_id() for _ in range(1_000)]
        for job_id in job_ids:
            dispatcher.revoke_running(job_id)
        await dispatcher.aclose()
        told: list[str] = []
        num_broadcasts = 0
        while len(told) < len(job_ids):
            message = wait_until(lambda: listener.get_message(timeout=1))
            body = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
            told += body["arguments"]["task_id"]
            num_broadcasts += 1
    assert told == list(map(external_id, job_ids))
    assert num_broadcasts <= 3


async def test_a_cancel_reaches_the_worker_that_runs_the_job(dispatcher: Dispatcher, make_plant: MakePlant) -> None:
    plant = make_plant()
    plant.start_worker()
    job_ids: list[UUID] = plant.send(2)
    plant.wait_for("claimed", job_ids)
    dispatcher.revoke_running(job_ids[0])
    await dispatcher.aclose()
    plant.wait_for("cancelled", job_ids[:1])
    assert plant.jobs("completed") == []
