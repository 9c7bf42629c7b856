"""A delivery: one message of `generate` in this worker's hands, from its receipt to the end of its job here."""

import os
from time import monotonic
from typing import Any
from uuid import UUID

from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request
from kombu.message import Message

from domain.ids import external_id, parse_id
from domain.jobs import JobStatus
from tasks.messages import GENERATE

logger = get_logger(__name__)


class Delivery(Request):
    """Celery's request, with the job protocol's idea of accepting, cancelling and ending. Hub thread only.

    It is acked when its job's claim committed. From then on the job is ours by its lease, and the delivery only carries
    the job's story to Flower.
    """

    acknowledged: bool = False
    is_cancel_wanted = False  # a revoke reached it here: its end is reported as revoked

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.received_at = monotonic()

    @classmethod
    def without_message(cls, job_id: UUID, **options: Any) -> "Delivery":
        """For a job that came straight from SQL: Flower shows and cancels it like any other."""
        headers = {"id": external_id(job_id), "task": GENERATE, "argsrepr": "()", "kwargsrepr": "{}"}
        message = Message(headers=headers, properties={}, delivery_info={}, delivery_tag="")
        delivery = cls(message, headers=headers, body=([], {}, {}), decoded=True, **options)
        delivery.acknowledged = True
        return delivery

    @property
    def job_id(self) -> UUID:
        """Raises ValueError where the task id is no job's."""
        return parse_id(self.id)

    @property
    def tag(self) -> str:
        return str(self._message.delivery_tag)

    @property
    def age_seconds(self) -> float:
        return monotonic() - self.received_at

    def revoked(self) -> bool:
        """Never here: the pool cancels the job in SQL first, and its end is announced when it is true."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """A revoke with `terminate`, from Flower or `celery control`."""
        pool.cancel(self)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Celery cancels its requests at a cold shutdown; our jobs are released instead, and go on elsewhere."""

    def acknowledge(self) -> None:
        # Stock hands the ack to the event loop's next turn, up to a second away.
        if not self.acknowledged:
            self.acknowledged = True
            self._message.ack_log_error(logger, self._connection_errors)

    def receive(self) -> None:
        """What Celery does when a message arrives; for one that never did."""
        state.task_reserved(self)
        self.send_event("task-received", name=self.name, args=self.argsrepr, kwargs=self.kwargsrepr, retries=0)

    def start(self) -> None:
        """The claim committed."""
        self.on_accepted(os.getpid(), monotonic())

    def end(self, status: JobStatus, *, runtime_seconds: float, summary: str) -> None:
        """The job is terminal in SQL."""
        state.task_ready(self, successful=status is JobStatus.COMPLETED)
        if status is JobStatus.COMPLETED:
            self.send_event("task-succeeded", result=summary, runtime=runtime_seconds)
        elif status is JobStatus.FAILED:
            self.send_event("task-failed", exception=summary, traceback="")
        else:
            self._announce_end_without_result(is_expired=status is JobStatus.EXPIRED)

    def drop(self) -> None:
        """There was nothing to claim: the job is done, cancelled or somebody else's."""
        state.task_ready(self)
        if self.is_cancel_wanted:
            self._announce_end_without_result(is_expired=False)
        else:
            self.send_event("task-rejected", requeue=False)

    def refuse(self, reason: str) -> None:
        """It is no job's: whoever sent it by hand finds a failed task in Flower, or by its event."""
        state.task_ready(self)
        self.send_event("task-failed", exception=reason, traceback="")

    def release(self) -> None:
        """The job went back to SQL, or another owner has it; Flower shows it as waiting for another start."""
        state.task_ready(self)
        self.send_event("task-retried", exception="released", traceback="")

    def forget(self) -> None:
        """The message is back in its queue, or another delivery of the same job is here."""
        state.task_ready(self)

    def _announce_end_without_result(self, *, is_expired: bool) -> None:
        self.send_event("task-revoked", terminated=not is_expired, signum="SIGTERM", expired=is_expired)
