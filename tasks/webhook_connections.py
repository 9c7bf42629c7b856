"""HTTP connections kept per origin.

httpcore's own pool looks at all of its connections several times per request, with a system call each: with many
receivers that costs far more than the request. Here a request looks at the oldest one and at those of its own origin.
"""

import asyncio
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpcore

from domain.webhook_urls import WebhookUrl

KEEPALIVE_SECONDS = 10.0

Origin = tuple[str, str, int]  # scheme, host, port


class Connections:
    """For one event loop. At most `max_open` are open, in use or idle: a new one closes the one that has been idle
    longest, and waits while all are in use."""

    def __init__(self, network: httpcore.AsyncNetworkBackend, max_open: int) -> None:
        self._network = network
        self._ssl_context = ssl.create_default_context()
        self._max_open = max_open
        self._room = asyncio.Semaphore(max_open)
        self._num_in_use = 0
        self._idle: dict[httpcore.AsyncHTTPConnection, Origin] = {}  # idle longest first
        self._idle_by_origin: defaultdict[Origin, list[httpcore.AsyncHTTPConnection]] = defaultdict(list)
        self._dropped: list[httpcore.AsyncHTTPConnection] = []  # to be closed

    @asynccontextmanager
    async def use(self, url: WebhookUrl) -> AsyncIterator[httpcore.AsyncHTTPConnection]:
        """For one request, with which a new connection connects. Kept if the whole answer was read."""
        origin = (url.scheme, url.host, url.port)
        async with self._room:
            connection = self._take(origin)
            try:
                await self._close_dropped()
                yield connection
            finally:
                await self._give_back(connection, origin)

    async def aclose(self) -> None:
        """Call when none is in use."""
        self._dropped += self._idle
        self._idle.clear()
        self._idle_by_origin.clear()
        await self._close_dropped()

    def _take(self, origin: Origin) -> httpcore.AsyncHTTPConnection:
        while self._idle and self._oldest().has_expired():
            self._drop(self._oldest())
        connection = self._take_idle(origin) or self._new(origin)
        self._num_in_use += 1
        while self._num_in_use + len(self._idle) > self._max_open:
            self._drop(self._oldest())
        return connection

    def _take_idle(self, origin: Origin) -> httpcore.AsyncHTTPConnection | None:
        """The one used last, so that those beyond what an origin needs expire."""
        while origin in self._idle_by_origin:
            connection = self._idle_by_origin[origin][-1]
            if not connection.has_expired():
                self._forget(connection)
                return connection
            self._drop(connection)
        return None

    def _new(self, origin: Origin) -> httpcore.AsyncHTTPConnection:
        scheme, host, port = origin
        return httpcore.AsyncHTTPConnection(
            httpcore.Origin(scheme.encode(), host.encode(), port),
            ssl_context=self._ssl_context,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=self._network,
        )

    async def _give_back(self, connection: httpcore.AsyncHTTPConnection, origin: Origin) -> None:
        self._num_in_use -= 1
        if not connection.is_available():
            await connection.aclose()
            return
        self._idle[connection] = origin
        self._idle_by_origin[origin].append(connection)

    def _oldest(self) -> httpcore.AsyncHTTPConnection:
        return next(iter(self._idle))

    def _drop(self, connection: httpcore.AsyncHTTPConnection) -> None:
        self._forget(connection)
        self._dropped.append(connection)

    def _forget(self, connection: httpcore.AsyncHTTPConnection) -> None:
        origin = self._idle.pop(connection)
        self._idle_by_origin[origin].remove(connection)
        if not self._idle_by_origin[origin]:
            del self._idle_by_origin[origin]

    async def _close_dropped(self) -> None:
        while self._dropped:
            await self._dropped.pop().aclose()
