"""The proxy does to connections what it says; a fault that never happens would prove nothing."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from local.servers import EmbeddedPostgres
from tests.chaos.proxy import Link
from tests.waiting import SECONDS

LIMIT = 1 << 20  # of a line
pytestmark = pytest.mark.anyio


async def _answer_in_capitals(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):  # the faults under test reach this end too
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
    writer.close()


@pytest.fixture(params=["tcp", "unix"])
async def link(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Link]:
    """Before a server that answers each line in capitals."""
    upstream: tuple[str, int] | Path
    if request.param == "tcp":
        server = await asyncio.start_server(_answer_in_capitals, "127.0.0.1", 0, limit=LIMIT)
        upstream = server.sockets[0].getsockname()
    else:
        upstream = tmp_path / "socket"
        server = await asyncio.start_unix_server(_answer_in_capitals, upstream, limit=LIMIT)
    async with Link("test", upstream) as link:
        yield link
    server.close()


class Talk:
    """A client of the link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def begin(cls, link: Link) -> "Talk":
        return cls(*await asyncio.open_connection("127.0.0.1", link.port, limit=LIMIT))

    async def ask(self, words: str) -> str:
        self._writer.write(f"{words}\n".encode())
        return (await asyncio.wait_for(self._reader.readline(), SECONDS)).decode().strip()

    def close(self) -> None:
        self._writer.close()


async def test_bytes_pass_both_ways(link: Link) -> None:
    talk = await Talk.begin(link)
    assert [await talk.ask("one"), await talk.ask("two" * 100_000)] == ["ONE", "TWO" * 100_000]
    talk.close()


async def test_latency_delays_and_keeps_the_order(link: Link) -> None:
    talk = await Talk.begin(link)
    link.latency_seconds = 0.05
    began_at = time.monotonic()
    first = asyncio.create_task(talk.ask("slow"))
    assert await first == "SLOW"
    assert time.monotonic() - began_at >= 0.1
    talk.close()


async def test_a_half_open_link_is_silent_and_resets_when_mended(link: Link) -> None:
    talk = await Talk.begin(link)
    assert await talk.ask("one") == "ONE"
    link.break_off()
    asked = asyncio.create_task(talk.ask("two"))
    late = await Talk.begin(link)  # is accepted, and hears nothing
    asked_late = asyncio.create_task(late.ask("three"))
    done, _ = await asyncio.wait((asked, asked_late), timeout=0.2)
    assert not done
    link.mend()
    with pytest.raises(ConnectionResetError):
        await asked
    with pytest.raises(ConnectionResetError):
        await asked_late
    again = await Talk.begin(link)
    assert await again.ask("four") == "FOUR"
    for one in (talk, late, again):
        one.close()


async def test_a_server_that_ends_behind_a_half_open_link_is_missed_until_it_is_mended() -> None:
    answering: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(writer)
        await _answer_in_capitals(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with Link("test", server.sockets[0].getsockname()) as link:
        talk = await Talk.begin(link)
        assert await talk.ask("one") == "ONE"
        link.break_off()
        asked = asyncio.create_task(talk.ask("two"))
        answering[0].close()
        done, _ = await asyncio.wait((asked,), timeout=0.1)
        assert not done
        link.mend()
        with pytest.raises(ConnectionResetError):
            await asked
        talk.close()
    server.close()


async def test_a_reset_link_breaks_every_connection_and_takes_new_ones(link: Link) -> None:
    talk = await Talk.begin(link)
    assert await talk.ask("one") == "ONE"
    link.reset_all()
    with pytest.raises(ConnectionResetError):
        await talk.ask("two")
    again = await Talk.begin(link)
    assert await again.ask("three") == "THREE"
    assert link.num_connections == 1
    for one in (talk, again):
        one.close()


async def test_a_commit_is_forwarded_and_its_answer_is_lost(postgres_server: EmbeddedPostgres) -> None:
    socket_path = Path(postgres_server.url.partition("host=")[2]) / ".s.PGSQL.5432"
    name = "proxy_test"
    async with Link("postgres", socket_path) as link:
        url = f"postgresql://postgres@127.0.0.1:{link.port}/postgres"
        connection = await psycopg.AsyncConnection.connect(url)
        await connection.execute(f"CREATE TABLE {name} (number int)")
        await connection.execute(f"INSERT INTO {name} VALUES (1)")
        link.cut_after(b"COMMIT")
        with pytest.raises(psycopg.OperationalError):
            await connection.commit()
        assert link.num_cuts == 1
        await connection.close()
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as again:
            cursor = await again.execute(f"SELECT count(*) FROM {name}")
            assert await cursor.fetchone() == (1,)
            await again.execute(f"DROP TABLE {name}")
