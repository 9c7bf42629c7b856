"""The event stream of a job: which events there are, and in which order.

It has every committed chunk once and in order, then live chunks, then exactly one terminal event.
`id:` is the chunk's sequence number; the terminal event's is one higher than the last chunk's. If the job starts over,
a `job.reset`, which is numbered like a chunk, voids the text before it. Status events (job.queued, job.started,
job.paused, job.retrying, job.snapshot) have no `id:`, so they do not move a client's cursor; a client that resumes gets
the current ones.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Self, TypeVar
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from api.limits import size_of
from api.services import Services
from api.sse import frame
from dialects.errors import job_error_view
from dialects.native import JobView, PartialChoiceView, QueueView, job_view
from domain.errors import InvalidCursor, JobUnreadable, ServerOverloaded, StorageUnavailable
from domain.jobs import JobError, JobStatus, external_id
from domain.requests import TokenChunk
from storage import job_queries
from storage.job_queries import CHUNKS_PER_READ
from storage.streams import STORAGE_RETRY_SECONDS, StatusChange
from storage.tables import Job

#: How long to wait before the first query for a job's queue position, and between two later ones. A job that starts
#: sooner than that has no job.queued event and costs no query.
QUEUE_POLL_SECONDS = (0.1, 1.0)

PIECE_BYTES = 65_536  # of frames that are sent at once, or a single frame that is longer

COMMENT_AND_RETRY = b"retry: 1000\n: celeriac\n"  # sets the reconnection delay; without data, no event is dispatched

Beginning = Literal["start", "snapshot", "now"]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a stream begins: after the chunk with the sequence number `after`, or with a snapshot of the text so
    far."""

    after: int
    has_snapshot: bool = False


class JobToStream(NamedTuple):
    """What a stream needs to know of its job as it begins."""

    id: UUID
    tenant_id: UUID
    model: str
    status: JobStatus
    committed_sequence_number: int

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(job.id, job.tenant_id, job.model, job.status, job.committed_sequence_number)


def terminal_id(job: Job | JobToStream) -> int:
    """The id of the terminal event of a job that has ended."""
    return job.committed_sequence_number + 1


def start_of(job: JobToStream, cursor: int | None, beginning: Beginning) -> Start | None:
    """A cursor takes precedence over `beginning`. None if the client has already seen the terminal event. Raises
    InvalidCursor."""
    if cursor is None:
        after = job.committed_sequence_number if beginning == "now" else 0
        return Start(after, has_snapshot=beginning == "snapshot")
    highest = terminal_id(job) if job.status.is_terminal else job.committed_sequence_number
    if not 0 <= cursor <= highest:
        raise InvalidCursor(
            f"the cursor is {cursor} but the stream is only at {highest}; send 0, or the last id that you received",
            param="starting_after",
        )
    return None if job.status.is_terminal and cursor == terminal_id(job) else Start(cursor)


class JobEventStream:
    """The encoded events of one job for one client. The caller has checked that the job belongs to the client."""

    def __init__(self, services: Services, job: JobToStream, start: Start, *, with_token_ids: bool) -> None:
        self._services = services
        self._id, self._tenant_id, self._model = job.id, job.tenant_id, job.model
        self._job_id = external_id(job.id)
        self._start = start
        self._last = start.after  # the last sequence number sent
        self._with_token_ids = with_token_ids
        self._is_queued = job.status is JobStatus.QUEUED
        self._queue: QueueView | None = None  # the last one sent

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Ends after the terminal event, or without one if the job was deleted meanwhile."""
        yield COMMENT_AND_RETRY
        try:
            if self._start.has_snapshot:
                yield await self._snapshot()
            async with aclosing(self._services.streams.read_batches(self._id, starting_after=self._last)) as batches:
                merged = interleave(
                    batches, self._queue_event, waits=QUEUE_POLL_SECONDS, is_wanted=lambda: self._is_queued
                )
                async with aclosing(merged):  # first: it may be reading from `batches`
                    async for batch in merged:
                        if isinstance(batch, bytes):
                            if batch:
                                yield batch
                        elif len(batch) == 1:  # as of everything live
                            for one in await self._frames_of(batch[0]):
                                yield one
                        else:
                            async for piece in self._pieces_of(batch):
                                yield piece
        except JobUnreadable as exc:
            ended = await end_unreadable(self._services, self._id, self._tenant_id, exc)
            for one in _terminal_frames_of(ended):
                yield one

    async def _pieces_of(self, batch: Sequence[TokenChunk | StatusChange]) -> AsyncIterator[bytes]:
        """Many frames at once, since each write costs more than they do."""
        frames: list[bytes] = []
        num_bytes = 0
        for event in batch:
            for one in await self._frames_of(event):
                frames.append(one)
                num_bytes += len(one)
            if num_bytes >= PIECE_BYTES:
                yield b"".join(frames)
                frames, num_bytes = [], 0
        if frames:
            yield b"".join(frames)

    async def _frames_of(self, event: TokenChunk | StatusChange) -> list[bytes]:
        if isinstance(event, TokenChunk):
            self._last = event.sequence_number
            return [self._chunk_frame(event)]
        self._is_queued = event.status is JobStatus.QUEUED
        if event.status is JobStatus.IN_PROGRESS:
            return [self._status_event("job.started", attempt=event.attempt, sequence_number=self._last)]
        if event.is_paused:
            return [self._status_event("job.paused", sequence_number=self._last)]
        if event.status is JobStatus.QUEUED:
            return [self._status_event("job.retrying", attempt=event.attempt + 1, sequence_number=self._last)]
        return await self._terminal_frames()

    def _chunk_frame(self, chunk: TokenChunk) -> bytes:
        """All readers of a job get the same chunk, and those that want the same of it the same bytes."""
        encode = partial(encode_chunk, chunk, self._job_id, with_token_ids=self._with_token_ids)
        if self._services.streams.num_readers(self._id) == 1:
            return encode()
        return self._services.frames.of(chunk, encode, with_token_ids=self._with_token_ids)

    def _status_event(self, event: str, **data: object) -> bytes:
        return frame(event, {"job_id": self._job_id, **data})

    async def _queue_event(self) -> bytes:
        """A job.queued event with the position in the queue; empty if that has not changed or is not known."""
        try:
            queue = await self._services.monitor.position(self._id, self._model)
        except (SQLAlchemyError, OSError):
            return b""
        if queue is None or queue == self._queue:
            return b""
        self._queue = queue
        return self._status_event("job.queued", **queue)

    async def _snapshot(self) -> bytes:
        """All text so far in one event; the deltas that follow continue from there."""
        chunks = await retry_until_storage_answers(lambda: read_all_chunks(self._services, self._id))
        self._last = chunks[-1].sequence_number if chunks else 0
        return self._status_event("job.snapshot", sequence_number=self._last, choices=choices_of(chunks))

    async def _terminal_frames(self) -> list[bytes]:
        """The terminal event, with the job in its final state; empty if the job was deleted. All readers of a job want
        it in the same moment."""
        services, key = self._services, (self._id, self._tenant_id)
        read = partial(_read_terminal_frames, services, *key)
        return await retry_until_storage_answers(lambda: services.terminal_frames.read(key, read))


async def _read_terminal_frames(services: Services, job_id: UUID, tenant_id: UUID) -> list[bytes]:
    return _terminal_frames_of(await read_ended(services, job_id, tenant_id))


def _terminal_frames_of(ended: tuple[Job, JobView] | None) -> list[bytes]:
    if ended is None:
        return []
    job, view = ended
    return [frame(f"job.{job.status.value}", view, id=terminal_id(job))]


async def read_ended(services: Services, job_id: UUID, tenant_id: UUID) -> tuple[Job, JobView] | None:
    """A job that has ended, as its stream shows it at last; None if it was deleted. One whose output cannot be read
    has the error instead, as a stream that has begun has no other answer left."""
    try:
        record = await services.read(job_queries.get, job_id, tenant_id)
    except JobUnreadable as exc:
        record = await services.read(job_queries.get, job_id, tenant_id, with_result=False)
        return None if record is None else (record.job, _with_error(job_view(record), exc))
    if record is None:
        return None
    return record.job, await services.large_work.run(size_of(record.result), job_view, record)


async def end_unreadable(
    services: Services, job_id: UUID, tenant_id: UUID, exc: JobUnreadable
) -> tuple[Job, JobView] | None:
    """As `read_ended`, for a stream that cannot go on, since the chunks cannot be read. Waits for the job's end: who
    is told nothing terminal comes back, and meets the same again."""
    await services.read_to_end(job_id)
    ended = await retry_until_storage_answers(lambda: read_ended(services, job_id, tenant_id))
    return None if ended is None else (ended[0], _with_error(ended[1], exc))


def _with_error(view: JobView, exc: JobUnreadable) -> JobView:
    return {**view, "error": job_error_view(JobError(code=exc.code, message=exc.message, retryable=exc.retryable))}


def encode_chunk(chunk: TokenChunk, job_id: str, *, with_token_ids: bool) -> bytes:
    name, data = event_of(chunk, job_id, with_token_ids=with_token_ids)
    return frame(name, data, id=chunk.sequence_number)


def event_of(chunk: TokenChunk, job_id: str, *, with_token_ids: bool = False) -> tuple[str, dict[str, object]]:
    """The name and the data of a chunk's event. job.reset voids what was sent before: the job has started over with
    another revision of its model."""
    data: dict[str, object] = {"job_id": job_id, "sequence_number": chunk.sequence_number}
    if chunk.is_reset:
        return "job.reset", data | {"reason": "model_revision"}
    data |= {
        "index": chunk.index,
        "text": chunk.text,
        "num_tokens": len(chunk.token_ids),
        "finish_reason": chunk.finish_reason,
    }
    if with_token_ids:
        data["token_ids"] = chunk.token_ids
    if chunk.logprobs is not None:
        data["logprobs"] = [logprob.model_dump(mode="json") for logprob in chunk.logprobs]
    if chunk.prompt_logprobs is not None:
        data["prompt_logprobs"] = [entry and entry.model_dump(mode="json") for entry in chunk.prompt_logprobs]
    return "output.delta", data


Item = TypeVar("Item")

Answer = TypeVar("Answer")


async def retry_until_storage_answers(ask: Callable[[], Awaitable[Item]]) -> Item:
    """Ask again until the database answers: a stream that has begun cannot answer with a 503 any more."""
    while True:
        with suppress(StorageUnavailable, ServerOverloaded):
            return await ask()
        await asyncio.sleep(STORAGE_RETRY_SECONDS)


async def interleave(
    items: AsyncIterator[Item],
    ask: Callable[[], Awaitable[Answer]],
    *,
    waits: tuple[float, float],
    is_wanted: Callable[[], bool],
) -> AsyncGenerator[Item | Answer, None]:
    """Yields the items as they come and, while `is_wanted()`, the results of `ask()` between them. `waits`: seconds
    before the first call of `ask`, and between an answer and the next call. Items never wait for `ask`."""
    following: asyncio.Task[Item] | None = None
    asking: asyncio.Task[Answer] | None = None
    first, then = waits
    try:
        while True:
            if following is None and not is_wanted():  # as nearly always: a task for each item would cost more
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                yield item
                continue
            following = following or asyncio.ensure_future(next_of(items))
            if is_wanted():
                asking = asking or asyncio.create_task(_later(first, ask))
                await asyncio.wait((following, asking), return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    answer = await asking
                    asking = asyncio.create_task(_later(then, ask))
                    yield answer
                    continue
            try:
                item = await following
            except StopAsyncIteration:
                return
            following = None
            yield item
            if asking is not None and not is_wanted():
                asking.cancel()
                asking = None
    finally:
        left = [task for task in (following, asking) if task is not None and not task.done()]
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)


async def _later(seconds: float, ask: Callable[[], Awaitable[Answer]]) -> Answer:
    await asyncio.sleep(seconds)
    return await ask()


async def next_of(items: AsyncIterator[Item]) -> Item:
    """`anext` as a coroutine, of which a task can be made."""
    return await anext(items)


async def read_all_chunks(services: Services, job_id: UUID) -> list[TokenChunk]:
    """Every committed chunk, in order. Raises StorageUnavailable."""
    chunks: list[TokenChunk] = []
    while True:
        after = chunks[-1].sequence_number if chunks else 0
        page = await services.read(job_queries.read_chunks, job_id, after=after, limit=CHUNKS_PER_READ)
        chunks += page
        if len(page) < CHUNKS_PER_READ:
            return chunks


def choices_of(chunks: Iterable[TokenChunk]) -> list[PartialChoiceView]:
    """The chunks joined to one entry per choice, in order of their index; choices without a chunk are left out."""
    by_index: dict[int, list[TokenChunk]] = {}
    for chunk in chunks:
        if not chunk.is_reset:
            by_index.setdefault(chunk.index, []).append(chunk)
    return [
        {
            "index": index,
            "text": "".join(chunk.text for chunk in own),
            "finish_reason": own[-1].finish_reason,
            "num_tokens": sum(len(chunk.token_ids) for chunk in own),
        }
        for index, own in sorted(by_index.items())
    ]
