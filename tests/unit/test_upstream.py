"""What Celery and kombu do, and we do otherwise (docs/adr/0027): only their own code runs here.

A test that fails after an upgrade names an override that may go: take it out and run the tests of the consumer.
"""

import inspect
import logging
from contextlib import nullcontext
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import DisabledBackend
from celery.events.dispatcher import EventDispatcher
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer
from celery.worker.consumer.connection import Connection as ConnectionStep
from kombu import Connection
from kombu.asynchronous import Hub
from kombu.transport import redis as stock
from redis import ResponseError

SECRET = "my diary entry"


@pytest.fixture
def app() -> Celery:
    return Celery("stock", broker="memory://")


# kombu: gpu_worker/transport.py


def test_kombu_pops_a_message_before_it_writes_it_down() -> None:
    sent: list[tuple[Any, ...]] = []
    channel = SimpleNamespace(
        active_queues=["queue"],
        priority_steps=[0],
        brpop_timeout=1,
        global_keyprefix="",
        client=SimpleNamespace(connection=SimpleNamespace(send_command=lambda *words: sent.append(words))),
        _queue_cycle=SimpleNamespace(consume=lambda _: ["queue"]),
        _q_for_pri=lambda queue, _: queue,
    )
    stock.Channel._brpop_start(channel)
    assert sent == [("BRPOP", "queue", 1)]


def test_kombu_makes_a_client_for_every_command() -> None:
    channel = SimpleNamespace(_create_client=object)
    with stock.Channel.conn_or_acquire(channel) as one, stock.Channel.conn_or_acquire(channel) as other:
        assert one is not other


def test_kombu_puts_messages_back_in_the_reverse_order() -> None:
    pushed: list[str] = []
    qos = SimpleNamespace(
        channel=SimpleNamespace(conn_or_acquire=lambda _: nullcontext()),
        restore_by_tag=lambda tag, client: pushed.append(tag),
        _delivered={"first": None, "second": None},
    )
    stock.QoS.restore_unacked(qos)
    assert pushed == ["first", "second"]
    # Each to the end that is popped, so the second one is popped first.
    assert inspect.signature(stock.QoS.restore_by_tag).parameters["leftmost"].default is False


def test_kombu_looks_for_abandoned_messages_as_if_redis_took_every_write() -> None:
    def refuse(**_: object) -> None:
        raise ResponseError("OOM command not allowed")

    poller = stock.MultiChannelPoller()
    channel = SimpleNamespace(
        active_queues=["queue"],
        qos=SimpleNamespace(restore_visible=refuse),
        unacked_restore_limit=None,
        unacked_restore_throttle=1,
        connection_errors=(OSError,),
    )
    poller._channels = [channel]
    with pytest.raises(ResponseError):
        poller.maybe_restore_messages()


def test_kombu_waits_for_the_pending_pop_when_it_closes_a_channel() -> None:
    reads: list[str] = []

    class Channel(stock.Channel):
        closed = True
        _in_poll = True

        def _brpop_read(self, **_: object) -> None:
            reads.append("read")
            raise Empty

    channel = Channel.__new__(Channel)
    channel.connection = SimpleNamespace(close_channel=lambda _: None)
    channel._qos, channel._cycle = None, None
    channel.close()
    assert reads == ["read"]


# kombu's event loop: gpu_worker/consumer.py, gpu_worker/pool.py


def test_kombu_leaves_callbacks_of_closed_connections_in_the_loop() -> None:
    hub = Hub()
    try:
        for _ in range(2):
            connection = Connection("redis://127.0.0.1")
            transport = connection.transport
            transport.register_with_event_loop(SimpleNamespace(client=connection), hub)
            transport.close_connection(SimpleNamespace())
            hub.reset()
        assert len(hub.on_tick) == 2
    finally:
        hub.close()


def test_kombus_loop_calls_back_in_no_order() -> None:
    assert isinstance(Hub()._ready, set)


# Celery: gpu_worker/consumer.py, gpu_worker/deliveries.py, tasks/app.py


def test_celery_has_no_setting_for_the_pace_of_reconnecting(app: Celery) -> None:
    options: dict[str, object] = {}
    consumer = SimpleNamespace(app=app, first_connection_attempt=True)
    Consumer.ensure_connected(consumer, SimpleNamespace(ensure_connection=lambda *_, **given: options.update(given)))
    assert options.keys() == {"callback"}


def test_celery_warns_at_every_reconnect_of_a_setting_for_late_acks(app: Celery) -> None:
    consumer = SimpleNamespace(app=app, connection=None)
    app.conf.worker_enable_prefetch_count_reduction = False
    with pytest.warns(CPendingDeprecationWarning):
        Consumer.on_connection_error_after_connected(consumer, OSError("Broken pipe"))


def test_celery_logs_all_of_a_message_whose_task_it_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    def stop(*_: object) -> None:
        raise Empty

    message = SimpleNamespace(
        headers={"id": "1", "task": "unknown"},
        properties={},
        delivery_info={},
        body=SECRET,
        content_type="application/json",
        content_encoding="utf-8",
        reject_log_error=stop,
    )
    consumer = SimpleNamespace(connection_errors=())
    with caplog.at_level(logging.ERROR), pytest.raises(Empty):
        Consumer.on_unknown_task(consumer, SECRET, message, KeyError("unknown"))
    assert SECRET in caplog.text


def test_celery_sends_events_at_every_turn_of_the_loop_and_few_at_once() -> None:
    turns: list[object] = []
    Consumer.on_send_event_buffered(
        SimpleNamespace(hub=SimpleNamespace(call_soon=turns.append), _flush_events_promise="flush")
    )
    assert turns == ["flush"]
    assert inspect.signature(EventDispatcher).parameters["buffer_limit"].default == 24


def test_celery_leaves_acks_to_the_next_turn_of_the_loop() -> None:
    acks: list[str] = []
    consumer = SimpleNamespace(hub=SimpleNamespace(call_soon=lambda _: None))
    Consumer.call_soon_ack(consumer, acks.append, "acked")
    assert acks == []


def test_celery_asks_a_disabled_result_backend_for_states(app: Celery) -> None:
    with pytest.raises(NotImplementedError):
        DisabledBackend(app).get_state("1")


def test_celery_tells_the_password_of_a_socket_in_its_stats() -> None:
    connection = Connection("redis+socket://:s3cret@/run/redis.sock")
    told = ConnectionStep.info(None, SimpleNamespace(connection=connection))
    assert "s3cret" in told["broker"]["hostname"]
