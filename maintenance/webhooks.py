"""Sends webhooks, limiting the attempts per tenant and receiving host. Any number of processes may do so.

A host that is slow or down does not affect the others, nor a tenant with many such hosts the other tenants. Each round
is one transaction, which records the outcomes of earlier attempts and claims deliveries that are due. The attempts run
between rounds. Redis is not needed.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from domain.callbacks import URL_PREFIX
from domain.jobs import external_id
from domain.shares import NO_TENANT, SharedPlaces
from domain.webhooks import BadWebhookUrl, DeliveryStatus, payload, signature_headers
from maintenance.callbacks import CallbackPublisher
from metrics import webhook_attempt_seconds, webhook_attempts_total
from observability import describe_exception
from storage import webhook_deliveries
from storage.webhook_deliveries import ClaimedDelivery, Outcome
from tasks.tracing import job_span
from tasks.webhook_http import MAX_CONNECTIONS, TOTAL_SECONDS, TargetGuard, WebhookClient, WebhookResponse

log = logging.getLogger(__name__)

MAX_PER_HOST = 16

NUM_FAILURES_TO_OPEN = 3  # consecutive attempts without any HTTP answer

REST_SECONDS = 30.0

FORGET_SECONDS = 10 * REST_SECONDS  # after a host's last failure

MAX_FAILING = 10_000  # tenants' hosts whose failures are remembered, the latest ones


Queue = tuple[UUID, str]  # a tenant, and a receiving host


@dataclass(frozen=True, slots=True)
class Failures:
    count: int  # consecutive ones
    last_at: float

    def is_resting(self, clock: float) -> bool:
        return clock < self.last_at + REST_SECONDS


class Hosts:
    """Current attempts per tenant and host, with a circuit breaker: after a few consecutive failures a host gets a
    pause from this tenant, and then one attempt at a time until it answers. Values of `clock` are monotonic."""

    def __init__(self) -> None:
        self._num_in_hand: Counter[Queue] = Counter()
        self._failures: dict[Queue, Failures] = {}  # the latest ones last

    def begin(self, host: Queue) -> None:
        self._num_in_hand[host] += 1

    def end(self, host: Queue, clock: float, *, has_answered: bool) -> None:
        self._num_in_hand[host] -= 1
        if not self._num_in_hand[host]:
            del self._num_in_hand[host]
        before = self._failures.pop(host, None)
        if not has_answered:
            self._failures[host] = Failures(1 if before is None else before.count + 1, clock)
        self._forget(clock)

    def rooms(self, clock: float) -> dict[Queue, int]:
        """How many more attempts each host may get. Hosts that are not listed may get MAX_PER_HOST."""
        self._forget(clock)
        rooms = {host: max(0, MAX_PER_HOST - num) for host, num in self._num_in_hand.items()}
        for host, failures in self._failures.items():
            if failures.count >= NUM_FAILURES_TO_OPEN:
                rooms[host] = 0 if failures.is_resting(clock) or self._num_in_hand[host] else 1
        return rooms

    def _forget(self, clock: float) -> None:
        """Forget the oldest failures, so that memory stays bounded."""
        while self._failures:
            host, failures = next(iter(self._failures.items()))
            if len(self._failures) <= MAX_FAILING and clock <= failures.last_at + FORGET_SECONDS:
                return
            del self._failures[host]


POLL_SECONDS = 1.0  # how long an event may wait for an idle sender

LEASE_SECONDS = 3 * TOTAL_SECONDS  # after this, another sender takes over from one that has died

PAUSE_SECONDS = 5.0  # after a failure of the database

MAX_IN_HAND = MAX_CONNECTIONS  # of all tenants, which share them


class WebhookSender:
    """Sends webhooks on one event loop, from `run` until `stop`. `on_round` is called after each query for due
    deliveries, at least once every POLL_SECONDS."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        guard: TargetGuard,
        callbacks: CallbackPublisher,
        *,
        on_round: Callable[[], None] = lambda: None,
    ) -> None:
        self._sessions = sessions
        self._guard = guard
        self._callbacks = callbacks
        self._on_round = on_round
        self._client = WebhookClient(guard)
        self._hosts = Hosts()
        self._places = SharedPlaces(MAX_IN_HAND)
        self._attempts: set[asyncio.Task[None]] = set()
        self._outcomes: list[Outcome] = []  # not yet in SQL
        self._wakeup = asyncio.Event()
        self._is_stopping = False

    def stop(self) -> None:
        """Claim no more deliveries. Current attempts are finished and recorded."""
        self._is_stopping = True
        self._wakeup.set()

    async def run(self) -> None:
        try:
            while not self._is_stopping or self._attempts or self._outcomes:
                await self._round()
        finally:
            await self._client.aclose()
            await self._callbacks.aclose()

    async def _round(self) -> None:
        self._wakeup.clear()
        try:
            num_claimed = await self._record_and_claim()
        except (SQLAlchemyError, OSError) as exc:
            log.warning("webhooks paused, the database does not answer: %s", describe_exception(exc))
            if self._is_stopping:
                self._outcomes.clear()  # their leases will expire, so they are sent again
            await self._wait(PAUSE_SECONDS)
            return
        self._on_round()
        if not num_claimed:
            await self._wait(POLL_SECONDS)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wakeup.wait()

    async def _record_and_claim(self) -> int:
        outcomes = self._outcomes[:]
        async with self._sessions.begin() as session:
            claimed = await session.run_sync(self._exchange, outcomes)
        del self._outcomes[: len(outcomes)]
        for delivery in claimed:
            self._hosts.begin(delivery.queue)
            self._places.take(delivery.tenant_id)
            attempt = asyncio.create_task(self._attempt(delivery))
            self._attempts.add(attempt)
            attempt.add_done_callback(self._attempts.discard)
        return len(claimed)

    def _exchange(self, session: Session, outcomes: list[Outcome]) -> list[ClaimedDelivery]:
        webhook_deliveries.record(session, outcomes)
        if not webhook_deliveries.has_pending(session):
            return []
        return webhook_deliveries.claim(
            session,
            room=0 if self._is_stopping else MAX_IN_HAND - self._places.num_taken,
            room_per_tenant=self._places.room_of(NO_TENANT),
            room_by_tenant={tenant: self._places.room_of(tenant) for tenant in self._places.tenants()},
            room_per_host=MAX_PER_HOST,
            room_by_host=self._hosts.rooms(time.monotonic()),
            lease_seconds=LEASE_SECONDS,
        )

    async def _attempt(self, delivery: ClaimedDelivery) -> None:
        try:
            answer = await self._send(delivery)
        except Exception as exc:  # an outermost loop: a failed delivery must free its host's slot
            log.exception("a webhook could not be sent", extra={"delivery_id": external_id(delivery.id, "whd")})
            answer = WebhookResponse(None, describe_exception(exc), 0.0)
        is_silent = answer.status_code is None and answer.seconds > 0  # 0: no attempt was made
        self._places.leave(delivery.tenant_id)
        self._hosts.end(delivery.queue, time.monotonic(), has_answered=not is_silent)
        webhook_attempts_total.labels("delivered" if answer.is_success else "failed").inc()
        webhook_attempt_seconds.observe(answer.seconds)
        self._outcomes.append(judge(delivery, answer))
        self._wakeup.set()

    async def _send(self, delivery: ClaimedDelivery) -> WebhookResponse:
        if not delivery.secrets:
            return WebhookResponse(None, "the endpoint was deleted", 0.0)
        if delivery.url.startswith(URL_PREFIX):
            async with self._sessions() as session:
                callback = await session.run_sync(webhook_deliveries.callback_of, delivery.event_id)
            return await self._callbacks.publish(callback, delivery.event_id, delivery.traceparent)
        try:
            url = self._guard.parse(delivery.url)
        except BadWebhookUrl as exc:
            return WebhookResponse(None, f"the URL is refused: {exc}", 0.0)
        body = payload(delivery.event_id, delivery.type, delivery.created_at)
        headers = signature_headers(delivery.event_id, body, delivery.secrets, int(time.time()))
        if delivery.traceparent is not None:
            headers["traceparent"] = delivery.traceparent
        answer = await self._client.post(url, headers, body)
        error = None if answer.is_success else str(answer.status_code or "no answer")
        job_span("webhook", delivery.event_id, delivery.traceparent, seconds=answer.seconds, error=error)
        return answer


def judge(delivery: ClaimedDelivery, answer: WebhookResponse) -> Outcome:
    """The outcome of an attempt with this answer. Storage turns a pending one into a failure if its time is up."""
    is_over = answer.is_gone or not delivery.secrets
    status = DeliveryStatus.FAILED if is_over else DeliveryStatus.PENDING
    if answer.is_success:
        status = DeliveryStatus.DELIVERED
    return Outcome(delivery, status, answer.status_code, answer.error, answer.seconds, is_gone=answer.is_gone)
