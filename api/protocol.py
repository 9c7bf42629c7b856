"""What uvicorn leaves open around a request: bounds on its head, its unread rest, and clients of HTTP/1.0.

One client could fill our memory with a header that never ends. And one that is answered while it still sends would read
a reset of its connection instead of the answer, if that were closed at once (RFC 9112, 9.6): what it sends is read and
dropped first, within bounds.
"""

import asyncio
from typing import Any, cast

import orjson
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import error_body

MAX_HEAD_BYTES = 32_768
HEAD_SECONDS = 30.0
DROPPED_BYTES = 64 * 2**20  # of a request that was answered before it was read
DROPPING_SECONDS = 30.0
CUT = "celeriac.cut"  # an ASGI extension: its "close" ends the connection in mid-answer, which the client can see


class Answering:
    """How one request's answer reaches the wire: stands between uvicorn's cycle, its transport and its `send`."""

    def __init__(self, protocol: "BoundedHttp", cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._send = cycle.send
        self._is_old = cycle.scope["http_version"] == "1.0"
        self._ends_by_close = False
        if self._is_old:
            cycle.waiting_for_100_continue = False  # RFC 9110, 10.1.1: it cannot have meant it

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            # A body that waits for a 100 that does not come may never be sent, so no request can be told behind it.
            self._cycle.keep_alive &= not self._cycle.waiting_for_100_continue
            if self._is_old and not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                self._ends_by_close = True
                self._cycle.chunked_encoding = False  # RFC 9112, 6.1: it does not know that coding
        elif self._ends_by_close:
            self._cycle.expected_content_length = len(cast(dict[str, Any], message).get("body", b""))
        await self._send(message)

    def write(self, data: bytes) -> None:
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.transport.is_closing()

    def close(self) -> None:
        if self._cycle.response_complete and self._cycle.more_body:
            self._protocol.close_once_read()
        else:
            self._protocol.transport.close()


class BoundedHttp(HttpToolsProtocol):
    """One connection. A head that is too long or too slow ends it; all refusals are in the one error shape."""

    _head_timer: asyncio.TimerHandle | None = None
    _drop_timer: asyncio.TimerHandle | None = None
    _num_dropped_bytes = 0
    _is_last_request = False
    _is_refused = False
    _num_head_bytes = 0
    _is_head_complete = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_dropping()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._drop_timer is not None:
            self._num_dropped_bytes += len(data)
            if self._num_dropped_bytes > DROPPED_BYTES:
                self._close()
        if self._is_refused or self.transport.is_closing():
            return
        self._num_head_bytes += len(data)
        super().data_received(data)
        if not self._is_refused and not self._is_head_complete and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request line and headers go beyond {MAX_HEAD_BYTES} bytes; send fewer")

    def on_message_begin(self) -> None:
        self._start_head()
        if self.cycle is not None:
            self._num_head_bytes = 0  # what was read with it may be the end of the request before
        super().on_message_begin()
        self.scope["extensions"] = {CUT: {"close": self._close}}

    def on_headers_complete(self) -> None:
        self._is_head_complete = True
        self._stop_head_timer()
        super().on_headers_complete()
        answering = Answering(self, self.cycle)
        self.cycle.transport = cast(asyncio.Transport, answering)
        self.cycle.send = answering.send  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._drop_timer is not None:
            self._stop_dropping()
            if self._is_last_request:
                self._close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._drop_rest()

    def close_once_read(self) -> None:
        """The answer is out, and the last one; whoever waits for its end sees it."""
        self._is_last_request = True
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "these bytes are no HTTP request")

    def _start_head(self) -> None:
        self._stop_head_timer()
        self._is_head_complete = False
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _drop_rest(self) -> None:
        self._num_dropped_bytes = 0
        self._drop_timer = self.loop.call_later(DROPPING_SECONDS, self._close)

    def _stop_dropping(self) -> None:
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer by hand, as nothing behind us has a request to answer."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(error_body("invalid_value", message))
        reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}[status]
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self._is_refused = True
        self._stop_head_timer()
        self.close_once_read()
        self._drop_rest()
