"""The channels on which live chunks are published, and one connection that hears all those of a process.

The connection is kept open. If Redis is down, slow or flushed, nothing arrives. Whenever a subscription starts or
restarts, messages may have been missed; this is reported to `on_gap`.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable
from uuid import UUID

import redis.asyncio
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

#: What the asyncio client raises if Redis is down, slow, or lost midway. RuntimeError is uvloop's "the handler is
#: closed", raised when writing to a connection that Redis has closed and whose end has not been read yet.
#: AttributeError comes from the client if another task closes the connection while this one is writing. Our own
#: deadlines raise TimeoutError, which is an OSError.
REDIS_OUTAGES = (RedisError, OSError, RuntimeError, AttributeError)


PREFIX = "celeriac:stream:"

SUBSCRIBE_SECONDS = 0.25  # how long a new stream waits for its subscription before it reads SQL without it

PING_SECONDS = 3.0  # send a PING after this much silence; if there is no answer for as long again, reconnect

MAX_BACKOFF_SECONDS = 2.0


def channel_of(job_id: UUID) -> str:
    return f"{PREFIX}{job_id}"


async def num_listening_processes(client: "redis.asyncio.Redis", job_id: UUID) -> int:
    """How many API processes have an open stream of this job. Raises RedisError."""
    [(_, num_listening)] = await client.pubsub_numsub(channel_of(job_id))
    return int(num_listening)


class ChannelListener:
    """Calls `on_message(job_id, message)` for each message and `on_gap(job_id)` when a subscription starts."""

    def __init__(
        self, redis_url: str, *, on_message: Callable[[UUID, bytes], None], on_gap: Callable[[UUID], None]
    ) -> None:
        # RESP2, in which a message is a plain list.
        self._pool = ConnectionPool.from_url(
            redis_url, protocol=2, socket_connect_timeout=2, socket_timeout=2, retry=Retry(NoBackoff(), 0)
        )
        self._on_message = on_message
        self._on_gap = on_gap
        self._subscribed: dict[UUID, asyncio.Event] = {}
        self._connection: AbstractConnection | None = None
        self._num_heard = 0  # messages and answers, ever
        self._versions: dict[UUID, int] = {}  # of each channel that is heard, its last message's number
        self._sending = asyncio.Lock()
        self._subscribing: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references

    async def add(self, job_id: UUID) -> None:
        """Subscribe to a job's channel. Returns when Redis has confirmed it, or without that if Redis is down or
        slow."""
        subscribed = self._subscribed.get(job_id)
        if subscribed is None:
            subscribed = self._subscribed[job_id] = asyncio.Event()
            await self._subscribe(job_id)
        if self._connection is None or subscribed.is_set():
            return
        try:
            async with asyncio.timeout(SUBSCRIBE_SECONDS):
                await subscribed.wait()
        except TimeoutError:
            log.debug("no answer to SUBSCRIBE yet", extra={"job_id": str(job_id)})

    def version_of(self, job_id: UUID) -> int | None:
        """Another one after each message; None while messages may be missed."""
        return self._versions.get(job_id)

    async def _subscribe(self, job_id: UUID) -> None:
        """Once for all streams of a job: it is sent even if the first of them leaves meanwhile."""
        task = asyncio.create_task(self._send("SUBSCRIBE", job_id))
        self._subscribing.add(task)
        task.add_done_callback(self._subscribing.discard)
        await asyncio.shield(task)

    async def remove(self, job_id: UUID) -> None:
        self._subscribed.pop(job_id, None)
        self._versions.pop(job_id, None)
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
                    log.warning("live streams have lost Redis and read from SQL instead: %s", exc)
            finally:
                await self._disconnect()
            await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 0.05 * 2**num_failures) * random.uniform(0.5, 1))

    async def _connect(self) -> None:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connection = connection  # first: what is added from now on is subscribed to by itself
        async with self._sending:
            if self._subscribed:
                await connection.send_command("SUBSCRIBE", *map(channel_of, self._subscribed))

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._versions.clear()
        for subscribed in self._subscribed.values():
            subscribed.clear()
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _listen(self) -> None:
        assert self._connection is not None
        # Beside the reading, not as a timeout of each read, which would cost more than the message.
        tasks = [asyncio.create_task(work(self._connection)) for work in (self._read, self._watch)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # neither of them ends without an error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, connection: AbstractConnection) -> None:
        while True:
            message = await connection.read_response(timeout=math.inf)
            self._num_heard += 1
            self._receive(message)

    async def _watch(self, connection: AbstractConnection) -> None:
        """Raise RedisError once the server does not answer any more."""
        while True:
            num_heard = self._num_heard
            await asyncio.sleep(PING_SECONDS)
            if self._num_heard != num_heard:
                continue
            async with self._sending:
                await connection.send_command("PING")
            await asyncio.sleep(PING_SECONDS)
            if self._num_heard == num_heard:
                raise RedisError(f"no answer to PING within {PING_SECONDS} s")

    def _receive(self, message: list[bytes]) -> None:
        """Handle [kind, channel, payload]; b"pong" and anything unknown are dropped."""
        kind = message[0] if isinstance(message, list) and len(message) == 3 else b""
        if kind not in (b"message", b"subscribe"):
            return
        job_id = _job_id_of(message[1])
        if job_id not in self._subscribed:
            return
        if kind == b"message":
            if job_id in self._versions:
                self._versions[job_id] = self._num_heard
            self._on_message(job_id, message[2])
        else:
            self._versions[job_id] = self._num_heard
            self._subscribed[job_id].set()
            self._on_gap(job_id)

    async def _send(self, command: str, job_id: UUID) -> None:
        """Send a command, unless there is no connection: a new one will subscribe to everything that is needed."""
        async with self._sending:
            if self._connection is None or (job_id in self._subscribed) != (command == "SUBSCRIBE"):
                return  # in the meantime the subscription was requested again, or dropped
            try:
                await self._connection.send_command(command, channel_of(job_id))
            except REDIS_OUTAGES as exc:
                log.debug("%s not sent: %s", command, exc)  # the listening task sees the same error and reconnects
        # The client sends by `asyncio.wait_for`, which in Python 3.11 forgets a cancellation that comes as it ends.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError


def _job_id_of(channel: bytes) -> UUID | None:
    try:
        return UUID(channel.decode().removeprefix(PREFIX))
    except ValueError:
        return None
