"""All deliveries of this worker: in hand until their jobs are claimed, then running until the jobs end here.

A delivery is one `generate` message. Deliveries outlive the connection on which they arrived, since they are acked by
tag, which Redis accepts from any connection.
"""

import os
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Any
from uuid import UUID

from celery import Celery
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request
from kombu.message import Message

from domain.jobs import JobStatus, external_id, parse_id
from gpu_worker.threads import RunnerEvent, RunnerEventKind
from gpu_worker.transport import BulkChannel
from tasks.messages import GENERATE

logger = get_logger(__name__)


class Delivery(Request):
    """Celery's request, but accepted, cancelled and ended by the rules of the job protocol. Hub thread only.

    It is acked once the claim of its job is committed. From then on we own the job through its lease, and the delivery
    only serves to report the job to Flower.
    """

    acknowledged: bool = False
    is_cancel_wanted = False  # whether it was revoked here, so that its end must be reported as revoked

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.received_at = monotonic()

    @classmethod
    def without_message(cls, job_id: UUID, **options: Any) -> "Delivery":
        """A delivery for a job claimed directly from SQL, so that Flower shows and cancels it like any other."""
        headers = {"id": external_id(job_id), "task": GENERATE, "argsrepr": "()", "kwargsrepr": "{}"}
        message = Message(headers=headers, properties={}, delivery_info={}, delivery_tag="")
        delivery = cls(message, headers=headers, body=([], {}, {}), decoded=True, **options)
        delivery.acknowledged = True
        return delivery

    @property
    def job_id(self) -> UUID:
        """The task id as a job id. Raises ValueError if it is not one."""
        return parse_id(self.id)

    @property
    def tag(self) -> str:
        return str(self._message.delivery_tag)

    @property
    def queue(self) -> str:
        """The queue from which it came; empty for a job without a message."""
        return str(self._message.delivery_info.get("routing_key", ""))

    @property
    def age_seconds(self) -> float:
        return monotonic() - self.received_at

    def revoked(self) -> bool:
        """Always False: the pool cancels the job in SQL, and `end` reports it as revoked when it has ended."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Called for a revoke with `terminate` from Flower or `celery control`."""
        pool.cancel(self)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Does nothing. Celery calls this in a cold shutdown, in which our jobs are released to continue elsewhere."""

    def acknowledge(self) -> None:
        # Stock Celery acks at the next turn of the event loop, which may be a second away.
        if not self.acknowledged:
            self.acknowledged = True
            self._message.ack_log_error(logger, self._connection_errors)

    def receive(self) -> None:
        """For a job without a message, do what Celery does when a message arrives."""
        state.task_reserved(self)
        self.send_event("task-received", name=self.name, args=self.argsrepr, kwargs=self.kwargsrepr, retries=0)

    def start(self) -> None:
        """Call when the claim has been committed."""
        self.on_accepted(os.getpid(), monotonic())

    def end(self, status: JobStatus, *, runtime_seconds: float, summary: str) -> None:
        """Call when the job is terminal in SQL."""
        state.task_ready(self, successful=status is JobStatus.COMPLETED)
        if status is JobStatus.COMPLETED:
            self.send_event("task-succeeded", result=summary, runtime=runtime_seconds)
        elif status is JobStatus.FAILED:
            self.send_event("task-failed", exception=summary, traceback="")
        else:
            self._announce_end_without_result(is_expired=status is JobStatus.EXPIRED)

    def drop(self) -> None:
        """Call if there was nothing to claim: the job has ended, or another worker owns it."""
        state.task_ready(self)
        if self.is_cancel_wanted:
            self._announce_end_without_result(is_expired=False)
        else:
            self.send_event("task-rejected", requeue=False)

    def refuse(self, reason: str) -> None:
        """Fail a message that does not belong to any job, so that its sender finds a failed task in Flower."""
        state.task_ready(self)
        self.send_event("task-failed", exception=reason, traceback="")

    def release(self) -> None:
        """Call when the job was requeued or has another owner. Flower then shows it as waiting for a retry."""
        state.task_ready(self)
        self.send_event("task-retried", exception="released", traceback="")

    def forget(self) -> None:
        """Drop a delivery whose message is back in its queue, or which was a duplicate."""
        state.task_ready(self)

    def _announce_end_without_result(self, *, is_expired: bool) -> None:
        self.send_event("task-revoked", terminated=not is_expired, signum="SIGTERM", expired=is_expired)


MAX_ID_CHARS = 64  # how much of an invalid id is logged


class Deliveries:
    """All deliveries of one worker. Hub thread only, except that other threads may check whether there are any."""

    def __init__(self, app: Celery, hostname: str) -> None:
        self._app = app
        self._hostname = hostname
        self._event_dispatcher: Any = None
        self.in_hand: dict[UUID, Delivery] = {}  # in order of arrival
        self.running: dict[UUID, Delivery] = {}
        self.channel: BulkChannel | None = None  # None while there is no connection
        self.lost_acks: set[str] = set()  # delivery tags whose acks are sent again once there is a connection

    def num_in_hand(self, queue: str) -> int:
        """The number of messages received from this queue but not acked."""
        unacked = self.channel.qos.num_unacked if self.channel is not None else 0
        return max(len(self.in_hand), unacked) - sum(held.queue != queue for held in self.in_hand.values())

    def oldest_in_hand(self, queue: str) -> Delivery | None:
        return next((held for held in self.in_hand.values() if held.queue == queue), None)

    def take(self, delivery: Delivery) -> UUID | None:
        """Keep a new delivery and return its job's id; None if it is a duplicate or does not belong to any job."""
        try:
            job_id = delivery.job_id
        except ValueError:
            reason = f"{delivery.id[:MAX_ID_CHARS]!r} is not a job id; submit jobs to the API (POST /v1/jobs)"
            logger.error("refused a task that did not come from the API: %s", reason)
            delivery.acknowledge()
            delivery.refuse(reason)
            return None
        known = self.in_hand.get(job_id) or self.running.get(job_id)
        if known is not None:
            self._drop_duplicate(delivery, known)
            return None
        self.in_hand[job_id] = delivery
        return job_id

    def apply(self, events: Sequence[RunnerEvent]) -> None:
        """Act on the runner's events, in order."""
        self._ack_claimed(events)
        self.give_back([event.job_id for event in events if event.kind is RunnerEventKind.REFUSED])
        for event in events:
            try:
                self._apply_one(event)
            except Exception:  # an exception in a hub callback would end the worker and interrupt all other jobs
                logger.exception("could not apply the event %s of job %s", event.kind, event.job_id)

    def give_back(self, job_ids: Iterable[UUID]) -> int:
        """Requeue these deliveries at the head of their queue, in the same order. Returns how many were requeued."""
        given = [self.in_hand.pop(job_id) for job_id in job_ids if job_id in self.in_hand]
        for delivery in given:
            delivery.acknowledged = True  # the message is no longer ours, so it must not be acked
            delivery.forget()
        if self.channel is None or not given:
            return 0
        return self.channel.give_back([delivery.tag for delivery in given])

    def detach(self) -> None:
        """Call when the connection is lost. Deliveries in hand stay offered, since claiming them needs only SQL."""
        channel, self.channel = self.channel, None
        if channel is None or channel._qos is None:
            return
        for delivery in self.in_hand.values():
            channel.qos._delivered.pop(delivery.tag, None)  # otherwise, closing the channel would requeue it

    def attach(self, channel: BulkChannel, event_dispatcher: Any) -> None:
        """Call when there is a connection: the first one, or a new one after a loss."""
        self.channel, self._event_dispatcher = channel, event_dispatcher
        for delivery in self.in_hand.values():
            delivery._message.channel = channel
            channel.qos._delivered[delivery.tag] = delivery._message
            state.task_reserved(delivery)  # Celery has forgotten it together with the old connection
        for delivery in (*self.in_hand.values(), *self.running.values()):
            delivery.eventer = event_dispatcher  # the old one is closed; events of these deliveries would be lost
        self.repeat_lost_acks()

    def repeat_lost_acks(self) -> None:
        tags, self.lost_acks = self.lost_acks, set()
        self._ack(list(tags))

    def _drop_duplicate(self, duplicate: Delivery, known: Delivery) -> None:
        duplicate.forget()
        state.requests[known.id] = known  # Celery has replaced it by the duplicate
        is_same_message = duplicate.tag == known.tag and not known.acknowledged
        if not is_same_message:
            duplicate.acknowledge()

    def _ack_claimed(self, events: Iterable[RunnerEvent]) -> None:
        """Ack the messages of all jobs claimed or dropped, in one round trip."""
        acked_kinds = (RunnerEventKind.CLAIMED, RunnerEventKind.DROPPED)
        job_ids = [event.job_id for event in events if event.kind in acked_kinds]
        deliveries = [self.in_hand[job_id] for job_id in job_ids if job_id in self.in_hand]
        for delivery in deliveries:
            delivery.acknowledged = True
        self._ack([delivery.tag for delivery in deliveries])

    def _ack(self, tags: list[str]) -> None:
        """Ack now, or after the next reconnect. A lost ack does no harm: the message is delivered again, and then there
        is nothing to claim."""
        if not tags:
            return
        if self.channel is None:
            self.lost_acks.update(tags)
            return
        try:
            self.channel.ack_many(tags)
        except (*self.channel.connection_errors, self.channel.ResponseError) as exc:
            logger.warning("could not ack %d messages; will retry: %s", len(tags), exc)
            self.lost_acks.update(tags)

    def _apply_one(self, event: RunnerEvent) -> None:
        if event.kind is RunnerEventKind.CLAIMED:
            self._start(event.job_id)
        elif event.kind is RunnerEventKind.DROPPED and event.job_id in self.in_hand:
            self.in_hand.pop(event.job_id).drop()
        elif event.kind is RunnerEventKind.RELEASED and event.job_id in self.running:
            self.running.pop(event.job_id).release()
        elif event.kind is RunnerEventKind.ENDED and event.job_id in self.running and event.status is not None:
            delivery = self.running.pop(event.job_id)
            delivery.end(event.status, runtime_seconds=event.runtime_seconds, summary=event.summary)

    def _start(self, job_id: UUID) -> None:
        if job_id in self.running:
            return  # it was claimed directly from SQL before its message arrived
        delivery = self.in_hand.pop(job_id, None) or self._deliver_from_sql(job_id)
        self.running[job_id] = delivery
        delivery.start()

    def _deliver_from_sql(self, job_id: UUID) -> Delivery:
        delivery = Delivery.without_message(
            job_id,
            app=self._app,
            task=self._app.tasks[GENERATE],
            hostname=self._hostname,
            eventer=self._event_dispatcher,
        )
        delivery.receive()
        return delivery
