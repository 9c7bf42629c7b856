"""The Redis side of live streams: one pub/sub connection for all streams of this process, kept alive for ever.

Redis may be down, slow or flushed; then nothing comes, and the reader finds out by silence. Whenever messages may have
been missed, that is when a subscription begins or begins again, `on_gap` says so.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from uuid import UUID

import redis.asyncio
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from storage.redis_outages import REDIS_OUTAGES

logger = logging.getLogger(__name__)

PREFIX = "celeriac:stream:"
SUBSCRIBE_SECONDS = 0.25  # how long a new stream waits for its subscription before it reads SQL without
PING_SECONDS = 3.0  # of silence; as much again without an answer, and the connection is taken for dead
MAX_BACKOFF_SECONDS = 2.0


def channel_of(job_id: UUID) -> str:
    return f"{PREFIX}{job_id}"


async def num_listening_processes(client: "redis.asyncio.Redis", job_id: UUID) -> int:
    """How many API processes have a stream of this job open. Raises RedisError."""
    [(_, num_listening)] = await client.pubsub_numsub(channel_of(job_id))
    return int(num_listening)


class ChannelListener:
    """Calls `on_message(job_id, message)` for each message and `on_gap(job_id)` when a subscription takes hold."""

    def __init__(
        self, redis_url: str, *, on_message: Callable[[UUID, bytes], None], on_gap: Callable[[UUID], None]
    ) -> None:
        # RESP2, whatever the server speaks: a message is then a plain list.
        self._pool = ConnectionPool.from_url(
            redis_url, protocol=2, socket_connect_timeout=2, socket_timeout=2, retry=Retry(NoBackoff(), 0)
        )
        self._on_message = on_message
        self._on_gap = on_gap
        self._subscribed: dict[UUID, asyncio.Event] = {}
        self._connection: AbstractConnection | None = None
        self._sending = asyncio.Lock()

    async def add(self, job_id: UUID) -> None:
        """Subscribe to a job's channel. Returns when Redis confirmed it, or without that if Redis is away or slow."""
        subscribed = self._subscribed.setdefault(job_id, asyncio.Event())
        await self._send("SUBSCRIBE", job_id)
        if self._connection is None:
            return
        try:
            await asyncio.wait_for(subscribed.wait(), SUBSCRIBE_SECONDS)
        except TimeoutError:
            logger.debug("no answer to SUBSCRIBE yet", extra={"job_id": str(job_id)})

    async def remove(self, job_id: UUID) -> None:
        self._subscribed.pop(job_id, None)
        await self._send("UNSUBSCRIBE", job_id)

    async def run(self) -> None:
        """Listen until cancelled; reconnect whenever the connection is lost."""
        num_failures = 0
        while True:
            try:
                await self._connect()
                num_failures = 0
                await self._listen()
            except REDIS_OUTAGES as exc:
                num_failures += 1
                if num_failures == 1:
                    logger.warning("live streams have lost Redis and read SQL instead: %s", exc)
            finally:
                await self._disconnect()
            await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 0.05 * 2**num_failures) * random.uniform(0.5, 1))

    async def _connect(self) -> None:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            if self._subscribed:
                await connection.send_command("SUBSCRIBE", *map(channel_of, self._subscribed))
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection = connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        for subscribed in self._subscribed.values():
            subscribed.clear()
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _listen(self) -> None:
        assert self._connection is not None
        is_pinged = False
        while True:
            message = await self._connection.read_response(timeout=PING_SECONDS)
            if message is not None:
                is_pinged = False
                self._receive(message)
            elif is_pinged:
                raise RedisError(f"no answer to PING within {PING_SECONDS} s")
            else:
                is_pinged = True
                async with self._sending:
                    await self._connection.send_command("PING")

    def _receive(self, message: list[bytes]) -> None:
        """[kind, channel, payload]; also b"pong" and whatever else somebody sends us, which is dropped."""
        kind = message[0] if isinstance(message, list) and len(message) == 3 else b""
        if kind not in (b"message", b"subscribe"):
            return
        job_id = _job_id_of(message[1])
        if job_id is None:
            return
        if kind == b"message":
            self._on_message(job_id, message[2])
        elif job_id in self._subscribed:
            self._subscribed[job_id].set()
            self._on_gap(job_id)

    async def _send(self, command: str, job_id: UUID) -> None:
        """Nothing is sent while Redis is away: a new connection subscribes to all that is wanted then."""
        async with self._sending:
            if self._connection is None or (job_id in self._subscribed) != (command == "SUBSCRIBE"):
                return  # while we waited, it was asked for again, or no longer
            try:
                await self._connection.send_command(command, channel_of(job_id))
            except REDIS_OUTAGES as exc:
                logger.debug("%s not sent: %s", command, exc)  # the listening task sees the same and reconnects


def _job_id_of(channel: bytes) -> UUID | None:
    try:
        return UUID(channel.decode().removeprefix(PREFIX))
    except ValueError:
        return None
