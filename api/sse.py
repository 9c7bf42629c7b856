"""Server-sent events: their encoding, and the response that sends them with heartbeats and limits."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.limits import StreamPlaces
from api.signals import Signal
from metrics import stream_ends_total

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
        draining: Signal,
        headers: Mapping[str, str] | None = None,
        early_end_frame: bytes = b"",
        revoked_frame: bytes = b"",
        heartbeat: bytes = HEARTBEAT,
        on_end: Callable[[str], None] = lambda reason: None,
        unserved: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        """The stream ends without its terminal event when `draining` is set, when its lifetime is over, or when the
        reader's key is revoked; the reader may then resume it. `early_end_frame` is sent first, for readers that cannot
        resume; if the key was revoked, `revoked_frame`, if there is one. `unserved` returns once no worker serves the
        job's model; its bytes are then sent last. `on_end` is called with the reason: complete, disconnected, slow,
        draining, lifetime, revoked or unserved."""
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
        self._revoked_frame = revoked_frame or early_end_frame
        self._heartbeat = heartbeat
        self._on_end = on_end
        self._unserved = unserved

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ends = _Ends(receive, self._unserved)
        revocation = revocation_of(scope)
        self._draining.call(ends.drain)
        revocation.call(ends.revoke)
        try:
            with self._slots.hold():
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                reason = await self._send_frames(send, ends)
            stream_ends_total.labels(reason).inc()
            if reason not in ("disconnected", "slow"):
                try:
                    async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                        body = self._last_frame(reason, ends)
                        await send({"type": "http.response.body", "body": body, "more_body": False})
                except TimeoutError:
                    reason = "slow"
            self._on_end(reason)
        finally:
            self._draining.forget(ends.drain)
            revocation.forget(ends.revoke)
            ends.cancel()
            await self._frames.aclose()

    def _last_frame(self, reason: str, ends: "_Ends") -> bytes:
        if reason == "complete":
            return b""
        if reason == "revoked":
            return self._revoked_frame
        return ends.unserved_frame if reason == "unserved" else self._early_end_frame

    async def _send_frames(self, send: Send, ends: "_Ends") -> str:
        """Returns why the stream ended: what `ends` says, or else complete, lifetime or slow."""
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
                    (sending, *ends.futures), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
                )
                if (reason := ends.reason) is not None:
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


class _Ends:
    """What may end a stream early."""

    def __init__(self, receive: Receive, unserved: Callable[[], Awaitable[bytes]] | None) -> None:
        self._gone = asyncio.create_task(wait_for_disconnect(receive))
        self._told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._unserved = None if unserved is None else asyncio.ensure_future(unserved())
        told: tuple[asyncio.Future[Any], ...] = (self._gone, self._told)
        self.futures = told if self._unserved is None else (*told, self._unserved)

    def drain(self) -> None:
        self._tell("draining")

    def revoke(self) -> None:
        self._tell("revoked")

    def _tell(self, reason: str) -> None:
        if not self._told.done():
            self._told.set_result(reason)

    @property
    def reason(self) -> str | None:
        if self._gone.done():
            return "disconnected"
        if self._told.done():
            return self._told.result()
        return "unserved" if self._unserved is not None and self._unserved.done() else None

    @property
    def unserved_frame(self) -> bytes:
        assert self._unserved is not None
        return self._unserved.result()

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


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


async def wait_for_revocation(scope: Scope) -> None:
    """Returns once the key of the request is revoked. `scope` is that of a private route."""
    revoked, signal = asyncio.Event(), revocation_of(scope)
    signal.call(revoked.set)
    try:
        await revoked.wait()
    finally:
        signal.forget(revoked.set)


def revocation_of(scope: Scope) -> Signal:
    """Is set once the key of the request is revoked. Private routes set what is called here."""
    signal: Signal = scope["state"]["revocation"]()
    return signal


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
