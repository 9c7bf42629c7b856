"""A stream shows each committed chunk once and in order, whatever happens to the messages that announce them."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from sqlalchemy import make_url, text
from sqlalchemy.event import listen
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import FinishReason, JobStatus, Usage
from domain.requests import GenerationResult, TokenChunk
from local.servers import EmbeddedRedis
from storage import jobs, known_jobs, streams
from storage.database import async_session_factory, open_async_database
from storage.jobs import ChunkCommit, Finalisation
from storage.stream_channels import channel_of
from storage.streams import Event, Started, StatusChange, StreamReader, publish
from storage.tables import Job
from tests.conftest import MakeJob
from tests.storage_samples import claim_these
from tests.waiting import SECONDS, wait_until_async

SILENCE_SECONDS = 0.2
Received = list[TokenChunk | StatusChange]


@pytest.fixture
async def async_sessions(database_url: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    database = open_async_database(database_url)
    yield async_session_factory(database)
    await database.dispose()


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=0.3, socket_connect_timeout=0.3) as client:
        yield client


@pytest.fixture
async def reader(redis_url: str, async_sessions: async_sessionmaker[AsyncSession]) -> AsyncIterator[StreamReader]:
    async with StreamReader(redis_url, async_sessions, silence_seconds=SILENCE_SECONDS) as reader:
        yield reader


class RunningJob:
    """A job in progress, and this test as its worker: it commits, and announces what it chooses to."""

    def __init__(self, sessions: sessionmaker[Session], job: Job, client: redis.Redis) -> None:
        self.sessions, self.job, self.client = sessions, job, client
        self.last = 0

    def commit(self, count: int = 1) -> list[TokenChunk]:
        numbers = range(self.last + 1, self.last + count + 1)
        chunks = [TokenChunk(sequence_number=n, text=f"{n} ", token_ids=(n,)) for n in numbers]
        with self.sessions.begin() as session:
            commit = ChunkCommit(self.job.id, self.job.attempt, chunks)
            assert jobs.commit_chunks(session, [commit], lease_seconds=60)
        self.last += count
        return chunks

    def publish(self, *events: Event) -> None:
        publish(self.client, [(self.job.id, event) for event in events])

    def complete(self, *, is_announced: bool = True) -> None:
        result = GenerationResult(choices=(), usage=Usage())
        ending = Finalisation(self.job.id, self.job.attempt, self.last, JobStatus.COMPLETED, result, FinishReason.STOP)
        with self.sessions.begin() as session:
            assert jobs.finalise(session, [ending])
        if is_announced:
            self.publish(JobStatus.COMPLETED)


@pytest.fixture
def start_job(
    session_factory: sessionmaker[Session], make_job: MakeJob, client: redis.Redis
) -> Callable[[], RunningJob]:
    return lambda: RunningJob(session_factory, make_job(status=JobStatus.IN_PROGRESS), client)


@asynccontextmanager
async def following(reader: StreamReader, job: RunningJob, *, starting_after: int = 0) -> AsyncIterator[Received]:
    """Read a stream in the background; at the end of the block, wait for its end."""
    received: Received = []

    async def read() -> None:
        async with aclosing(reader.read(job.job.id, starting_after=starting_after)) as events:
            async for event in events:
                received.append(event)

    task = asyncio.create_task(read())
    try:
        await wait_until_async(lambda: received)  # it has begun: `in_progress` is there
        yield received
        await asyncio.wait_for(task, SECONDS)
    finally:
        task.cancel()


def numbers(received: Received) -> list[int]:
    return [event.sequence_number for event in received if isinstance(event, TokenChunk)]


def statuses(received: Received) -> list[JobStatus]:
    return [event.status for event in received if isinstance(event, StatusChange)]


async def test_chunks_and_statuses_arrive_live(reader: StreamReader, start_job: Callable[[], RunningJob]) -> None:
    job = start_job()
    async with following(reader, job) as received:
        for _ in range(20):
            job.publish(*job.commit(2))
        await wait_until_async(lambda: len(numbers(received)) == 40)
        job.complete()
    assert numbers(received) == list(range(1, 41))
    assert statuses(received) == [JobStatus.IN_PROGRESS, JobStatus.COMPLETED]
    assert isinstance(received[0], StatusChange)
    assert isinstance(received[-1], StatusChange)


async def test_a_live_chunk_is_shown_without_asking_sql(
    reader: StreamReader, start_job: Callable[[], RunningJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = start_job()
    async with following(reader, job) as received:
        await wait_until_async(lambda: reader._listener._subscribed[job.job.id].is_set())
        looked = asyncio.Event()
        monkeypatch.setattr(streams._Stream, "look", lambda stream: looked.set())
        job.publish(*job.commit())
        await wait_until_async(lambda: numbers(received) == [1])
        assert not looked.is_set()
        monkeypatch.undo()
        job.complete()


async def test_a_stream_replays_from_the_position_asked_for(
    reader: StreamReader, start_job: Callable[[], RunningJob]
) -> None:
    job = start_job()
    job.commit(1200)  # more than two pages
    job.complete()
    async with following(reader, job, starting_after=7) as received:
        pass
    assert numbers(received) == list(range(8, 1201))
    assert statuses(received) == [JobStatus.COMPLETED]


@pytest.mark.parametrize("seed", range(4))
async def test_lost_repeated_and_reordered_messages_leave_no_trace(
    reader: StreamReader, start_job: Callable[[], RunningJob], seed: int
) -> None:
    chance = random.Random(seed)
    job = start_job()
    held_back: list[TokenChunk] = []
    async with following(reader, job) as received, following(reader, job) as also_received:
        for _ in range(60):
            chunks = job.commit(chance.randint(1, 3))
            held_back += [chunk for chunk in chunks for _ in range(chance.choice([0, 1, 1, 2]))]
            chance.shuffle(held_back)
            announced = held_back[: chance.randint(0, len(held_back))]
            del held_back[: len(announced)]
            job.publish(*announced)
            if chance.random() < 0.3:
                await asyncio.sleep(0.01)
        job.complete(is_announced=chance.random() < 0.5)
    for events in (received, also_received):
        assert numbers(events) == list(range(1, job.last + 1))
        assert statuses(events) == [JobStatus.IN_PROGRESS, JobStatus.COMPLETED]


async def test_malformed_messages_are_dropped(reader: StreamReader, start_job: Callable[[], RunningJob]) -> None:
    job = start_job()
    forged = TokenChunk(sequence_number=1, text="x").model_copy(update={"sequence_number": 0}).model_dump_json()
    async with following(reader, job) as received:
        for payload in (
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b'{"chunk": {"sequence_number": "x"}}',
            f'{{"chunk": {forged}}}',
        ):
            job.client.publish(channel_of(job.job.id), payload)
        job.client.publish("celeriac:stream:not-a-job", b"{}")
        job.publish(*job.commit())
        job.complete()
    assert numbers(received) == [1]


async def test_a_status_that_sql_does_not_confirm_is_not_shown(
    reader: StreamReader, start_job: Callable[[], RunningJob]
) -> None:
    job = start_job()
    async with following(reader, job) as received:
        job.publish(JobStatus.FAILED)
        job.publish(*job.commit())
        await wait_until_async(lambda: numbers(received) == [1])
        job.complete()
    assert statuses(received) == [JobStatus.IN_PROGRESS, JobStatus.COMPLETED]


async def test_a_lost_attempt_shows_as_queued_and_the_next_one_goes_on(
    reader: StreamReader, start_job: Callable[[], RunningJob], session_factory: sessionmaker[Session]
) -> None:
    job = start_job()
    assert job.job.lease_owner is not None
    async with following(reader, job) as received:
        job.publish(*job.commit(3))
        with session_factory.begin() as session:
            jobs.release(session, [job.job.id], owner=job.job.lease_owner)
        job.publish(JobStatus.QUEUED)
        await wait_until_async(lambda: JobStatus.QUEUED in statuses(received))
        with session_factory.begin() as session:
            [claimed] = claim_these(session, [job.job.id], owner=uuid4(), model_revision="main", lease_seconds=60)
        assert [chunk.sequence_number for chunk in claimed.committed_chunks] == [1, 2, 3]
        job.job.attempt = claimed.attempt
        job.publish(JobStatus.IN_PROGRESS)
        await wait_until_async(lambda: statuses(received)[-1] is JobStatus.IN_PROGRESS)
        job.publish(*job.commit(2))
        job.complete()
    assert numbers(received) == [1, 2, 3, 4, 5]
    assert [event for event in received if isinstance(event, StatusChange)] == [
        StatusChange(JobStatus.IN_PROGRESS, 1),
        StatusChange(JobStatus.QUEUED, 1),
        StatusChange(JobStatus.IN_PROGRESS, 2),
        StatusChange(JobStatus.COMPLETED, 2),
    ]


async def test_a_start_is_shown_without_asking_sql_once_all_chunks_before_it_are(
    redis_url: str,
    async_sessions: async_sessionmaker[AsyncSession],
    start_job: Callable[[], RunningJob],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = start_job()
    async with (
        StreamReader(redis_url, async_sessions, silence_seconds=SECONDS) as reader,  # which does not look by itself
        following(reader, job) as received,
    ):
        await wait_until_async(lambda: reader._listener._subscribed[job.job.id].is_set())
        monkeypatch.setattr(reader._log, "read", None)
        job.publish(*job.commit(3), Started(1, after=0), Started(2, after=3), *job.commit())
        await wait_until_async(lambda: numbers(received) == [1, 2, 3, 4])
        assert statuses(received) == [JobStatus.IN_PROGRESS] * 2
        assert received[-2] == StatusChange(JobStatus.IN_PROGRESS, 2)
        monkeypatch.undo()
        job.commit()
        job.publish(Started(3, after=5))
        await wait_until_async(lambda: numbers(received) == [1, 2, 3, 4, 5])
        assert statuses(received) == [JobStatus.IN_PROGRESS] * 2, "of the third start SQL knows nothing"
        job.complete()
    assert statuses(received)[2:] == [JobStatus.COMPLETED], "the end is shown whatever was announced before it"


async def test_an_end_whose_message_is_lost_is_shown_whatever_start_was_announced_before_it(
    reader: StreamReader, start_job: Callable[[], RunningJob]
) -> None:
    job = start_job()
    async with following(reader, job) as received:
        await wait_until_async(lambda: reader._listener._subscribed[job.job.id].is_set())
        job.publish(Started(2, after=0))  # a crash of PostgreSQL loses the claim
        await wait_until_async(lambda: len(received) == 2)
        job.complete(is_announced=False)
    assert statuses(received) == [JobStatus.IN_PROGRESS] * 2 + [JobStatus.COMPLETED]


async def test_a_slow_consumer_catches_up_from_sql(reader: StreamReader, start_job: Callable[[], RunningJob]) -> None:
    job = start_job()
    received: Received = []
    async with aclosing(reader.read(job.job.id)) as events:
        received.append(await anext(events))
        for _ in range(10):
            job.publish(*job.commit(100))
        [stream] = reader._streams[job.job.id]
        await wait_until_async(lambda: stream.is_behind)
        assert len(stream.live) <= streams.MAX_LIVE_CHUNKS
        job.complete()
        async for event in events:
            received.append(event)
    assert numbers(received) == list(range(1, 1001))


async def test_a_stream_that_is_left_early_is_forgotten(
    reader: StreamReader, start_job: Callable[[], RunningJob], client: redis.Redis
) -> None:
    job = start_job()
    async with aclosing(reader.read(job.job.id)) as events:
        await anext(events)
        assert reader.num_streams == 1
        await wait_until_async(lambda: client.pubsub_numsub(channel_of(job.job.id))[0][1] == 1)
    assert reader.num_streams == 0
    await wait_until_async(lambda: client.pubsub_numsub(channel_of(job.job.id))[0][1] == 0)


async def test_a_deleted_job_ends_its_stream(
    reader: StreamReader, start_job: Callable[[], RunningJob], session_factory: sessionmaker[Session]
) -> None:
    job = start_job()
    async with following(reader, job) as received:
        with session_factory.begin() as session:
            assert jobs.delete(session, job.job.id, job.job.tenant_id)
    assert statuses(received) == [JobStatus.IN_PROGRESS]


async def test_one_connection_and_one_query_serve_many_streams(
    reader: StreamReader, start_job: Callable[[], RunningJob], client: redis.Redis
) -> None:
    running = [start_job() for _ in range(20)]
    async with AsyncExitStack() as stack:
        followed = [await stack.enter_async_context(following(reader, job)) for job in running for _ in range(3)]
        assert len(client.client_list(_type="pubsub")) == 1
        for job in running:
            job.commit(5)  # not announced: only silence tells
        await wait_until_async(lambda: all(numbers(received) == [1, 2, 3, 4, 5] for received in followed))
        for job in running:
            job.complete()


async def test_streams_that_begin_together_share_what_they_read(
    reader: StreamReader, start_job: Callable[[], RunningJob], async_sessions: async_sessionmaker[AsyncSession]
) -> None:
    reads: list[str] = []
    listen(
        async_sessions.kw["bind"].sync_engine,
        "before_cursor_execute",
        lambda _, cursor, statement, *rest: reads.append(statement),
    )
    job = start_job()
    job.commit(700)  # two pages
    async with AsyncExitStack() as stack:
        positions = [*range(0, 100), *range(600, 700)]
        opening = [stack.enter_async_context(following(reader, job, starting_after=after)) for after in positions]
        followed = await asyncio.gather(*opening)
        job.complete()
        await wait_until_async(lambda: all(statuses(received)[-1] is JobStatus.COMPLETED for received in followed))
    for after, received in zip(positions, followed, strict=True):
        assert numbers(received) == list(range(after + 1, 701))
    assert len(reads) < 30, "two hundred streams read the log by themselves"


@pytest.fixture
def log_reads(async_sessions: async_sessionmaker[AsyncSession]) -> list[str]:
    """The statements of this test that read a job's log."""
    reads: list[str] = []
    listen(
        async_sessions.kw["bind"].sync_engine,
        "before_cursor_execute",
        lambda _, cursor, statement, *rest: reads.extend([statement] if "job_chunks" in statement else []),
    )
    return reads


async def test_a_stream_that_begins_beside_others_reads_the_log_only_after_news(
    reader: StreamReader,
    start_job: Callable[[], RunningJob],
    log_reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_jobs, "KNOWN_SECONDS", SECONDS)
    job = start_job()
    job.commit(3)
    async with AsyncExitStack() as stack:

        async def begin(after: int = 0) -> Received:
            return await stack.enter_async_context(following(reader, job, starting_after=after))

        first = await begin()
        await wait_until_async(lambda: reader._listener.version_of(job.job.id) is not None)
        beside = [first, await begin()]
        num_read = len(log_reads)
        beside += [await begin(), await begin()]
        assert len(log_reads) == num_read, "what was read a moment ago was read again"
        job.commit()  # and the message is lost
        later = await begin(after=2)
        await wait_until_async(lambda: all(numbers(one) == [1, 2, 3, 4] for one in beside))  # silence tells
        job.publish(*job.commit())
        await wait_until_async(lambda: all(numbers(one)[-1] == 5 for one in (*beside, later)))
        beside.append(await begin())
        await wait_until_async(lambda: numbers(beside[-1]) == [1, 2, 3, 4, 5])
        job.publish(*job.commit())
        job.complete()
    assert [numbers(one) for one in beside] == [[1, 2, 3, 4, 5, 6]] * len(beside)
    assert numbers(later) == [3, 4, 5, 6]
    assert reader.version_of(job.job.id) is None


async def test_a_stream_that_begins_beside_others_knows_what_they_have_heard(
    reader: StreamReader,
    start_job: Callable[[], RunningJob],
    log_reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_jobs, "KNOWN_SECONDS", SECONDS)
    job = start_job()
    job.commit(3)
    async with AsyncExitStack() as stack:

        async def begin(after: int = 0) -> Received:
            return await stack.enter_async_context(following(reader, job, starting_after=after))

        first = await begin()
        await wait_until_async(lambda: reader._listener.version_of(job.job.id) is not None)
        second = await begin()
        job.publish(*job.commit(4))
        await wait_until_async(lambda: numbers(second)[-1:] == [7])
        num_read = len(log_reads)
        third, fourth = await begin(), await begin(after=5)
        await wait_until_async(lambda: numbers(third) == [1, 2, 3, 4, 5, 6, 7] and numbers(fourth) == [6, 7])
        assert len(log_reads) == num_read, "what others had heard was read"
        job.publish(*job.commit())
        job.complete()
    assert [numbers(one)[-1] for one in (first, second, third, fourth)] == [8] * 4


async def test_streams_survive_the_death_of_redis(
    tmp_path: Path,
    async_sessions: async_sessionmaker[AsyncSession],
    session_factory: sessionmaker[Session],
    make_job: MakeJob,
) -> None:
    with EmbeddedRedis(tmp_path) as server, redis.Redis.from_url(server.url, socket_timeout=0.3) as client:
        job = RunningJob(session_factory, make_job(status=JobStatus.IN_PROGRESS), client)
        async with StreamReader(server.url, async_sessions, silence_seconds=SILENCE_SECONDS) as reader:
            async with following(reader, job) as received:
                job.publish(*job.commit(2))
                await wait_until_async(lambda: numbers(received) == [1, 2])

                server.stop()
                job.publish(*job.commit(3))  # nobody hears it
                await wait_until_async(lambda: len(numbers(received)) == 5)

                server.start()
                await wait_until_async(lambda: reader._listener._connection is not None)
                job.publish(*job.commit(2))
                await wait_until_async(lambda: len(numbers(received)) == 7)

                client.flushall()
                job.publish(*job.commit(1))
                job.complete()
            assert numbers(received) == list(range(1, 9))


async def test_streams_leave_a_connection_that_died_silently(
    database_url: str,
    redis_url: str,
    session_factory: sessionmaker[Session],
    make_job: MakeJob,
    client: redis.Redis,
) -> None:
    """Its server process is frozen, as if cut off from us: the stream goes on over a new connection."""
    database = open_async_database(
        make_url(database_url).update_query_dict({"application_name": "frozen"}).render_as_string(hide_password=False)
    )
    job = RunningJob(session_factory, make_job(status=JobStatus.IN_PROGRESS), client)
    reader = StreamReader(redis_url, async_session_factory(database), silence_seconds=SILENCE_SECONDS)
    async with reader, following(reader, job) as received:
        job.publish(*job.commit(1))
        await wait_until_async(lambda: numbers(received) == [1])
        with session_factory() as session:
            pids = session.scalars(text("SELECT pid FROM pg_stat_activity WHERE application_name = 'frozen'")).all()
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            job.commit(1)
            await wait_until_async(lambda: numbers(received) == [1, 2])
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        job.complete()
    await database.dispose()


async def test_a_stream_begins_while_redis_is_down(
    tmp_path: Path,
    async_sessions: async_sessionmaker[AsyncSession],
    session_factory: sessionmaker[Session],
    make_job: MakeJob,
) -> None:
    server = EmbeddedRedis(tmp_path)
    url = server.start()
    server.stop()
    with redis.Redis.from_url(url, socket_timeout=0.3) as client:
        job = RunningJob(session_factory, make_job(status=JobStatus.IN_PROGRESS), client)
        reader = StreamReader(url, async_sessions, silence_seconds=SILENCE_SECONDS)
        async with reader, following(reader, job) as received:
            job.publish(*job.commit(3))
            await wait_until_async(lambda: numbers(received) == [1, 2, 3])
            job.complete()
    assert statuses(received) == [JobStatus.IN_PROGRESS, JobStatus.COMPLETED]
