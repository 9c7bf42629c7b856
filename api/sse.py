"""Server-sent events: the frames, and a response that keeps a stream alive, bounded, and ended on purpose."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from domain.errors import ServerOverloaded
from observability import stream_connections, stream_ends_total

SEND_TIMEOUT_SECONDS = 20.0  # a client that reads nothing for so long is cut; it resumes with its cursor

# Without a blank line after it: decoders that remember an id take the blank line for an empty event.
HEARTBEAT = b": hb\n"

# No line breaks to JSON or to server-sent events, but to the str.splitlines of many a client.
_LINE_BREAKS = {b"\xc2\x85": b"\\u0085", b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029"}

HEADERS = {
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # or nginx keeps the stream to itself
    "content-type": "text/event-stream; charset=utf-8",
}


def frame(event: str, data: Mapping[str, object], *, id: int | None = None) -> bytes:
    """One event. `data` is JSON on one line, so no text in it can end the frame or forge a field."""
    head = f"event: {event}\n" if id is None else f"id: {id}\nevent: {event}\n"
    return head.encode() + data_frame(data)


def data_frame(data: Mapping[str, object]) -> bytes:
    """An event without name and id, as `frame`."""
    body = orjson.dumps(data)
    for character, escape in _LINE_BREAKS.items():
        if character in body:
            body = body.replace(character, escape)
    return b"data: " + body + b"\n\n"


class StreamSlots:
    """How many streams and long polls one process holds open at once."""

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_open = 0

    @property
    def is_full(self) -> bool:
        return self.num_open >= self.max_open

    def refuse_if_full(self) -> None:
        if self.is_full:
            raise ServerOverloaded(f"{self.max_open} streams are open here already; retry, or poll the job instead")

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.num_open += 1
        stream_connections.set(self.num_open)
        try:
            yield
        finally:
            self.num_open -= 1
            stream_connections.set(self.num_open)


class EventStream(Response):
    """Sends the frames of `frames` as they come, and closes them however the stream ends."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        heartbeat_seconds: float,
        lifetime_seconds: float,
        slots: StreamSlots,
        draining: asyncio.Event,
        headers: Mapping[str, str] | None = None,
        early_end_frame: bytes = b"",
        on_end: Callable[[str], None] = lambda reason: None,
        unserved: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        """When `draining` is set, the lifetime is over or the reader's key is revoked, the stream ends without its
        terminal event: resume it. Readers that cannot resume get `early_end_frame`. `on_end` hears why the stream
        ended: complete, disconnected, slow, draining, lifetime, revoked or unserved. Once `unserved` returns, nobody
        works on what is awaited, and its bytes are the last ones."""
        # Not super().__init__(), which would announce the length of an empty body.
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **(headers or {})})
        self._frames = frames
        self._heartbeat_seconds = heartbeat_seconds
        self._lifetime_seconds = lifetime_seconds
        self._slots = slots
        self._draining = draining
        self._early_end_frame = early_end_frame
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
                await send({"type": "http.response.body", "body": body, "more_body": False})
            self._on_end(reason)
        finally:
            for end in reasons:
                end.cancel()
            await self._frames.aclose()

    async def _send_frames(self, send: Send, reason_by_end: Mapping["asyncio.Future[Any]", str]) -> str:
        """Returns why the stream ended: the reason of a task that is done, the first that stands in the mapping, or
        one of its own."""
        ends_at = time.monotonic() + self._lifetime_seconds
        following: asyncio.Task[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self._frames))
                timeout = min(self._heartbeat_seconds, ends_at - time.monotonic())
                done, _ = await asyncio.wait(
                    (following, *reason_by_end), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                )
                for end, reason in reason_by_end.items():
                    if end in done:
                        return reason
                if time.monotonic() >= ends_at:
                    return "lifetime"
                body = HEARTBEAT
                if following in done:
                    body, following = following.result(), None
                async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except StopAsyncIteration:
            return "complete"
        except TimeoutError:
            return "slow"
        finally:
            if following is not None:  # also one that has just ended: its last word must be heard
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


async def _never() -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")


async def wait_for_revocation(scope: Scope) -> None:
    """Of the key that came with a request of a private route, which put the question into the request's state."""
    await scope["state"]["until_revoked"]()


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
