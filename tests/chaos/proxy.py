"""A TCP proxy that goes wrong on request: slow, half-open, reset, or cut right after it forwarded what mattered.

One `Link` stands before one server. It belongs to one event loop. What is half-open swallows every byte and says
nothing; when it is mended, its connections are reset, as those of a peer that came back without memory of them.
"""

import asyncio
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Self

RST_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER, no time: closing resets
MAX_BUFFERED_BYTES = 1 << 20


class Side(asyncio.Protocol):
    """One end of a connection; `other` gets what arrives here."""

    def __init__(self, link: "Link", *, is_client: bool) -> None:
        self._link = link
        self.is_client = is_client
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None
        self._due_at = 0.0  # when the latest delayed bytes arrive: none overtakes another

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=MAX_BUFFERED_BYTES)
        raw = transport.get_extra_info("socket")
        if raw.family == socket.AF_INET:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.is_client:
            transport.pause_reading()  # until its server is reached
            self._link.join(self)

    def data_received(self, data: bytes) -> None:
        self._link.forward(self, data)

    def eof_received(self) -> None:
        """The transport closes itself; `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.part(self)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def write(self, data: bytes, latency_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._due_at = max(self._due_at, loop.time() + latency_seconds)
        if self._due_at <= loop.time():
            self.write_now(data)
        else:
            loop.call_at(self._due_at, self.write_now, data)

    def write_now(self, data: bytes) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def reset(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            with suppress(OSError):
                raw = self.transport.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
            self.transport.abort()


class Link:
    """Listens on a loopback port and forwards to `upstream`: (host, port), or the path of a Unix socket."""

    def __init__(self, name: str, upstream: tuple[str, int] | Path) -> None:
        self.name = name
        self.upstream = upstream
        self.port = 0
        self.latency_seconds = 0.0
        self.num_cuts = 0
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._cut_after: bytes | None = None
        self._clients: set[Side] = set()
        self._server: asyncio.Server | None = None
        self._connecting: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Side(self, is_client=True), "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        self._server.close()
        self.reset_all()
        for task in self._connecting:
            task.cancel()

    @property
    def is_half_open(self) -> bool:
        return not self._is_whole.is_set()

    @property
    def num_connections(self) -> int:
        return len(self._clients)

    # What goes wrong

    def reset_all(self) -> None:
        for client in list(self._clients):
            self._reset_both(client)

    def cut_after(self, words: bytes) -> None:
        """The next client that sends `words` gets them forwarded, and never hears the answer."""
        self._cut_after = words

    def break_off(self) -> None:
        """Half-open from now on: swallow everything, also from new connections."""
        self._is_whole.clear()

    def mend(self) -> None:
        """Forward again; whatever lost bytes meanwhile is reset."""
        self._cut_after = None
        self.latency_seconds = 0.0
        if self.is_half_open:
            self.reset_all()
            self._is_whole.set()

    # What the sides ask for

    def join(self, client: Side) -> None:
        self._clients.add(client)
        task = asyncio.get_running_loop().create_task(self._connect(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def part(self, side: Side) -> None:
        if side.is_client:
            self._clients.discard(side)
        if side.other is None:
            return
        if side.is_client or not self.is_half_open:  # else the client learns of it when the link is mended
            side.other.close()

    def forward(self, side: Side, data: bytes) -> None:
        if self.is_half_open or side.other is None:
            return
        is_last = side.is_client and self._cut_after is not None and self._cut_after in data
        if not is_last:
            side.other.write(data, self.latency_seconds)
            return
        self._cut_after = None
        self.num_cuts += 1
        side.other.write_now(data)
        side.reset()
        side.other.close()  # after what was written; the server acts on it before it sees the end

    async def _connect(self, client: Side) -> None:
        try:
            await self._is_whole.wait()  # accepted by a machine that is not there
            server = await self._reach()
        except OSError:
            client.reset()
            return
        client.other, server.other = server, client
        if client.transport is None or client.transport.is_closing():
            server.close()
        else:
            client.transport.resume_reading()

    async def _reach(self) -> Side:
        loop = asyncio.get_running_loop()
        if isinstance(self.upstream, Path):
            _, side = await loop.create_unix_connection(lambda: Side(self, is_client=False), str(self.upstream))
        else:
            host, port = self.upstream
            _, side = await loop.create_connection(lambda: Side(self, is_client=False), host, port)
        return side

    def _reset_both(self, client: Side) -> None:
        self._clients.discard(client)
        server = client.other
        client.reset()
        if server is not None:
            server.reset()
