"""A Celery worker pool whose slots are the engine's: deliveries in, ordered news of their jobs out.

Deliveries are offered to the `JobRunner`, which claims them in SQL when the engine has room and reports on its own
thread. Reports wait in an ordered queue, because Celery's hub keeps its callbacks in an unordered set, and are settled
on the hub thread, the only one that may touch requests, events and channels.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any
from uuid import UUID, uuid4

from celery.concurrency.base import BasePool, apply_target
from celery.utils.log import get_logger
from celery.worker import state

from domain.catalog import Catalog, ModelSpec
from gpu_worker.delivery import Delivery
from gpu_worker.job_runner import JobRunner
from gpu_worker.runner_events import RunnerEvent, RunnerEventKind
from gpu_worker.shutdown import Shutdown
from gpu_worker.transport import ClaimingChannel, Room
from settings import Settings, get_settings

logger = get_logger(__name__)

NO_ROOM = Room(credit=0, num_idle=0)


def served_model(settings: Settings) -> ModelSpec:
    """The one model that a GPU worker under these settings serves."""
    catalog = Catalog.load(settings.models_file)
    return catalog.default if settings.worker_model is None else catalog.get(settings.worker_model)


class EnginePool(BasePool):
    """Holds every delivery of this worker: in hand until claimed, running until its job ends here."""

    body_can_be_buffer = True
    task_join_will_block = False

    make_runner: Callable[..., JobRunner] = JobRunner

    def __init__(self, limit: int, **options: Any) -> None:
        super().__init__(limit, **options)
        settings = get_settings()
        self.lookahead = max(1, limit // 4) if settings.lookahead is None else settings.lookahead
        self.is_lookahead_paused = False
        self.is_draining = False
        self.in_hand: dict[UUID, Delivery] = {}  # in order of arrival
        self.running: dict[UUID, Delivery] = {}
        self.lost_acks: set[str] = set()  # sent while the connection was broken; repeated when it is back
        self.consumer: Any = None
        self.channel: ClaimingChannel | None = None  # None while there is no connection
        self.shutdown = Shutdown(self)
        self.runner = self.make_runner(
            model=served_model(settings).id,
            owner=uuid4(),
            hostname=options["initargs"][1],
            on_event=self._on_runner_event,
            on_unhealthy=self.shutdown.fail,
        )
        self._hub: Any = None
        self._events: deque[RunnerEvent] = deque()
        self._is_settling_due = False
        self._stop_lock = Lock()
        self._is_runner_stopped = False

    def on_start(self) -> None:
        self.runner.start()
        self.shutdown.install()

    # Credit

    def room(self) -> Room:
        """How many messages may be taken now: what the engine could start, and a little ahead of it."""
        if self.is_draining:
            return NO_ROOM
        num_free = self.runner.num_free
        if num_free <= 0 and (self.is_lookahead_paused or not self.runner.stats().is_engine_ready):
            return NO_ROOM
        num_in_hand = self.num_in_hand
        lookahead = 0 if self.is_lookahead_paused else self.lookahead
        return Room(max(num_free + lookahead - num_in_hand, 0), max(num_free - num_in_hand, 0))

    @property
    def num_in_hand(self) -> int:
        """Messages received and not acked."""
        unacked = self.channel.qos.num_unacked if self.channel is not None else 0
        return max(len(self.in_hand), unacked)

    # Deliveries in

    def on_apply(
        self,
        target: Any,
        args: Any = (),
        kwargs: Any = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> Any:
        delivery = getattr(accept_callback, "__self__", None)
        if isinstance(delivery, Delivery):
            self._take(delivery)
            return delivery
        return apply_target(target, args, kwargs, callback, accept_callback)  # a small housekeeping task runs here

    def _take(self, delivery: Delivery) -> None:
        try:
            job_id = delivery.job_id
        except ValueError as exc:
            logger.error("dropped a delivery: %s", exc)
            delivery.acknowledge()
            delivery.drop()
            return
        known = self.in_hand.get(job_id) or self.running.get(job_id)
        if known is not None:
            self._drop_duplicate(delivery, known)
            return
        self.in_hand[job_id] = delivery
        self.runner.offer(job_id)
        if delivery.id in state.revoked:
            self.cancel(delivery)

    def _drop_duplicate(self, duplicate: Delivery, known: Delivery) -> None:
        """The job is here already: one delivery is enough to carry its story."""
        duplicate.forget()
        state.requests[known.id] = known  # the duplicate had taken its place
        is_same_message = duplicate.tag == known.tag and not known.acknowledged
        if not is_same_message:
            duplicate.acknowledge()

    def cancel(self, delivery: Delivery) -> None:
        """Stop the job of a delivery, running or not: SQL hears of it, so it holds whoever runs the job."""
        delivery.is_cancel_wanted = True
        self.runner.cancel(delivery.job_id)

    def cancel_in_hand(self, task_ids: Iterable[str]) -> None:
        """A plain revoke: stops what has not begun, as in every Celery worker."""
        wanted = set(task_ids)
        for delivery in [held for held in self.in_hand.values() if held.id in wanted]:
            self.cancel(delivery)

    def give_back(self) -> int:
        """Put every delivery in hand whose claim has not begun back at the head of the queue. Hub thread."""
        withdrawn = [self.in_hand.pop(job_id) for job_id in self.runner.withdraw() if job_id in self.in_hand]
        for delivery in withdrawn:
            delivery.acknowledged = True  # it is not ours to ack any more
            delivery.forget()
        if self.channel is None or not withdrawn:
            return 0
        return self.channel.give_back([delivery.tag for delivery in withdrawn])

    # News out

    def _on_runner_event(self, event: RunnerEvent) -> None:
        """On the runner's thread."""
        self._events.append(event)
        if not self._is_settling_due and self._hub is not None:
            self._is_settling_due = True
            self._hub.call_soon(self.settle)

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub
        hub.call_soon(self.settle)

    def settle(self) -> None:
        """Act on all news so far, in order. Hub thread."""
        self._is_settling_due = False
        events = []
        while self._events:
            events.append(self._events.popleft())
        self._ack(events)
        for event in events:
            try:
                self._settle_one(event)
            except Exception:  # one job's trouble must not end the worker, which a hub callback's exception does
                logger.exception("could not settle %s of job %s", event.kind, event.job_id)

    def _ack(self, events: Iterable[RunnerEvent]) -> None:
        """Ack the messages of all jobs claimed or dropped, in one round trip."""
        settled = (RunnerEventKind.CLAIMED, RunnerEventKind.DROPPED)
        deliveries = [
            self.in_hand[event.job_id] for event in events if event.kind in settled and event.job_id in self.in_hand
        ]
        for delivery in deliveries:
            delivery.acknowledged = True
        self.ack_tags([delivery.tag for delivery in deliveries])

    def ack_tags(self, tags: list[str]) -> None:
        """Ack by tag, now or after the next reconnect. A lost ack costs a delivery that claims nothing."""
        if not tags:
            return
        if self.channel is None:
            self.lost_acks.update(tags)
            return
        try:
            self.channel.ack_many(tags)
        except (*self.channel.connection_errors, self.channel.ResponseError) as exc:
            logger.warning("could not ack %d messages, will repeat it: %s", len(tags), exc)
            self.lost_acks.update(tags)

    def _settle_one(self, event: RunnerEvent) -> None:
        if event.kind is RunnerEventKind.CLAIMED:
            delivery = self.in_hand.pop(event.job_id, None)
            if delivery is not None:
                self.running[event.job_id] = delivery
                delivery.start()
        elif event.kind is RunnerEventKind.DROPPED:
            delivery = self.in_hand.pop(event.job_id, None)
            if delivery is not None:
                delivery.drop()
        else:
            delivery = self.running.pop(event.job_id, None)
            if delivery is None:
                return  # claimed straight from SQL, without a delivery
            if event.kind is RunnerEventKind.RELEASED:
                delivery.release()
            elif event.status is not None:
                delivery.end(event.status, runtime_seconds=event.runtime_seconds, summary=event.summary)

    # The connection comes and goes; deliveries stay.

    def detach(self) -> None:
        """The connection broke. Deliveries in hand stay offered: their claim needs SQL alone."""
        channel, self.channel = self.channel, None
        if channel is None or channel._qos is None:
            return
        for delivery in self.in_hand.values():
            channel.qos._delivered.pop(delivery.tag, None)  # so that closing the channel does not requeue it

    def attach(self, channel: ClaimingChannel, event_dispatcher: Any) -> None:
        """A connection stands: the first one, or another one after a loss."""
        self.channel = channel
        for delivery in self.in_hand.values():
            delivery._message.channel = channel
            channel.qos._delivered[delivery.tag] = delivery._message
            state.task_reserved(delivery)  # Celery cleared its books
        for delivery in (*self.in_hand.values(), *self.running.values()):
            delivery.eventer = event_dispatcher  # the old one is closed; without this their ends are never told
        self.repeat_lost_acks()

    def repeat_lost_acks(self) -> None:
        tags, self.lost_acks = self.lost_acks, set()
        self.ack_tags(list(tags))

    # The end

    def begin_drain(self, *, release_after_seconds: float) -> None:
        """Take nothing more, give back what is in hand, let running jobs end. Any thread."""
        self.is_draining = True
        self.runner.begin_drain(release_after_seconds=release_after_seconds)
        if self._hub is not None:
            self._hub.call_soon(self.give_back)

    def wake_hub(self) -> None:
        """Make the event loop turn, so that it sees what another thread did."""
        if self._hub is not None:
            self._hub.call_soon(self.settle)

    def resume(self) -> None:
        """Undo begin_drain."""
        self.runner.resume()
        self.is_draining = False

    @property
    def is_drained(self) -> bool:
        """Nothing runs and all is told. Without a connection nothing can be told or given back. Any thread."""
        has_ended = self.runner.stats().num_running == 0
        return has_ended and (self.channel is None or not (self.running or self.in_hand))

    def stop_runner(self) -> None:
        """Release what runs and end the engine; once, whoever asks. Any thread."""
        with self._stop_lock:
            if not self._is_runner_stopped:
                self._is_runner_stopped = True
                self.runner.withdraw()  # closing the channel puts their messages back
                self.runner.stop(release=True)

    def on_stop(self) -> None:
        self.is_draining = True
        self.stop_runner()
        self.settle()
        if self.consumer is not None:
            self.consumer.flush_events()

    on_terminate = on_stop

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """There is no process to signal; `Delivery.terminate` does the work."""

    # Flower

    def grow(self, n: int = 1) -> None:
        raise ValueError(f"the engine has {self.limit} slots; set max_num_seqs in models.toml and restart the worker")

    shrink = grow

    def _get_info(self) -> dict[str, Any]:
        stats = self.runner.stats()
        return {
            **super()._get_info(),
            "processes": [os.getpid()],
            "slots-running": stats.num_running,
            "slots-free": self.runner.num_free,
            "in-hand": self.num_in_hand,
            "look-ahead": self.lookahead,
            "engine-ready": stats.is_engine_ready,
            "draining": self.is_draining,
        }
