"""kombu's Redis transport, changed to take as many messages as there is room for, atomically and in one round trip.

Stock kombu pops a message and then records it as unacked; if the worker is killed in between, the message is lost. Here
one script does both. The blocking pop waits on a second list, the bell, to which publishers push in the same pipeline,
so a broken socket can lose only a notification, not a message. A lost notification, or a publisher that sends none,
costs at most `brpop_timeout` (one second). Keys and formats are kombu's, so stock workers, the recovery of abandoned
messages and Flower work as usual.

Redis keys (`queue` is `ModelSpec.queue`; the lists themselves are described in `tasks/messages.py`)
| name            | type       | lifetime               | writer                        | reader      |
|-----------------|------------|------------------------|-------------------------------|-------------|
| unacked         | hash       | until acked or restored| take, kombu                   | all workers |
| unacked_index   | sorted set | until acked or restored| take, kombu                   | all workers |
| {queue}:bell    | list       | until the queue is empty| dispatch, give_back          | GPU workers |
| {queue}:idle    | string     | two seconds            | a worker with free slots      | GPU workers |
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from queue import Empty
from time import monotonic, time
from typing import Any, NamedTuple

from celery.utils.log import get_logger
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import dumps, loads

from tasks.messages import MAX_RINGS, bell_key, priority_keys

# KEYS: unacked, unacked_index, the bell and the idle key of a queue, its lists in order of service.
# ARGV: limit, now, idle slots, name of the worker, the queue, milliseconds of "idle".
# Returns the messages. One without a delivery tag is returned as well, but not recorded.
TAKE = """
local limit, taken = tonumber(ARGV[1]), {}
for i = 5, #KEYS do
  while #taken < limit do
    local message = redis.call('RPOP', KEYS[i])
    if not message then break end
    local ok, tag = pcall(function() return cjson.decode(message).properties.delivery_tag end)
    if ok and type(tag) == 'string' then
      redis.call('ZADD', KEYS[2], ARGV[2], tag)
      redis.call('HSET', KEYS[1], tag, '[' .. message .. ',"",' .. cjson.encode(ARGV[5]) .. ']')
    end
    taken[#taken + 1] = message
  end
end
if #taken < limit then
  -- The lists are empty, so the remaining notifications would wake workers for nothing.
  redis.call('DEL', KEYS[3])
  if #taken < tonumber(ARGV[3]) then redis.call('SET', KEYS[4], ARGV[4], 'PX', ARGV[6]) end
end
return taken
"""

# KEYS: unacked, unacked_index, the bell, then the list of each message. ARGV: delivery tag and text of each message.
# Returns how many were requeued. The others are no longer listed as unacked, so another worker has them.
GIVE_BACK = """
local num_given = 0
for i = 4, #KEYS do
  local tag, message = ARGV[2 * (i - 4) + 1], ARGV[2 * (i - 4) + 2]
  redis.call('ZREM', KEYS[2], tag)
  if redis.call('HDEL', KEYS[1], tag) == 1 then
    redis.call('RPUSH', KEYS[i], message)
    redis.call('LPUSH', KEYS[3], 1)
    num_given = num_given + 1
  end
end
return num_given
"""


logger = get_logger(__name__)

IDLE_SECONDS = 2.0


class Room(NamedTuple):
    """What the worker can take now: `num_idle` jobs could start immediately; `credit` includes the look-ahead."""

    credit: int
    num_idle: int


class BulkQoS(stock.QoS):
    """Unacked messages of one channel, in order of arrival."""

    def can_consume(self) -> bool:
        # Listening to the bell takes no message and so needs no credit; `_brpop_start` and `take` check the credit.
        return self.channel.room is not None or super().can_consume()

    def append(self, message: Any, delivery_tag: str) -> None:
        if self.channel.is_delivering_taken:  # the script has already recorded the message
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        """Requeue everything in hand at the head of its queue, in order of arrival. Stock kombu reverses the order."""
        if self.channel.room is None:
            super().restore_unacked(client)
            return
        self.channel.give_back(list(self._delivered))
        self._delivered.clear()

    def restore_visible(self, *args: Any, **options: Any) -> None:
        try:
            super().restore_visible(*args, **options)
        except self.channel.ResponseError as exc:  # taking the lock is a write, which a full Redis or a replica refuses
            logger.warning("cannot look for abandoned messages at the moment: %s", exc)

    @property
    def num_unacked(self) -> int:
        return len(self._delivered) - len(self._dirty)


class BulkChannel(stock.Channel):
    """A stock channel until `room` is set; from then on, it takes messages in bulk, by the script TAKE."""

    QoS = BulkQoS

    room: Callable[[str], Room] | None = None  # by queue
    worker_name = ""
    emptied: frozenset[str] = frozenset()  # the queues that had no more messages when they were last read
    is_delivering_taken = False
    num_takes = 0
    _sync_client: Any = None

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """Use one client per channel. Stock kombu creates a `redis.Redis` for every command, which takes a fifth of the
        hub's time."""
        if client is not None:
            yield client
        else:
            yield self._client_of_pool()

    def _client_of_pool(self) -> Any:
        if self._sync_client is None or self._sync_client.connection_pool is not self.pool:
            self._sync_client = self._create_client()
        return self._sync_client

    def refill(self) -> None:
        """Take messages if there is credit and there may be any. Called at every turn of the event loop."""
        if self.room is not None:
            self.take([queue for queue in self.active_queues if queue not in self.emptied])

    def queues_with_room(self) -> list[str]:
        return [queue for queue in self.active_queues if self.room is None or self.room(queue).credit > 0]

    def take(self, queues: Sequence[str]) -> int:
        """Take as many messages from each of these queues as its credit allows. Returns how many."""
        return sum(map(self._take, queues))

    def _take(self, queue: str) -> int:
        assert self.room is not None
        room = self.room(queue)
        if room.credit <= 0:
            self.emptied -= {queue}  # by the time there is credit again, messages may have arrived
            return 0
        keys = [self.unacked_key, self.unacked_index_key, bell_key(queue), idle_key(queue), *priority_keys(queue)]
        arguments = [room.credit, time(), room.num_idle, self.worker_name, queue, int(IDLE_SECONDS * 1000)]
        with self.conn_or_acquire() as client:
            found = self._take_script(keys, arguments, client=client)
        self.num_takes += 1
        if len(found) == room.credit:
            self.emptied -= {queue}
        else:
            self.emptied |= {queue}
        self._deliver_taken(queue, found)
        return len(found)

    def _deliver_taken(self, queue: str, found: Sequence[bytes]) -> None:
        self.is_delivering_taken = True
        try:
            for text in found:
                self._deliver_one(queue, text)
        finally:
            self.is_delivering_taken = False

    def _deliver_one(self, queue: str, text: bytes) -> None:
        """Deliver a message, or drop it if that is impossible: its job is in SQL, and it must not hold up the others.
        (Celery would even treat a KeyError as a connection error and restart the consumer, again and again.)"""
        tag = None
        try:
            message = loads(text)
            properties = message["properties"]
            if not isinstance(properties["delivery_tag"], str):
                raise TypeError("its delivery tag is not a string")  # so the script has not recorded it either
            tag = properties["delivery_tag"]
            properties["delivery_info"] = {**properties.get("delivery_info", {}), "exchange": "", "routing_key": queue}
            self.connection._deliver(message, queue)
        except Exception:
            logger.exception("dropped a message of %d bytes from %s: it is not a Celery task", len(text), queue)
            if tag is not None:
                self.ack_many([tag])

    def ack_many(self, tags: Sequence[str]) -> None:
        """Remove these messages, here and in Redis, in one round trip. Idempotent."""
        for tag in tags:
            self.qos._delivered.pop(tag, None)
        # Not in a transaction, since a full Redis refuses transactions even if they only delete. In this order, a crash
        # in between leaves an index entry without a message, which the next search for abandoned messages removes.
        with self.conn_or_acquire() as client, client.pipeline(transaction=False) as pipeline:
            pipeline.hdel(self.unacked_key, *tags).zrem(self.unacked_index_key, *tags).execute()

    def keep_in_hand(self, tags: Sequence[str]) -> None:
        """Renew the timestamps of these messages, so that no worker requeues them as abandoned."""
        now = time()
        with self.conn_or_acquire() as client:
            client.zadd(self.unacked_index_key, {tag: now for tag in tags}, xx=True)

    def give_back(self, tags: Sequence[str]) -> int:
        """Requeue messages in hand at the head of their queue, in the order of `tags`, and ring the bell for each.
        Messages that Redis no longer lists as unacked are skipped. Returns how many were requeued."""
        messages = [self.qos._delivered.pop(tag) for tag in tags if tag in self.qos._delivered]
        queues = dict.fromkeys(map(_queue_of, messages))
        return sum(self._give_back(queue, [each for each in messages if _queue_of(each) == queue]) for queue in queues)

    def _give_back(self, queue: str, messages: Sequence[Any]) -> int:
        keys, arguments = [self.unacked_key, self.unacked_index_key, bell_key(queue)], []
        for message in reversed(messages):  # the one pushed last is popped first
            keys.append(self._q_for_pri(queue, self._get_message_priority(message._raw, reverse=False)))
            arguments += [message.delivery_tag, dumps(_as_redelivered(message._raw))]
        with self.conn_or_acquire() as client:
            return int(self._give_back_script(keys, arguments, client=client))

    def queues_of_idle_others(self) -> set[str]:
        """The queues of which another worker has recently reported that they are empty and it has free slots."""
        queues = list(self.active_queues)
        with self.conn_or_acquire() as client:
            names = client.mget(list(map(idle_key, queues)))
        found = zip(queues, names, strict=True)
        return {queue for queue, name in found if name is not None and name.decode() != self.worker_name}

    def num_waiting(self) -> int:
        """The number of messages in the queues for which there is room."""
        return sum(map(self._size, self.queues_with_room()))

    def close(self) -> None:
        # Stock kombu waits for the pending pop, whose message might be lost; ours can lose only a notification.
        if self.room is not None:
            self._in_poll = None
        super().close()

    # Called by kombu's poller, to start waiting and to read the result

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.room is None:
            super()._brpop_start(timeout)
            return
        listened = self.queues_with_room()
        self.emptied &= set(listened)  # for the others, messages may have arrived by the time there is credit again
        bells = list(map(bell_key, listened))
        if not bells:
            return
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        connection.send_command("BRPOP", *bells, timeout or self.brpop_timeout or 1)

    def _brpop_read(self, **options: Any) -> bool:
        if self.room is None:
            return bool(super()._brpop_read(**options))
        try:
            ring = self._read_reply(**options)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        queues = self.queues_with_room()
        if ring and ring[0].decode() not in map(bell_key, queues):
            self._pass_on(ring[0])
        elif not self.take(queues):
            raise Empty
        return True

    def _read_reply(self, **options: Any) -> Any:
        try:
            return self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()  # the next turn of the event loop reconnects
            raise

    def _pass_on(self, bell: bytes) -> None:
        """The bell has rung but we cannot take any jobs: wake another worker instead, if Redis accepts writes."""
        with self.conn_or_acquire() as client, suppress(self.ResponseError):
            client.pipeline().lpush(bell, 1).ltrim(bell, 0, MAX_RINGS - 1).execute()

    @cached_property
    def _take_script(self) -> Any:
        return self._client_of_pool().register_script(TAKE)

    @cached_property
    def _give_back_script(self) -> Any:
        return self._client_of_pool().register_script(GIVE_BACK)


class BulkTransport(stock.Transport):
    """Replaces kombu's `redis` transport in a GPU worker."""

    Channel = BulkChannel


def idle_key(queue: str) -> str:
    return f"{queue}:idle"


def _queue_of(message: Any) -> str:
    return str(message.delivery_info["routing_key"])


def _as_redelivered(raw: dict[str, Any]) -> dict[str, Any]:
    raw["headers"]["redelivered"] = True
    raw["properties"]["delivery_info"]["redelivered"] = True
    return raw
