"""The prefetch batching consumer: Celery's consumer with an exact credit. Its jobs survive broker outages.

The number of messages in hand follows the engine: as many as it could start now, plus a small look-ahead, so that a
freed slot can be filled between two steps. A message lets a job be claimed, and the claim decides which. The rest of
Celery (events, inspect, revoke) is unchanged.
"""

import os
import sys
import warnings
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

from celery import bootsteps, signals
from celery.apps.worker import Worker
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer
from celery.worker.consumer.heart import Heart
from celery.worker.consumer.tasks import Tasks

from gpu_worker.pool import EnginePool
from gpu_worker.transport import BulkChannel
from observability import describe_exception
from settings import PREFIX, Settings, get_settings, moved_servers
from tasks.app import VISIBILITY_TIMEOUT_SECONDS

logger = get_logger(__name__)

PATIENCE_SECONDS = 5.0


class BrokerOutage:
    """What to do about failed connection attempts. `leave` must give the worker's jobs back; it is called before the
    worker replaces itself."""

    def __init__(self, settings: Settings, leave: Callable[[], None]) -> None:
        self._settings = settings
        self._leave = leave
        self._since: float | None = None
        self._is_told = False

    def failed(self, exc: Exception) -> None:
        self._since = self._since or monotonic()
        if monotonic() - self._since < PATIENCE_SECONDS:
            return
        if not self._is_told:
            self._is_told = True
            logger.error(
                "cannot connect to Redis: %s; start it, set CELERIAC_REDIS_URL to another server, or start everything "
                "with `celeriac up`; still trying",
                describe_exception(exc),
            )
        if moved := moved_servers(self._settings.data_dir):
            logger.warning("`celeriac up` is now running with different servers; restarting to use those")
            self._leave()
            os.environ.update({PREFIX + name.upper(): url for name, url in moved.items()})
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606

    def ended(self) -> None:
        self._since, self._is_told = None, False


MAX_BUFFERED_EVENTS = 512

WATCH_SECONDS = 1.0

LOOK_SECONDS = 0.25  # between two checks for another worker with free slots, and for events to send
IDLE_LOOK_SECONDS = 1.0  # the former while this one has nothing to do; idle workers tell so for longer (IDLE_SECONDS)

MAX_LOOKAHEAD_SECONDS = 0.25  # how long a ticket may wait here while another worker has free slots

REFUSED_SECONDS = 1.0

STALL_SECONDS = 10.0  # a healthy consumer with credit checks its queue every second


class EngineConsumer(Consumer):
    """Celery's consumer for an EnginePool."""

    pool: EnginePool

    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **options: Any) -> None:
        # Workers share their state through SQL. Starts and reconnects are a second faster without mingle and gossip.
        alone = dict(worker_options or {}, without_mingle=True, without_gossip=True)
        super().__init__(*args, worker_options=alone, **options)
        self._outage = BrokerOutage(get_settings(), leave=self.pool.stop_runner)

    def on_send_event_buffered(self) -> None:
        """Does nothing, since a timer flushes events. Stock Celery publishes them at every turn of the event loop."""

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, retrying every 0.2 to 2 seconds. Stock Celery waits 2, 4, 6 and up to 30 seconds."""
        ensure = conn.ensure_connection

        def ensure_quickly(errback: Any, max_retries: Any, **options: Any) -> Any:
            def failed(exc: Exception, interval: float) -> None:
                errback(exc, interval)
                self._outage.failed(exc)

            quick = {"interval_start": 0.2, "interval_step": 0.2, "interval_max": 2}
            return ensure(failed, max_retries, **{**options, **quick})

        conn.ensure_connection = ensure_quickly
        connected = super().ensure_connected(conn)
        self._outage.ended()
        return connected

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Keep the tickets in hand. Stock Celery requeues them, and running jobs as well."""
        self.pool.deliveries.detach()
        self.hub.on_tick.clear()  # kombu adds one callback per connection and removes none
        if isinstance(exc, self.channel_errors):
            sleep(REFUSED_SECONDS)  # Redis answers but refuses (full, or a replica): do not retry in a tight loop
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Celery warns about a setting for late acks, which we do not use
            super().on_connection_error_after_connected(exc)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Reject the message like stock Celery, but do not log its body, which may contain somebody's prompt."""
        name, task_id = str(message.headers.get("task"))[:64], str(message.headers.get("id"))[:64]
        reason = f"there is no task called {name!r} here; submit jobs to the API (POST /v1/jobs)"
        logger.error("refused a task that did not come from the API: %s", reason, extra={"task_id": task_id})
        message.reject_log_error(logger, self.connection_errors)
        self.event_dispatcher.send("task-failed", uuid=task_id, exception=reason)


class EngineWorker(Worker):
    """`celery worker` for an EnginePool."""

    def on_consumer_ready(self, consumer: Any) -> None:
        """Stock Celery logs "ready" here, but our worker is ready only when its engine is."""
        signals.worker_ready.send(sender=consumer)
        logger.info("%s is connected and takes jobs as soon as its engine is ready", self.hostname)


class EngineStep(bootsteps.StartStopStep):
    """Connects the channel, the pool and the event loop with each other, after every connect."""

    requires = (Tasks, Heart)  # so that it stops before Heart, which sends worker-offline

    def __init__(self, c: EngineConsumer, **options: Any) -> None:
        super().__init__(c, **options)
        c.pool.consumer = c
        c.initial_prefetch_count = c.pool.limit + c.pool.lookahead  # what `inspect stats` shows; `room` decides
        self._num_takes_seen = 0
        self._stalled_since: float | None = None
        self._shared_at = 0.0

    def start(self, c: EngineConsumer) -> None:
        channel = c.task_consumer.channel
        channel.worker_name = c.hostname
        channel.room = c.pool.room
        c.event_dispatcher.buffer_limit = MAX_BUFFERED_EVENTS
        c.pool.deliveries.attach(channel, c.event_dispatcher)

    def stop(self, c: EngineConsumer) -> None:
        c._flush_events()  # events that cannot be sent now are passed on to the next dispatcher

    def register_with_event_loop(self, c: EngineConsumer, hub: Any) -> None:
        """Set up timers. Called after every connect, since the old connection's timers were cancelled with it."""
        channel = c.task_consumer.channel
        hub.on_tick.add(channel.refill)
        hub.call_repeatedly(VISIBILITY_TIMEOUT_SECONDS / 4, self._keep_in_hand, c)
        hub.call_repeatedly(WATCH_SECONDS, self._watch, c)
        hub.call_repeatedly(LOOK_SECONDS, self._look, c)  # one timer: each wakes the whole loop

    def info(self, c: EngineConsumer) -> dict[str, Any]:
        """Figures for `inspect stats`, which Flower shows on its "Other" tab."""
        return {"engine": c.pool.engine_figures()}

    def _keep_in_hand(self, c: EngineConsumer) -> None:
        held = c.pool.deliveries
        if held.in_hand and held.channel is not None:
            held.channel.keep_in_hand([ticket.tag for ticket in held.in_hand.values()])

    def _watch(self, c: EngineConsumer) -> None:
        channel = c.pool.deliveries.channel
        if channel is None:
            return
        c.pool.deliveries.repeat_lost_acks()
        self._notice_a_stall(c, channel)

    def _look(self, c: EngineConsumer) -> None:
        c._flush_events()
        self._share_lookahead(c.pool)

    def _share_lookahead(self, pool: EnginePool) -> None:
        """Pause the look-ahead and give back waiting tickets if another worker has free slots, so that none waits here
        needlessly."""
        channel = pool.deliveries.channel
        is_idle = not pool.deliveries.in_hand and not pool.deliveries.running
        if channel is None or (is_idle and monotonic() - self._shared_at < IDLE_LOOK_SECONDS):
            return
        self._shared_at = monotonic()
        pool.paused_lookaheads = channel.queues_of_idle_others()
        for queue in pool.paused_lookaheads:
            oldest = pool.deliveries.oldest_in_hand(queue)
            is_late = oldest is not None and oldest.age_seconds > MAX_LOOKAHEAD_SECONDS
            if is_late and pool.room(queue).num_idle == 0:
                logger.info("requeued %d messages, since another worker has free slots", pool.give_back_from(queue))

    def _notice_a_stall(self, c: EngineConsumer, channel: BulkChannel) -> None:
        """Raise ConnectionError, which makes Celery reconnect, if there is credit and messages are waiting but the
        queue has not been read for a long time, whatever the reason."""
        is_healthy = channel.num_takes != self._num_takes_seen or not channel.queues_with_room()
        self._num_takes_seen = channel.num_takes
        if is_healthy:
            self._stalled_since = None
            return
        self._stalled_since = self._stalled_since or monotonic()
        if monotonic() - self._stalled_since < STALL_SECONDS or not channel.num_waiting():
            return
        self._stalled_since = None
        raise ConnectionError(f"{c.hostname} has room but has taken no jobs for {STALL_SECONDS:.0f} s; reconnecting")
