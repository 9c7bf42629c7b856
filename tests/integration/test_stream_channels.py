"""The Redis side of live streams, on the event loop that the API runs on."""

import asyncio
from typing import cast
from uuid import uuid4

import redis.asyncio
import uvloop
from redis.asyncio.connection import Connection

from storage.stream_channels import ChannelListener, channel_of


def test_a_connection_that_was_cut_and_not_noticed_yet_is_replaced(redis_url: str) -> None:
    """uvloop calls it a RuntimeError to write to one, where asyncio says nothing."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_lose_the_connection(redis_url))


async def _lose_the_connection(redis_url: str) -> None:
    subscribed, heard = asyncio.Event(), asyncio.Event()
    listener = ChannelListener(redis_url, on_message=lambda *_: heard.set(), on_gap=lambda _: subscribed.set())
    await listener.add(uuid4())
    listening = asyncio.create_task(listener.run())
    job_id = uuid4()
    async with asyncio.timeout(20), redis.asyncio.Redis.from_url(redis_url) as client:
        await subscribed.wait()
        cast(Connection, listener._connection)._writer.transport.abort()  # type: ignore[union-attr]
        await listener.add(job_id)
        while not heard.is_set():
            await client.publish(channel_of(job_id), b"news")
            await asyncio.sleep(0.01)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
