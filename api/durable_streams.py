"""/v1/jobs/{job_id}/stream: a job's output by the read side of the Durable Streams protocol.

https://github.com/durable-streams/durable-streams/blob/main/PROTOCOL.md (1.0), sections 5.5 to 5.8, 8, 9.1 and 10. The
stream is closed once the job has ended. As JSON, its messages are the events of `/events` that have an id; as
text/plain, it is the text of one choice. An offset is the number of the last message read, zero-padded to a fixed
width, so that offsets sort as strings. A job that starts over voids what was read: JSON has a job.reset for that, plain
text cannot, so offsets before it are gone (410).
"""

import random
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from api.events import (
    JobToStream,
    end_unreadable,
    event_of,
    read_ended,
    retry_until_storage_answers,
    terminal_id,
)
from api.inputs import OutputQuery, query_parameters, read_query
from api.jobs import find_job, find_job_to_stream
from api.limits import size_of
from api.openapi import EVENTS, TEXT
from api.services import Services, caller_of, stream_router
from api.sse import (
    EventStream,
    json_line,
)
from dialects.native import job_view
from dialects.openai_views import View
from domain.errors import CursorExpired, InvalidCursor, InvalidRequest, JobUnreadable
from domain.jobs import external_id
from domain.requests import TokenChunk
from metrics import stream_resumes_total
from storage import job_queries
from storage.job_queries import CHUNKS_PER_READ, JobRecord

router = stream_router("Jobs")

LONG_POLL_SECONDS = 15.0

OFFSET_DIGITS = 16

CURSOR_EPOCH = 1_728_432_000  # 2024-10-09T00:00:00Z, by which everybody counts the intervals of the cursor

CURSOR_SECONDS = 20

MAX_JITTER = 180  # intervals: an hour

_OFFSET = re.compile(rf"[0-9]{{{OFFSET_DIGITS}}}")

HEADERS = {
    "vary": "accept",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",  # for tags of other pages; what CORS allows, it does not restrict
}


class DurableStreamQuery(OutputQuery):
    """Of /v1/jobs/{job_id}/stream. `index` is for text/plain."""

    offset: str | None = Field(default=None, description="-1: the start; now: the end; or a Stream-Next-Offset.")
    live: Literal["long-poll", "sse"] | None = Field(default=None, description="How to wait for more; needs offset.")
    cursor: str | None = Field(default=None, pattern=r"^[0-9]{1,15}$", description="The last Stream-Cursor.")
    token: str | None = Field(default=None, description="A stream token, in place of a key.")


class DurableMessageView(View):
    event: str
    data: dict[str, Any]


class JsonMessages:
    """The stream as JSON: every event is a message."""

    media_type = "application/json"
    name = "json"

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id

    def of(self, chunk: TokenChunk, *, is_first: bool) -> bytes:
        name, data = event_of(chunk, self._job_id)
        return json_line({"event": name, "data": data})

    def of_end(self, view: Mapping[str, Any]) -> bytes:
        return json_line({"event": f"job.{view['status']}", "data": view})

    def joined(self, messages: Sequence[bytes]) -> bytes:
        return b"[" + b",".join(messages) + b"]"

    def data_lines(self, message: bytes) -> bytes:
        return b"data: [" + message + b"]\n"


class PlainText:
    """The stream as the text of one choice."""

    media_type = "text/plain; charset=utf-8"

    def __init__(self, index: int) -> None:
        self.name = f"text{index}"
        self._index = index

    def of(self, chunk: TokenChunk, *, is_first: bool) -> bytes:
        """Raises CursorExpired: the client has read what is void now."""
        if chunk.is_reset and not is_first:
            raise CursorExpired(
                "the job has started over, and the text before this offset is void; read again from offset=-1",
                param="offset",
            )
        return b"" if chunk.is_reset or chunk.index != self._index else chunk.text.encode()

    def of_end(self, view: Mapping[str, Any]) -> bytes:
        return b""

    def joined(self, messages: Sequence[bytes]) -> bytes:
        return b"".join(messages)

    def data_lines(self, message: bytes) -> bytes:
        """Empty if there is no text. Decoders strip one space, so a line that begins with one gets another."""
        lines = re.split(rb"\r\n|\r|\n", message) if message else []
        return b"".join(b"data:" + (b" " if line.startswith(b" ") else b"") + line + b"\n" for line in lines)


Content = JsonMessages | PlainText


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a stream, from one offset to the next."""

    messages: Sequence[bytes]
    end: int
    is_up_to_date: bool
    is_closed: bool  # and all has been read


class DurableRead(NamedTuple):
    """A request that has been checked."""

    services: Services
    query: DurableStreamQuery
    job: JobToStream
    content: Content
    start: int


@router.get(
    "/v1/jobs/{job_id}/stream",
    response_class=Response,
    responses={
        200: {"model": list[DurableMessageView], "content": {**TEXT["content"], **EVENTS["content"]}},
        204: {"description": "Nothing came within the time of a long poll, or the stream is closed."},
        304: {"description": "Nothing new since the answer with this ETag."},
    },
    openapi_extra={"parameters": query_parameters(DurableStreamQuery)},
)
async def read_durable_stream(job_id: str, request: Request) -> Response:
    """The job's output by the Durable Streams protocol: what is there after `offset`, and with `live`, what comes."""
    asked = await _asked(job_id, request)
    if asked.query.live is not None and asked.query.offset is None:
        raise InvalidRequest(
            f"live is {asked.query.live!r} but there is no offset; send -1, now or a Stream-Next-Offset", param="offset"
        )
    if asked.query.live == "sse":
        return _live(asked)
    if asked.query.live == "long-poll" and asked.start == tail_of(asked.job) and not asked.job.status.is_terminal:
        await asked.services.wait_for_news(asked.job.id, LONG_POLL_SECONDS, after=asked.start)
        asked = (await _asked(job_id, request))._replace(start=asked.start)
    page = await _page(asked)
    headers = HEADERS | {"x-job-id": external_id(asked.job.id), "stream-next-offset": offset_of(page.end)}
    if page.is_up_to_date:
        headers["stream-up-to-date"] = "true"
    if page.is_closed:
        headers["stream-closed"] = "true"
    if asked.query.live is not None:
        headers["stream-cursor"] = next_cursor(asked.query.cursor)
    if asked.query.live is not None and page.end == asked.start:
        return Response(status_code=204, headers=headers | {"cache-control": "no-store"})
    body = asked.content.joined(page.messages)
    if asked.query.offset == "now":
        return Response(body, 200, headers | {"cache-control": "no-store"}, asked.content.media_type)
    closed = ":c" if page.is_closed else ""
    etag = f'"{external_id(asked.job.id)}:{asked.content.name}:{asked.start}:{page.end}{closed}"'
    headers |= {
        "etag": etag,
        "cache-control": "private, no-cache",
    }  # one may keep it, and has to ask whether it is valid
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, asked.content.media_type)


@router.head("/v1/jobs/{job_id}/stream", include_in_schema=False)
async def describe_durable_stream(job_id: str, request: Request) -> Response:
    """The end of the stream, and whether it is closed."""
    asked = await _asked(job_id, request)
    headers = HEADERS | {"x-job-id": external_id(asked.job.id), "stream-next-offset": offset_of(tail_of(asked.job))}
    if asked.job.status.is_terminal:
        headers["stream-closed"] = "true"
    answer = Response(None, 200, headers | {"cache-control": "no-store"}, asked.content.media_type)
    del answer.headers["content-length"]  # it would have to be that of the GET
    return answer


async def _asked(job_id: str, request: Request) -> DurableRead:
    services, tenant_id = caller_of(request)
    query = read_query(request, DurableStreamQuery)
    job = await find_job_to_stream(services, job_id, tenant_id)
    start = start_of_read(query.offset, tail_of(job))
    is_text = _prefers_text(request.headers.get("accept", ""))
    content = PlainText(query.index) if is_text else JsonMessages(external_id(job.id))
    return DurableRead(services, query, job, content, start)


def _prefers_text(accept: str) -> bool:
    """Whether the Accept header names plain text before anything that JSON would do for."""
    kinds = [kind.partition(";")[0].strip().lower() for kind in accept.split(",")]
    wanted = [kind for kind in kinds if kind in ("text/plain", "application/json", "application/*", "*/*")]
    return wanted[:1] == ["text/plain"]


def tail_of(job: JobToStream) -> int:
    """The number of the last message of the stream."""
    return terminal_id(job) if job.status.is_terminal else job.committed_sequence_number


def offset_of(number: int) -> str:
    return f"{number:0{OFFSET_DIGITS}}"


def start_of_read(offset: str | None, tail: int) -> int:
    """The number of the last message that the client has. Raises InvalidCursor."""
    if offset in (None, "-1"):
        return 0
    if offset == "now":
        return tail
    if _OFFSET.fullmatch(offset or "") is None or not (offset or "").isascii():
        raise InvalidCursor(
            f"offset is {(offset or '')[:40]!r}; send -1, now or a Stream-Next-Offset as you received it",
            param="offset",
        )
    if int(offset or "") > tail:
        raise InvalidCursor(
            f"offset is {offset} but the stream is only at {offset_of(tail)}; send a Stream-Next-Offset of this job",
            param="offset",
        )
    return int(offset or "")


def next_cursor(given: str | None) -> str:
    """The number of the current interval, or one above that of the client: a cache must not see the same twice."""
    current = int(time.time() - CURSOR_EPOCH) // CURSOR_SECONDS
    last = -1 if given is None else int(given)
    return str(current if last < current else last + random.randint(1, MAX_JITTER))


def _matches(if_none_match: str, etag: str) -> bool:
    return etag in (one.strip().removeprefix("W/") for one in if_none_match.split(",")) or if_none_match.strip() == "*"


async def _page(asked: DurableRead) -> Page:
    """What comes after the start, as far as one answer may go."""
    job, start = asked.job, asked.start
    if asked.query.offset == "now" and asked.query.live is None:
        return Page((), start, is_up_to_date=True, is_closed=job.status.is_terminal)
    if start == tail_of(job):
        return Page((), start, is_up_to_date=True, is_closed=job.status.is_terminal)
    chunks = await asked.services.read(job_queries.read_chunks, job.id, after=start, limit=CHUNKS_PER_READ)
    messages = [asked.content.of(chunk, is_first=start == 0 and not number) for number, chunk in enumerate(chunks)]
    end = chunks[-1].sequence_number if chunks else start
    if end < job.committed_sequence_number or not job.status.is_terminal:
        return Page(messages, end, is_up_to_date=end >= job.committed_sequence_number, is_closed=False)
    record = await find_job(asked.services, external_id(job.id), job.tenant_id)
    messages.append(await _end_message(asked, record))
    return Page(messages, terminal_id(record.job), is_up_to_date=True, is_closed=True)


async def _end_message(asked: DurableRead, record: JobRecord) -> bytes:
    view = await asked.services.large_work.run(size_of(record.result), job_view, record)
    return asked.content.of_end(view)


def _live(asked: DurableRead) -> Response:
    services, settings = asked.services, asked.services.settings
    services.slots.refuse_if_full()
    if asked.start > 0 and asked.query.offset != "now":
        stream_resumes_total.inc()
    return EventStream(
        _frames(asked),
        heartbeat_seconds=settings.stream_heartbeat_seconds,
        lifetime_seconds=settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining,
        headers=HEADERS | {"content-type": "text/event-stream", "x-job-id": external_id(asked.job.id)},
    )


async def _frames(asked: DurableRead) -> AsyncGenerator[bytes, None]:
    """A data event for each message and a control event after it; a control event first if there is nothing yet. Ends
    without the closing one if the job is deleted, or if what was sent is void."""
    job, start, tail = asked.job, asked.start, tail_of(asked.job)
    if start == tail:
        yield _control(asked, start, is_up_to_date=True, is_closed=job.status.is_terminal)
    if start == tail and job.status.is_terminal:
        return
    last = start
    try:
        async with aclosing(asked.services.streams.read(job.id, starting_after=start)) as events:
            async for event in events:
                if isinstance(event, TokenChunk):
                    message = asked.content.of(event, is_first=last == 0)
                    last = event.sequence_number
                    yield _data(asked, message) + _control(asked, last, is_up_to_date=last >= tail, is_closed=False)
        ended = await retry_until_storage_answers(lambda: read_ended(asked.services, job.id, job.tenant_id))
    except CursorExpired:
        return  # a client that comes back is told
    except JobUnreadable as exc:
        ended = await end_unreadable(asked.services, job.id, job.tenant_id, exc)
    if ended is not None:
        closing = _control(asked, terminal_id(ended[0]), is_up_to_date=True, is_closed=True)
        yield _data(asked, asked.content.of_end(ended[1])) + closing


def _data(asked: DurableRead, message: bytes) -> bytes:
    lines = asked.content.data_lines(message)
    return b"event: data\n" + lines + b"\n" if lines else b""


def _control(asked: DurableRead, end: int, *, is_up_to_date: bool, is_closed: bool) -> bytes:
    control: dict[str, object] = {"streamNextOffset": offset_of(end), "streamCursor": next_cursor(asked.query.cursor)}
    if is_up_to_date:
        control["upToDate"] = True
    if is_closed:
        control["streamClosed"] = True
    return b"event: control\ndata: " + orjson.dumps(control) + b"\n\n"
