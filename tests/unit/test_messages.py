"""Our hand-built messages against Celery's own, key for key, at the installed versions."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from kombu.transport.redis import Channel as RedisChannel

from domain.jobs import external_id, new_id
from settings import Settings
from tasks.app import generate, make_app
from tasks.messages import (
    GENERATE,
    bell_key,
    generate_message,
    priority_key,
    priority_keys,
    revoke_channel,
    revoke_message,
)

QUEUE = "celeriac.celeriac-mini"


@pytest.fixture
def app() -> Iterator[Celery]:
    """Our app over kombu's in-memory transport, which shares the message format of the Redis transport."""
    app = make_app(Settings())
    app.conf.broker_url = "memory://"
    app.conf.broker_transport_options = {}
    yield app
    app.close()


def sent_by_celery(app: Celery, queue: str) -> dict[str, Any]:
    with app.connection_for_write() as connection:
        message = connection.default_channel._queue_for(queue).get(timeout=30)
    assert isinstance(message, dict)
    return message


def without_fresh_parts(message: dict[str, Any]) -> dict[str, Any]:
    """What differs between any two messages: the delivery tag, and where a reply nobody sends would go."""
    properties = {key: value for key, value in message["properties"].items() if key not in ("delivery_tag", "reply_to")}
    return message | {"properties": properties}


@pytest.mark.parametrize("priority", [0, 3, 5, 9])
def test_a_generate_message_is_the_one_celery_sends(app: Celery, priority: int) -> None:
    job_id = new_id()
    app.signature(GENERATE).apply_async(task_id=external_id(job_id), queue=QUEUE, priority=priority, ignore_result=True)
    theirs = sent_by_celery(app, QUEUE)
    ours = json.loads(generate_message(job_id, QUEUE, priority=priority))

    assert generate.name == GENERATE
    assert ours["properties"].keys() == theirs["properties"].keys()
    assert without_fresh_parts(ours) == without_fresh_parts(json.loads(json.dumps(theirs)))


def test_no_two_messages_share_a_delivery_tag() -> None:
    job_id = new_id()
    tags = {json.loads(generate_message(job_id, QUEUE))["properties"]["delivery_tag"] for _ in range(100)}
    assert len(tags) == 100


def test_keys_are_those_of_kombus_redis_transport() -> None:
    channel = RedisChannel.__new__(RedisChannel)
    for priority in range(10):
        assert priority_key(QUEUE, priority) == channel._q_for_pri(QUEUE, priority)
    assert priority_keys(QUEUE) == [channel._q_for_pri(QUEUE, step) for step in channel.priority_steps]
    assert len({*priority_keys(QUEUE), bell_key(QUEUE)}) == 5


def test_the_revoke_broadcast_is_the_one_celery_sends(app: Celery) -> None:
    job_ids = [new_id(), new_id()]
    with app.connection_for_write() as connection:
        node = app.control.mailbox.Node("listener", channel=connection.channel())
        node.listen(callback=print)
        app.control.revoke([external_id(job_id) for job_id in job_ids], terminate=True)
        theirs = node.channel._queue_for("listener.celery.pidbox").get(timeout=30)
    ours = json.loads(revoke_message(job_ids))

    said = decoded_body(ours)
    assert said["arguments"].pop("is_stored") is True  # ours alone
    assert said == decoded_body(theirs)
    assert ours["headers"].keys() == theirs["headers"].keys()
    differing = {"headers": None, "body": None}  # the clock; the order of the body's keys
    assert without_fresh_parts(ours) | differing == without_fresh_parts(theirs) | differing


def decoded_body(message: dict[str, Any]) -> Any:
    return json.loads(RedisChannel.codecs["base64"].decode(message["body"]))


def test_the_revoke_channel_is_where_kombu_publishes_it() -> None:
    channel = RedisChannel.__new__(RedisChannel)
    channel.keyprefix_fanout = channel.keyprefix_fanout.format(db=3)
    assert revoke_channel(3) == channel._get_publish_topic("celery.pidbox", "")


def test_a_plain_worker_serves_no_queue(app: Celery) -> None:
    assert list(app.amqp.queues.consume_from) == []
    assert QUEUE in app.amqp.queues
