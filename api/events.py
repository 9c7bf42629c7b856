"""Server-sent events: encoding, the streaming response with heartbeats and limits, and the event stream of a job.

The stream of a job has every committed chunk once and in order, then live chunks, then exactly one terminal event.
`id:` is the chunk's sequence number; the terminal event's is one higher than the last chunk's. If the job starts over,
a `job.reset`, which is numbered like a chunk, voids the text before it. Status events (job.queued, job.started,
job.paused, job.retrying, job.snapshot) have no `id:`, so they do not move a client's cursor; a client that resumes gets
the current ones.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar
from uuid import UUID

import orjson
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.limits import StreamPlaces
from api.services import Services
from dialects.native import PartialChoiceView, QueueView, job_view
from domain.errors import InvalidCursor, StorageUnavailable
from domain.jobs import JobStatus, external_id
from domain.requests import TokenChunk
from metrics import stream_ends_total
from storage import job_queries
from storage.job_queries import CHUNKS_PER_READ, JobRecord
from storage.streams import STORAGE_RETRY_SECONDS, StatusChange
from storage.tables import Job

#: The reasons for the end of a stream whose reader will not fetch the rest of it.
ABANDONED = frozenset({"disconnected", "slow", "unserved"})

SEND_TIMEOUT_SECONDS = 20.0  # a client that reads nothing for this long is disconnected; it can resume

# No blank line after it: decoders that keep the last id would dispatch an empty event at the blank line.
HEARTBEAT = b": hb\n"

# JSON and server-sent events do not count these as line breaks, but str.splitlines, which many clients use, does.
_LINE_BREAKS = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}

HEADERS = {
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # keeps nginx from buffering the stream
    "content-type": "text/event-stream; charset=utf-8",
}


def frame(event: str, data: Mapping[str, object], *, id: int | None = None) -> bytes:
    """Encode one event. `data` becomes JSON on one line, so no text in it can end the event or inject a field."""
    head = f"event: {event}\n" if id is None else f"id: {id}\nevent: {event}\n"
    return head.encode() + data_frame(data)


def data_frame(data: Mapping[str, object]) -> bytes:
    """Encode an event that has neither name nor id."""
    return b"data: " + json_line(data) + b"\n\n"


def json_line(data: object) -> bytes:
    """JSON on one line, also for those who take more characters for line breaks than JSON does."""
    body = orjson.dumps(data)
    for character, escape in _LINE_BREAKS.items():
        if character in body:
            body = body.replace(character, escape)
    return body


class EventStream(Response):
    """Sends the frames of a generator as they come, with heartbeats between them, and always closes the generator."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        heartbeat_seconds: float,
        lifetime_seconds: float,
        slots: StreamPlaces,
        draining: asyncio.Event,
        headers: Mapping[str, str] | None = None,
        early_end_frame: bytes = b"",
        heartbeat: bytes = HEARTBEAT,
        on_end: Callable[[str], None] = lambda reason: None,
        unserved: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        """The stream ends without its terminal event when `draining` is set, when its lifetime is over, or when the
        reader's key is revoked; the reader may then resume it. `early_end_frame` is sent first, for readers that cannot
        resume. `unserved` returns once no worker serves the job's model; its bytes are then sent last. `on_end` is
        called with the reason: complete, disconnected, slow, draining, lifetime, revoked or unserved."""
        # Not super().__init__(), which would set a Content-Length of 0.
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **(headers or {})})
        self._frames = frames
        self._heartbeat_seconds = heartbeat_seconds
        self._lifetime_seconds = lifetime_seconds
        self._slots = slots
        self._draining = draining
        self._early_end_frame = early_end_frame
        self._heartbeat = heartbeat
        self._on_end = on_end
        self._unserved = unserved or _never

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(wait_for_disconnect(receive))
        drained = asyncio.create_task(self._draining.wait())
        revoked = asyncio.create_task(wait_for_revocation(scope))
        unserved = asyncio.ensure_future(self._unserved())
        reasons: dict[asyncio.Future[Any], str] = {
            gone: "disconnected",
            drained: "draining",
            revoked: "revoked",
            unserved: "unserved",
        }
        try:
            with self._slots.hold():
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                reason = await self._send_frames(send, reasons)
            stream_ends_total.labels(reason).inc()
            if reason not in ("disconnected", "slow"):
                body = (
                    b""
                    if reason == "complete"
                    else unserved.result()
                    if reason == "unserved"
                    else self._early_end_frame
                )
                try:
                    async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                        await send({"type": "http.response.body", "body": body, "more_body": False})
                except TimeoutError:
                    reason = "slow"
            self._on_end(reason)
        finally:
            for end in reasons:
                end.cancel()
            await self._frames.aclose()

    async def _send_frames(self, send: Send, reason_by_end: Mapping["asyncio.Future[Any]", str]) -> str:
        """Returns why the stream ended: the reason of the first future in `reason_by_end` that is done, or else
        complete, lifetime or slow."""
        ends_at = time.monotonic() + self._lifetime_seconds
        sender = _Sender(send)
        # One task sends all frames: to wait for each of them beside all possible ends cost more than anything else.
        sending = asyncio.create_task(sender.send_all(self._frames))
        try:
            while True:
                patience = sender.seconds_until_silent(self._heartbeat_seconds)
                timeout = max(
                    0.0, min(patience, self._heartbeat_seconds, SEND_TIMEOUT_SECONDS, ends_at - time.monotonic())
                )
                done, _ = await asyncio.wait(
                    (sending, *reason_by_end), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                )
                for end, reason in reason_by_end.items():
                    if end in done:
                        return reason
                if sending in done:
                    sending.result()
                    return "complete"
                if time.monotonic() >= ends_at:
                    return "lifetime"
                if sender.is_stuck:
                    return "slow"
                if sender.seconds_until_silent(self._heartbeat_seconds) <= 0:
                    async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                        await sender.send(self._heartbeat)
        except TimeoutError:
            return "slow"
        finally:
            sending.cancel()  # even if it has just finished: its exception must be retrieved
            await asyncio.gather(sending, return_exceptions=True)


class _Sender:
    """Sends frames, and knows since when the client has heard nothing or read nothing."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sent_at = time.monotonic()
        self._is_sending = False
        self._turn = asyncio.Lock()

    async def send_all(self, frames: AsyncIterator[bytes]) -> None:
        async for body in frames:
            await self.send(body)

    async def send(self, body: bytes) -> None:
        """One after another: a heartbeat may be waiting for the client when the next frame comes."""
        async with self._turn:
            self._is_sending, self._sent_at = True, time.monotonic()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            self._is_sending = False

    @property
    def is_stuck(self) -> bool:
        """Whether the client has not read what was sent to it for SEND_TIMEOUT_SECONDS."""
        return self._is_sending and time.monotonic() >= self._sent_at + SEND_TIMEOUT_SECONDS

    def seconds_until_silent(self, silence_seconds: float) -> float:
        """Until nothing has been sent for so long; never, while something is being sent."""
        return math.inf if self._is_sending else self._sent_at + silence_seconds - time.monotonic()


async def _never() -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")


async def wait_for_revocation(scope: Scope) -> None:
    """Returns once the key of the request is revoked. `scope` is that of a private route, which sets
    `until_revoked`."""
    await scope["state"]["until_revoked"]()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


#: How long to wait before the first query for a job's queue position, and between two later ones. A job that starts
#: sooner than that has no job.queued event and costs no query.
QUEUE_POLL_SECONDS = (0.1, 1.0)

COMMENT_AND_RETRY = b"retry: 1000\n: celeriac\n"  # sets the reconnection delay; without data, no event is dispatched

Beginning = Literal["start", "snapshot", "now"]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a stream begins: after the chunk with the sequence number `after`, or with a snapshot of the text so
    far."""

    after: int
    has_snapshot: bool = False


def terminal_id(job: Job) -> int:
    """The id of the terminal event of a job that has ended."""
    return job.committed_sequence_number + 1


def start_of(job: Job, cursor: int | None, beginning: Beginning) -> Start | None:
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

    def __init__(self, services: Services, record: JobRecord, start: Start, *, with_token_ids: bool) -> None:
        self._services = services
        self._job = record.job
        self._job_id = external_id(record.job.id)
        self._start = start
        self._last = start.after  # the last sequence number sent
        self._with_token_ids = with_token_ids
        self._is_queued = record.job.status is JobStatus.QUEUED
        self._queue: QueueView | None = None  # the last one sent

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Ends after the terminal event, or without one if the job was deleted meanwhile."""
        yield COMMENT_AND_RETRY
        if self._start.has_snapshot:
            yield await self._snapshot()
        async with aclosing(self._services.streams.read(self._job.id, starting_after=self._last)) as events:
            merged = interleave(events, self._queue_event, waits=QUEUE_POLL_SECONDS, is_wanted=lambda: self._is_queued)
            async with aclosing(merged):  # first: it may be reading from `events`
                async for event in merged:
                    for one in await self._frames_of(event):
                        yield one

    async def _frames_of(self, event: TokenChunk | StatusChange | bytes) -> list[bytes]:
        if isinstance(event, bytes):
            return [event] if event else []
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
        if self._services.streams.num_readers(self._job.id) == 1:
            return encode()
        return self._services.frames.of(chunk, encode, with_token_ids=self._with_token_ids)

    def _status_event(self, event: str, **data: object) -> bytes:
        return frame(event, {"job_id": self._job_id, **data})

    async def _queue_event(self) -> bytes:
        """A job.queued event with the position in the queue; empty if that has not changed or is not known."""
        try:
            queue = await self._services.monitor.position(self._job.id, self._job.model)
        except (SQLAlchemyError, OSError):
            return b""
        if queue is None or queue == self._queue:
            return b""
        self._queue = queue
        return self._status_event("job.queued", **queue)

    async def _snapshot(self) -> bytes:
        """All text so far in one event; the deltas that follow continue from there."""
        chunks = await retry_until_storage_answers(lambda: read_all_chunks(self._services, self._job.id))
        self._last = chunks[-1].sequence_number if chunks else 0
        return self._status_event("job.snapshot", sequence_number=self._last, choices=choices_of(chunks))

    async def _terminal_frames(self) -> list[bytes]:
        """The terminal event, with the job in its final state; empty if the job was deleted."""
        record = await retry_until_storage_answers(
            lambda: self._services.read(job_queries.get, self._job.id, self._job.tenant_id)
        )
        if record is None:
            return []
        return [frame(f"job.{record.job.status.value}", job_view(record), id=terminal_id(record.job))]


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
        with suppress(StorageUnavailable):
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
