"""What this worker has from Celery: tickets in hand until they are used, and tasks, one for each job that runs here.

A ticket is a `generate` message; it lets one job be claimed, whichever is next, so its own id is not shown to anybody.
The job that a claim finds becomes a task of Celery's: received, started and ended under the job's id. Tickets outlive
the connection on which they arrived, since they are acked by tag, which Redis accepts from any connection.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

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


@dataclass(frozen=True, slots=True)
class Ticket:
    """A message that lets one job be claimed. It is acked once that claim is committed."""

    message: Message
    id: UUID = field(default_factory=uuid4)
    received_at: float = field(default_factory=monotonic)

    @property
    def tag(self) -> str:
        return str(self.message.delivery_tag)

    @property
    def queue(self) -> str:
        return str(self.message.delivery_info["routing_key"])

    @property
    def age_seconds(self) -> float:
        return monotonic() - self.received_at


def strategy(task: Any, app: Any, consumer: Any, **_: Any) -> Callable[..., None]:
    """What Celery does with a message of `generate`: its own strategy would show the message as a task received."""

    def take(message: Message, *_: Any, **__: Any) -> None:
        consumer.pool.take_ticket(message)

    return take


class ClaimedTask(Request):
    """A job that this worker has claimed, as Celery's request: Flower shows and cancels it like any other. It is
    cancelled and ended by the rules of the job protocol. Hub thread only."""

    @classmethod
    def of_job(cls, job_id: UUID, **options: Any) -> "ClaimedTask":
        headers = {"id": external_id(job_id), "task": GENERATE, "argsrepr": "()", "kwargsrepr": "{}"}
        message = Message(headers=headers, properties={}, delivery_info={}, delivery_tag="")
        task = cls(message, headers=headers, body=([], {}, {}), decoded=True, **options)
        task.acknowledged = True
        return task

    def revoked(self) -> bool:
        """Always False: the pool cancels the job in SQL, and `end` reports it as revoked when it has ended."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Called for a revoke with `terminate` from Flower or `celery control`."""
        pool.cancel(parse_id(self.id))

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Does nothing. Celery calls this in a cold shutdown, in which our jobs are released to continue elsewhere."""

    def start(self) -> None:
        """Call when the claim has been committed. Reports what Celery reports when a message arrives, and when it is
        accepted."""
        state.task_reserved(self)
        self.send_event("task-received", name=self.name, args=self.argsrepr, kwargs=self.kwargsrepr, retries=0)
        self.on_accepted(os.getpid(), monotonic())

    def end(self, status: JobStatus, *, runtime_seconds: float, summary: str) -> None:
        """Call when the job is terminal in SQL."""
        state.task_ready(self, successful=status is JobStatus.COMPLETED)
        if status is JobStatus.COMPLETED:
            self.send_event("task-succeeded", result=summary, runtime=runtime_seconds)
        elif status is JobStatus.FAILED:
            self.send_event("task-failed", exception=summary, traceback="")
        else:
            is_expired = status is JobStatus.EXPIRED
            self.send_event("task-revoked", terminated=not is_expired, signum="SIGTERM", expired=is_expired)

    def release(self) -> None:
        """Call when the job was requeued or has another owner. Flower then shows it as waiting for a retry."""
        state.task_ready(self)
        self.send_event("task-retried", exception="released", traceback="")


MAX_ID_CHARS = 64  # how much of an invalid id is logged


def job_id_of(task_id: str) -> UUID | None:
    """None if it is not the id of a job."""
    try:
        return parse_id(task_id)
    except ValueError:
        return None


class Deliveries:
    """The tickets and tasks of one worker. Hub thread only, except that other threads may check whether there are
    any."""

    def __init__(self, app: Celery, hostname: str, cancel: Callable[[UUID], None]) -> None:
        self._app = app
        self._hostname = hostname
        self._cancel = cancel
        self._event_dispatcher: Any = None
        self.in_hand: dict[UUID, Ticket] = {}  # in order of arrival, by the tickets' ids
        self.running: dict[UUID, ClaimedTask] = {}  # by the jobs' ids
        self.channel: BulkChannel | None = None  # None while there is no connection
        self.lost_acks: set[str] = set()  # delivery tags whose acks are sent again once there is a connection

    def num_in_hand(self, queue: str) -> int:
        """The number of messages received from this queue but not acked."""
        unacked = self.channel.qos.num_unacked if self.channel is not None else 0
        return max(len(self.in_hand), unacked) - sum(held.queue != queue for held in self.in_hand.values())

    def oldest_in_hand(self, queue: str) -> Ticket | None:
        return next((held for held in self.in_hand.values() if held.queue == queue), None)

    def take(self, message: Message) -> Ticket | None:
        """Keep a new ticket; None if the message does not come from the API."""
        ticket = Ticket(message)
        task_id = str(message.headers.get("id"))
        if job_id_of(task_id) is None:
            self._refuse(ticket, task_id)
            return None
        self.in_hand[ticket.id] = ticket
        return ticket

    def apply(self, events: Sequence[RunnerEvent]) -> None:
        """Act on the runner's events, in order."""
        self._ack_spent(events)
        self.give_back([event.job_id for event in events if event.kind is RunnerEventKind.REFUSED])
        for event in events:
            try:
                self._apply_one(event)
            except Exception:  # an exception in a hub callback would end the worker and interrupt all other jobs
                logger.exception("could not apply the event %s of job %s", event.kind, event.job_id)

    def give_back(self, ticket_ids: Iterable[UUID]) -> int:
        """Requeue these tickets at the head of their queue, in the same order. Returns how many were requeued."""
        given = [self.in_hand.pop(ticket_id) for ticket_id in ticket_ids if ticket_id in self.in_hand]
        if self.channel is None or not given:
            return 0
        return self.channel.give_back([ticket.tag for ticket in given])

    def detach(self) -> None:
        """Call when the connection is lost. Tickets in hand stay offered, since using them needs only SQL."""
        channel, self.channel = self.channel, None
        if channel is None or channel._qos is None:
            return
        for ticket in self.in_hand.values():
            channel.qos._delivered.pop(ticket.tag, None)  # otherwise, closing the channel would requeue it

    def attach(self, channel: BulkChannel, event_dispatcher: Any) -> None:
        """Call when there is a connection: the first one, or a new one after a loss."""
        self.channel, self._event_dispatcher = channel, event_dispatcher
        for ticket in self.in_hand.values():
            ticket.message.channel = channel
            channel.qos._delivered[ticket.tag] = ticket.message
        for task in self.running.values():
            task.eventer = event_dispatcher  # the old one is closed; events of these tasks would be lost
        self.repeat_lost_acks()

    def repeat_lost_acks(self) -> None:
        tags, self.lost_acks = self.lost_acks, set()
        self._ack(list(tags))

    def _refuse(self, ticket: Ticket, task_id: str) -> None:
        """Fail a message that does not come from the API, so that its sender finds a failed task in Flower."""
        reason = f"{task_id[:MAX_ID_CHARS]!r} is not a job id; submit jobs to the API (POST /v1/jobs)"
        logger.error("refused a task that did not come from the API: %s", reason)
        self._ack([ticket.tag])
        self._event_dispatcher.send("task-failed", uuid=task_id, exception=reason)

    def _ack_spent(self, events: Iterable[RunnerEvent]) -> None:
        """Ack all tickets that have been used, in one round trip."""
        spent = [event.job_id for event in events if event.kind is RunnerEventKind.SPENT]
        self._ack([self.in_hand.pop(ticket_id).tag for ticket_id in spent if ticket_id in self.in_hand])

    def _ack(self, tags: list[str]) -> None:
        """Ack now, or after the next reconnect. A lost ack does no harm: the ticket comes again, and is used again."""
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
        elif event.kind is RunnerEventKind.RELEASED and event.job_id in self.running:
            self.running.pop(event.job_id).release()
        elif event.kind is RunnerEventKind.ENDED and event.job_id in self.running and event.status is not None:
            task = self.running.pop(event.job_id)
            task.end(event.status, runtime_seconds=event.runtime_seconds, summary=event.summary)

    def _start(self, job_id: UUID) -> None:
        if job_id in self.running:
            return  # a later attempt, whose predecessor ended without our noticing
        self.running[job_id] = task = ClaimedTask.of_job(
            job_id,
            app=self._app,
            task=self._app.tasks[GENERATE],
            hostname=self._hostname,
            eventer=self._event_dispatcher,
        )
        task.start()
        if task.id in state.revoked:  # while its claim was being committed
            self._cancel(job_id)
