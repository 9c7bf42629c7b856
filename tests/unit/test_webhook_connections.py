"""Connections are kept per origin, and never more than the bound are open."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpcore
import pytest

from domain.webhooks import WebhookUrl
from tasks.webhook_http import Connections
from tests.waiting import SECONDS

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class Origins:
    """Receivers on ports of their own. Knows the connections that are open to each."""

    def __init__(self) -> None:
        self.open: dict[int, list[asyncio.StreamWriter]] = {}
        self.num_opened = 0
        self.closed = asyncio.Condition()

    @property
    def num_open(self) -> int:
        return sum(map(len, self.open.values()))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections = self.open[writer.get_extra_info("sockname")[1]]
        connections.append(writer)
        self.num_opened += 1
        try:
            while await reader.readline():
                await reader.readuntil(b"\r\n\r\n")
                writer.write(ANSWER)
        finally:
            writer.close()
            async with self.closed:
                connections.remove(writer)
                self.closed.notify_all()

    async def wait_for_open(self, number: int) -> None:
        async with asyncio.timeout(SECONDS), self.closed:
            await self.closed.wait_for(lambda: self.num_open == number)


@asynccontextmanager
async def origins(number: int) -> AsyncIterator[tuple[Origins, list[WebhookUrl]]]:
    counted = Origins()
    servers = [await asyncio.start_server(counted.serve, "127.0.0.1", 0) for _ in range(number)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    counted.open = {port: [] for port in ports}
    yield counted, [WebhookUrl("http", "127.0.0.1", port, "/") for port in ports]
    await counted.wait_for_open(0)
    for server in servers:
        server.close()
        await server.wait_closed()


async def get(connections: Connections, url: WebhookUrl) -> bytes:
    target = httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
    async with connections.use(url) as connection:
        return (await connection.request("GET", target)).content


def test_a_connection_is_used_again_by_its_origin() -> None:
    async def ask() -> None:
        async with origins(2) as (counted, urls):
            connections = Connections(lambda _: httpcore.AnyIOBackend(), max_open=8)
            for _ in range(3):
                assert [await get(connections, url) for url in urls] == [b"{}", b"{}"]
            assert counted.num_opened == 2
            await connections.aclose()

    asyncio.run(ask())


def test_one_more_origin_closes_the_connection_that_was_idle_longest() -> None:
    async def ask() -> None:
        async with origins(3) as (counted, urls):
            connections = Connections(lambda _: httpcore.AnyIOBackend(), max_open=2)
            for url in (urls[0], urls[1], urls[0], urls[2]):
                await get(connections, url)
            await counted.wait_for_open(2)
            assert [len(counted.open[url.port]) for url in urls] == [1, 0, 1]
            await connections.aclose()

    asyncio.run(ask())


def test_a_request_waits_while_all_are_in_use() -> None:
    async def ask() -> None:
        async with origins(4) as (counted, urls):
            connections = Connections(lambda _: httpcore.AnyIOBackend(), max_open=2)
            async with connections.use(urls[0]), connections.use(urls[1]):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0), connections.use(urls[2]):
                        pass
            assert await asyncio.gather(*(get(connections, url) for url in urls * 8)) == [b"{}"] * 32
            await counted.wait_for_open(2)
            await connections.aclose()

    asyncio.run(ask())


def test_one_that_the_receiver_closed_is_not_used_again() -> None:
    async def ask() -> None:
        async with origins(1) as (counted, [url]):
            connections = Connections(lambda _: httpcore.AnyIOBackend(), max_open=2)
            await get(connections, url)
            counted.open[url.port][0].close()
            await counted.wait_for_open(0)
            assert await get(connections, url) == b"{}"
            assert counted.num_opened == 2
            await connections.aclose()

    asyncio.run(ask())


def test_one_whose_answer_was_not_read_is_closed() -> None:
    async def ask() -> None:
        async with origins(1) as (counted, [url]):
            connections = Connections(lambda _: httpcore.AnyIOBackend(), max_open=1)
            with pytest.raises(asyncio.CancelledError):
                async with connections.use(url) as connection, connection.stream("GET", str(url)):
                    raise asyncio.CancelledError
            await counted.wait_for_open(0)
            assert await get(connections, url) == b"{}"
            await connections.aclose()

    asyncio.run(ask())
