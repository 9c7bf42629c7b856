"""Connections as the API and the maintenance process serve them: sockets, and HTTP/1 with limits on request heads.

Adds what uvicorn lacks: limits on the request head, draining of unread bodies, and support for HTTP/1.0. Without a
limit, an endless header could fill our memory. If a client is answered while it is still sending, and the connection
is closed at once, it sees a reset instead of the answer (RFC 9112, 9.6); so the rest is read and discarded first,
within limits.
"""

import asyncio
import socket
from typing import Any, cast

import orjson
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import error_body
from api.middleware import ARRIVED, CUT
from api.starts import GONE

MAX_HEAD_BYTES = 32_768

HEAD_SECONDS = 30.0  # how long a request head may take to arrive

MAX_DISCARDED_BYTES = 64 * 2**20  # of a body whose request was answered before it was read

DISCARD_SECONDS = 30.0  # how long the rest of such a body may take to arrive

NUM_ACCEPTORS = 16

UNREAD_SECONDS = 30  # the kernel drops a peer that acknowledges nothing for this long

BACKLOG = 2_048  # connections that wait to be accepted; the kernel's net.core.somaxconn may allow fewer

SOCKET_PATH = b"/v1/responses"  # after the path of a proxy, if there is one


class Answering:
    """Sits between uvicorn's request cycle and the transport, and corrects how one answer is sent. A head waits for
    what follows at once, since two writes cost twice as much as one."""

    def __init__(self, protocol: "BoundedHttp", cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._send = cycle.send
        self._is_old = cycle.scope["http_version"] == "1.0"
        self._ends_by_close = False
        self._is_head_next = False  # the next write is the head of the answer
        self._head = b""  # that waits
        if self._is_old:
            cycle.waiting_for_100_continue = False  # RFC 9110, 10.1.1: ignored in an HTTP/1.0 request

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            self._is_head_next = True
            # A client that never got its 100 Continue may not send the body, so the next bytes could be either.
            self._cycle.keep_alive &= not self._cycle.waiting_for_100_continue
            if self._is_old and not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                self._ends_by_close = True
                self._cycle.chunked_encoding = False  # RFC 9112, 6.1: HTTP/1.0 does not have it
        elif self._ends_by_close:
            self._cycle.expected_content_length = len(cast(dict[str, Any], message).get("body", b""))
        await self._send(message)
        if self._cycle.response_complete:
            # Nobody will read what has arrived of the body: a quarter of a megabyte of each refused upload. It would
            # stay until the cycle is collected as garbage, and that is rare.
            self._cycle.body = bytearray()

    def write(self, data: bytes) -> None:
        if self._is_head_next:
            self._is_head_next, self._head = False, data
            self._protocol.loop.call_soon(self._write_head)
            return
        self._write_head(data)

    def _write_head(self, data: bytes = b"") -> None:
        """With what follows it."""
        pieces, self._head = [piece for piece in (self._head, data) if piece], b""
        # A client may have sent requests in advance, and left.
        if pieces and not self._protocol.transport.is_closing():
            self._protocol.transport.writelines(pieces)

    def is_closing(self) -> bool:
        return self._protocol.transport.is_closing()

    def close(self) -> None:
        self._write_head()
        if self._cycle.response_complete and self._cycle.more_body:
            self._protocol.close_once_read()
        else:
            self._protocol.transport.close()


class BoundedHttp(HttpToolsProtocol):
    """One connection. It is closed if a head is too long or too slow; refusals have our usual error body."""

    # With more than thirty attributes in its dict, as uvicorn's and ours would be, an object takes a kilobyte more.
    __slots__ = (
        "_drop_timer",
        "_head_timer",
        "_is_head_complete",
        "_is_last_request",
        "_is_refused",
        "_num_dropped_bytes",
        "_num_head_bytes",
    )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._drop_timer: asyncio.TimerHandle | None = None
        self._num_dropped_bytes = 0
        self._is_last_request = False
        self._is_refused = False
        self._num_head_bytes = 0
        self._is_head_complete = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_dropping()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._drop_timer is not None:
            self._num_dropped_bytes += len(data)
            if self._num_dropped_bytes > MAX_DISCARDED_BYTES:
                self._close()
        if self._is_refused or self.transport.is_closing():
            return
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_refused or self._is_head_complete:
            return
        if self._head_timer is None:
            self._start_head_timer()  # not for each head, since most are complete by now
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the request line and headers have more than {MAX_HEAD_BYTES} bytes; send fewer")

    def on_message_begin(self) -> None:
        self._stop_head_timer()
        self._is_head_complete = False
        if self.cycle is not None:
            self._num_head_bytes = 0  # what arrived in the same read may belong to the previous request
        super().on_message_begin()
        self.scope["extensions"] = {
            CUT: {"close": self._close},
            ARRIVED: {"has": self._has_arrived},
            GONE: {"is": self.transport.is_closing},
        }

    def on_headers_complete(self) -> None:
        self._is_head_complete = True
        self._stop_head_timer()
        super().on_headers_complete()
        if self.parser.should_upgrade() and self._should_upgrade():
            return  # there is no request to answer
        answering = Answering(self, self.cycle)
        self.cycle.transport = cast(asyncio.Transport, answering)
        self.cycle.send = answering.send  # type: ignore[method-assign]

    def _has_arrived(self) -> bool:
        """Whether the whole body of the current request has."""
        return not self.cycle.more_body

    def handle_websocket_upgrade(self) -> None:
        # Imported for the first WebSocket, as most servers never see one.
        from api.patient_sockets import PatientSocket

        self.ws_protocol_class = PatientSocket
        super().handle_websocket_upgrade()

    def _should_upgrade_to_ws(self) -> bool:
        """Only where there is something to connect to; elsewhere the upgrade is ignored (RFC 9110, 7.8)."""
        return self.parser.get_method() == b"GET" and self.url.partition(b"?")[0].endswith(SOCKET_PATH)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: a client may offer what it likes."""

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
        """Close the connection once the rest of the body is read. The write side is closed now, so that a client that
        reads to the end of the answer need not wait."""
        self._is_last_request = True
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not an HTTP request; send HTTP/1.1 or HTTP/1.0")

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _drop_rest(self) -> None:
        self._num_dropped_bytes = 0
        self._drop_timer = self.loop.call_later(DISCARD_SECONDS, self._close)

    def _stop_dropping(self) -> None:
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Write the response here, as the application has no request to answer."""
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


def open_socket(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A listening socket. Port 0 means any free port. `is_shared`: other sockets of ours may listen on it, too."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=is_shared)
    # Inherited by every connection. Closes those whose client neither reads nor closes: they would hold memory forever.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def acceptors(listening: socket.socket) -> list[socket.socket]:
    """The socket as many times as connections are accepted in one turn of the event loop: libuv takes one for each.
    With a single one, whoever opens a hundred connections holds up all who connect after that for a hundred turns,
    which take tens of milliseconds while the process is busy. The caller closes them."""
    return [listening, *(listening.dup() for _ in range(NUM_ACCEPTORS - 1))]
