"""The Redis side of live streams, on the event loop that the API runs on."""

import asyncio
from collections.abc import Callable
from typing import cast
from uuid import uuid4

import redis.asyncio
import uvloop
from redis.asyncio.connection import Connection

from storage.stream_channels import ChannelListener, channel_of
from tests.waiting import SECONDS, wait_until_async


def test_a_connection_that_was_cut_and_not_noticed_yet_is_replaced(redis_url: str) -> None:
    """uvloop calls it a RuntimeError to write to one, where asyncio says nothing."""

    def cut(connection: Connection) -> None:
        connection._writer.transport.abort()  # type: ignore[union-attr]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_lose_the_connection(redis_url, cut))


def test_a_connection_that_is_closed_while_it_is_written_to_is_replaced(redis_url: str) -> None:
    def close_in_mid_command(connection: Connection) -> None:
        """The client has looked at its writer by then, and uses it in a task that begins later."""

        def close() -> None:
            assert connection._writer is not None
            connection._writer.close()
            connection._reader = connection._writer = None

        asyncio.get_running_loop().call_soon(close)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_lose_the_connection(redis_url, close_in_mid_command))


async def _lose_the_connection(redis_url: str, lose: Callable[[Connection], None]) -> None:
    subscribed, heard = asyncio.Event(), asyncio.Event()
    listener = ChannelListener(redis_url, on_message=lambda *_: heard.set(), on_gap=lambda _: subscribed.set())
    await listener.add(uuid4())
    listening = asyncio.create_task(listener.run())
    job_id = uuid4()
    async with asyncio.timeout(SECONDS), redis.asyncio.Redis.from_url(redis_url) as client:
        await subscribed.wait()
        lose(cast(Connection, listener._connection))
        await listener.add(job_id)
        while not heard.is_set():
            await client.publish(channel_of(job_id), b"news")
            await asyncio.sleep(0.01)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)


async def test_a_channel_is_subscribed_to_once_for_all_streams_of_its_job(redis_url: str) -> None:
    job_id, num_subscribed, heard = uuid4(), 0, asyncio.Event()

    def count(_: object) -> None:
        nonlocal num_subscribed
        num_subscribed += 1

    listener = ChannelListener(redis_url, on_message=lambda *_: heard.set(), on_gap=count)
    listening = asyncio.create_task(listener.run())
    async with asyncio.timeout(SECONDS), redis.asyncio.Redis.from_url(redis_url) as client:
        await wait_until_async(lambda: listener._connection)
        first = asyncio.create_task(listener.add(job_id))
        await asyncio.sleep(0)
        first.cancel()  # the others rely on what it has begun
        await asyncio.gather(*(listener.add(job_id) for _ in range(50)))
        while not heard.is_set():
            await client.publish(channel_of(job_id), b"news")
            await asyncio.sleep(0.01)
    assert num_subscribed == 1
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
