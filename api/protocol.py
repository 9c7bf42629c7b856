"""Bounds on what comes before there is a request: the head's size, the time it takes, and bytes that are no HTTP.

uvicorn bounds none of these with httptools: one client could fill our memory with a header that never ends.
"""

import asyncio

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.errors import error_body

MAX_HEAD_BYTES = 32_768
HEAD_SECONDS = 30.0
CUT = "celeriac.cut"  # an ASGI extension: its "close" ends the connection in mid-answer, which the client can see


class BoundedHttp(HttpToolsProtocol):
    """One connection. A head that is too long or too slow ends it; all refusals are in the one error shape."""

    _head_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _is_head_complete = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if not self._is_head_complete and self._num_head_bytes > MAX_HEAD_BYTES:
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
        self.transport.close()
