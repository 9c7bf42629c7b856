"""Live chunks: the worker publishes them after their commit, and the API reads them.

Redis keys
| name                     | type    | lifetime | writer                     | reader |
|--------------------------|---------|----------|----------------------------|--------|
| celeriac:stream:{job_id} | channel | -        | worker, API, janitor       | API    |

A message is JSON: {"chunk": TokenChunk}, or {"status": JobStatus} after a transition, which makes the reader check SQL.
That of a claim has the attempt and the last chunk before it as well, so that no reader is asking SQL when the first
token comes. Pub/sub may lose, repeat or delay any message. The reader therefore subscribes first, replays SQL, goes
live, drops repeats and fills gaps. It emits a chunk only if it is the next one in sequence, the start of an attempt
only if it has all chunks before it, and takes all other statuses from SQL.

One pub/sub connection serves all streams of a process (storage/stream_channels.py). If Redis is down, slow or flushed,
nothing arrives, and the reader notices the silence.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic
from typing import Concatenate, ParamSpec, Self, TypeVar
from uuid import UUID

import redis
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from domain.jobs import JobStatus
from domain.requests import TokenChunk
from storage.database import within
from storage.job_queries import StreamState, stream_states
from storage.known_jobs import KnownJobs, LogPage
from storage.log_reads import READ_FAILURES, READ_SECONDS, LogReads
from storage.stream_channels import ChannelListener, channel_of

log = logging.getLogger(__name__)

MAX_LIVE_CHUNKS = 256  # per stream; a consumer that falls further behind catches up from SQL

SILENCE_SECONDS = 1.0

STORAGE_RETRY_SECONDS = 0.5  # before a database that did not answer is asked again


@dataclass(frozen=True, slots=True)
class Started:
    """The claim of a job is committed: the start of an attempt, which goes on after the chunk number `after`."""

    attempt: int
    after: int


Event = TokenChunk | JobStatus | Started

P = ParamSpec("P")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StatusChange:
    """`in_progress` means that an attempt has started; `queued`, that it was lost, or the job paused, and another will
    follow. A terminal status is the last event."""

    status: JobStatus
    attempt: int
    is_paused: bool = False


class StreamMessage(BaseModel):
    """A published message. Unknown fields come from later versions and are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    chunk: TokenChunk | None = None
    status: JobStatus | None = None
    attempt: int | None = None  # with `in_progress`, after a claim; as in Started
    after: int = 0

    @classmethod
    def of(cls, event: Event) -> Self:
        if isinstance(event, TokenChunk):
            return cls(chunk=event)
        if isinstance(event, Started):
            return cls(status=JobStatus.IN_PROGRESS, attempt=event.attempt, after=event.after)
        return cls(status=event)

    @property
    def news(self) -> TokenChunk | Started | None:
        """What a stream may emit; None if it should read SQL."""
        if self.chunk is not None or self.attempt is None or self.status is not JobStatus.IN_PROGRESS:
            return self.chunk
        return Started(self.attempt, self.after)


def publish(client: "redis.Redis", events: Iterable[tuple[UUID, Event]]) -> bool:
    """Publish committed chunks and transitions to open streams, in one round trip. Never call before their COMMIT.

    Returns whether Redis accepted them. A failure is not an error, since readers that miss a message read SQL a second
    later. `client` should have short timeouts.
    """
    pipeline = client.pipeline(transaction=False)
    for job_id, event in events:
        pipeline.publish(channel_of(job_id), StreamMessage.of(event).model_dump_json(exclude_defaults=True))
    try:
        pipeline.execute()
    except redis.RedisError as exc:
        log.warning("could not publish live chunks: %s", exc)
        return False
    return True


@dataclass(eq=False, slots=True)
class _Stream:
    """One consumer of one job's stream: its position, and the messages that have arrived for it."""

    job_id: UUID
    last: int  # the last sequence number emitted
    stage: tuple[int, int] = (0, 1)  # the last (attempt, stage within it) emitted; see _stage
    #: Mostly empty, for which a deque keeps half a kilobyte.
    live: list[TokenChunk | Started] = field(default_factory=list)
    is_behind: bool = True  # whether SQL may have something that the live queue does not have
    heard_at: float = field(default_factory=monotonic)
    news: asyncio.Future[None] | None = None  # while the consumer waits for some

    def offer(self, news: TokenChunk | Started) -> None:
        if isinstance(news, TokenChunk) and news.sequence_number <= self.last:
            return
        self.live.append(news)
        if len(self.live) > MAX_LIVE_CHUNKS:
            self.live.clear()
            self.is_behind = True
        self.heard_at = monotonic()
        self._tell()

    def take_live(self) -> list[TokenChunk | StatusChange]:
        """What has been heard and comes next. Behind a gap, the stream is behind, too."""
        taken: list[TokenChunk | StatusChange] = []
        heard, self.live = self.live, []
        for news in heard:
            if isinstance(news, Started):
                self.is_behind |= news.after > self.last
                taken += [] if self.is_behind else self._begin(news.attempt)
            elif news.sequence_number == self.last + 1:
                self.last += 1
                taken.append(news)
            elif news.sequence_number > self.last:
                self.is_behind = True
            if self.is_behind:
                break
        return taken

    def _begin(self, attempt: int) -> list[StatusChange]:
        if (attempt, 0) <= self.stage:
            return []
        self.stage = (attempt, 0)
        return [StatusChange(JobStatus.IN_PROGRESS, attempt)]

    def look(self) -> None:
        """Make the stream read SQL."""
        self.is_behind = True
        self.heard_at = monotonic()
        self._tell()

    def _tell(self) -> None:
        if self.news is not None and not self.news.done():
            self.news.set_result(None)

    async def wait_for_news(self) -> None:
        self.news = asyncio.get_running_loop().create_future()
        try:
            await self.news
        finally:
            self.news = None

    def knows(self, state: StreamState) -> bool:
        """A later start may have been announced, of a claim that was lost; of an end nothing is known before it."""
        stage = _stage(state)
        is_shown = stage == self.stage if state.status.is_terminal else stage <= self.stage
        return is_shown and state.committed_sequence_number <= self.last


class StreamReader:
    """All streams of this process: one Redis connection, and one query per second for all silent streams. Use as an
    async context manager."""

    def __init__(
        self,
        redis_url: str,
        sessions: async_sessionmaker[AsyncSession],
        *,
        silence_seconds: float = SILENCE_SECONDS,
        is_shared: bool = False,
    ) -> None:
        """`is_shared`: there may be several tenants, who take turns at reading the log."""
        self._sessions = sessions
        self.known = KnownJobs(self.version_of)
        self._log = LogReads(sessions, self.version_of, self.known, is_shared=is_shared)
        self._silence_seconds = silence_seconds
        self._streams: dict[UUID, set[_Stream]] = {}
        self._listener = ChannelListener(redis_url, on_message=self._on_message, on_gap=self._on_gap)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._listener.run()), asyncio.create_task(self._watch_silence())]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self._log.aclose(), return_exceptions=True)

    @property
    def num_streams(self) -> int:
        return sum(len(streams) for streams in self._streams.values())

    def num_readers(self, job_id: UUID) -> int:
        return len(self._streams.get(job_id, ()))

    def version_of(self, job_id: UUID) -> int | None:
        """For KnownJobs: another one after each message about the job; None if some may be missed, or if the job has no
        open stream."""
        return self._listener.version_of(job_id) if job_id in self._streams else None

    async def read(self, job_id: UUID, *, starting_after: int = 0) -> AsyncGenerator[TokenChunk | StatusChange]:
        """Yield every chunk after `starting_after`, each once and in order, and the status changes between them.

        Ends after a terminal status, or when the job is deleted. The stream of a running job starts with `in_progress`.
        A chunk that `is_reset` invalidates everything before it. The caller must have checked the job's tenant, and
        must close the generator (`contextlib.aclosing`) if the consumer may leave early. Raises JobUnreadable.
        """
        async with aclosing(self.read_batches(job_id, starting_after=starting_after)) as batches:
            async for batch in batches:
                for event in batch:
                    yield event

    async def read_batches(
        self, job_id: UUID, *, starting_after: int = 0
    ) -> AsyncGenerator[Sequence[TokenChunk | StatusChange]]:
        """As `read`, all that is there at once."""
        stream = _Stream(job_id, starting_after)
        self._streams.setdefault(job_id, set()).add(stream)
        try:
            # Subscribe first, then read the log. The other order loses a chunk published in between; this order can
            # only repeat one, and `last` drops it.
            await self._listener.add(job_id)
            stream.heard_at = monotonic()
            async with aclosing(self._follow(stream)) as batches:
                async for batch in batches:
                    yield batch
        finally:
            await self._leave(stream)

    async def _follow(self, stream: _Stream) -> AsyncGenerator[list[TokenChunk | StatusChange]]:
        known = self._known_to(stream)
        while True:
            if stream.is_behind:
                stream.is_behind = False  # before reading, so that a message during the read is not lost
                page, known = known or await self._read_log(stream), None
                stream.is_behind |= page.is_full
                state = page.state
                if events := list(_advance(stream, state, page.chunks)):
                    yield events
                if state is None or (state.status.is_terminal and stream.knows(state)):
                    return
            if not stream.is_behind and (chunks := stream.take_live()):
                yield chunks
            if not stream.is_behind and not stream.live:
                await stream.wait_for_news()

    def _known_to(self, stream: _Stream) -> LogPage | None:
        """What a stream that begins need not read. It is then as old as its neighbours that know it."""
        known = self.known.page(stream.job_id, after=stream.last)
        if known is None:
            return None
        page, stream.heard_at = known
        return page

    async def _read_log(self, stream: _Stream) -> LogPage:
        """Retries while the database is down."""
        while True:
            try:
                return await self._log.read(stream.job_id, after=stream.last)
            except READ_FAILURES:
                await asyncio.sleep(STORAGE_RETRY_SECONDS)

    async def _run(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        async with self._sessions() as session:
            return await session.run_sync(function, *args, **kwargs)

    async def _leave(self, stream: _Stream) -> None:
        streams = self._streams[stream.job_id]
        streams.remove(stream)
        if not streams:
            del self._streams[stream.job_id]
            self.known.forget(stream.job_id)
            await self._listener.remove(stream.job_id)

    def _on_message(self, job_id: UUID, payload: bytes) -> None:
        """Queue a message for the job's streams. Redis is not trusted: an invalid message is dropped."""
        streams = self._streams.get(job_id, set())
        try:
            message = StreamMessage.model_validate_json(payload)
        except ValidationError:
            log.warning("dropped a malformed message on a stream", extra={"job_id": str(job_id)})
            return
        self.known.hear(job_id, message.chunk)
        for stream in streams:
            if message.news is not None:
                stream.offer(message.news)
            elif message.status is not None:
                stream.look()

    def _on_gap(self, job_id: UUID) -> None:
        """Mark the job's streams to be checked. Does not read SQL immediately: after an outage of Redis, this is called
        for all streams, and one query serves them all."""
        self.known.forget(job_id)
        for stream in self._streams.get(job_id, ()):
            stream.heard_at = -math.inf

    async def _watch_silence(self) -> None:
        """Check SQL for silent streams, so that a dead Redis or a lost message costs latency, not chunks."""
        while True:
            await asyncio.sleep(self._silence_seconds / 2)
            self.known.forget_unused()
            silent_since = monotonic() - self._silence_seconds
            silent = [s for streams in self._streams.values() for s in streams if s.heard_at <= silent_since]
            if not silent:
                continue
            try:
                job_ids = list({stream.job_id for stream in silent})
                states = await within(READ_SECONDS, self._run(stream_states, job_ids))
            except READ_FAILURES as exc:
                log.warning("silent streams could not be checked: %s", exc.__class__.__name__)
                continue
            for job_id in job_ids:
                self.known.confirm(job_id, states.get(job_id))
            for stream in silent:
                stream.heard_at = monotonic()
                state = states.get(stream.job_id)
                if state is None or not stream.knows(state):
                    stream.look()


def _advance(
    stream: _Stream, state: StreamState | None, chunks: Sequence[TokenChunk]
) -> Iterable[TokenChunk | StatusChange]:
    """Advance the stream to what SQL has returned, and yield what is new: the start of an attempt comes before its
    chunks, its end after them. The end of the job is always new."""
    is_new = state is not None and (_stage(state) > stream.stage or state.status.is_terminal)
    if state is not None and is_new and state.status is JobStatus.IN_PROGRESS:
        stream.stage = _stage(state)
        yield StatusChange(state.status, state.attempt)
    for chunk in chunks:
        if chunk.sequence_number == stream.last + 1 or (chunk.is_reset and chunk.sequence_number > stream.last):
            stream.last = chunk.sequence_number  # chunks before a reset are no longer in the log
            yield chunk
    is_complete = state is not None and stream.last >= state.committed_sequence_number
    if state is not None and is_new and is_complete and state.status is not JobStatus.IN_PROGRESS:
        stream.stage = _stage(state)
        yield StatusChange(state.status, state.attempt, state.is_paused)


def _stage(state: StreamState) -> tuple[int, int]:
    """A key that orders a job's statuses in time: by attempt, then running, queued again, ended."""
    if state.status.is_terminal:
        return state.attempt, 2
    return state.attempt, int(state.status is JobStatus.QUEUED)
