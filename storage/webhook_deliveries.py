"""Webhook deliveries: claimed by a sender, recorded with their outcome, listed, requested again.

A claim moves `next_attempt_at` to the end of its lease and increments the number of attempts. That number is the fence
for recording the outcome. Deliveries of a dead sender become due again. Only the database's clock is used.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from domain.callbacks import CeleryCallback
from domain.webhooks import RETRY_HOURS, RETRY_SECONDS, DeliveryStatus
from storage import webhooks
from storage.job_statements import CLOCK
from storage.tables import JobPayload
from storage.webhooks import WebhookAttempt, WebhookDelivery

KEPT_DAYS = 7
GONE = "the receiver answered 410 (gone)"

HAS_PENDING = text("SELECT EXISTS (SELECT FROM webhook_deliveries WHERE status = 'pending')")

# Skips through the index from one queue with pending deliveries to the next, and takes the head of each. A queue is
# what one tenant has for one host, so that ten thousand deliveries do not delay those for another host or of another
# tenant.
CLAIM = text(f"""
WITH RECURSIVE queues(host, tenant_id) AS (
    (SELECT host, tenant_id FROM webhook_deliveries WHERE status = 'pending' ORDER BY host, tenant_id LIMIT 1)
    UNION ALL
    SELECT n.host, n.tenant_id FROM queues q CROSS JOIN LATERAL (
        SELECT d.host, d.tenant_id FROM webhook_deliveries d
        WHERE d.status = 'pending' AND (d.host, d.tenant_id) > (q.host, q.tenant_id)
        ORDER BY d.host, d.tenant_id LIMIT 1) n
),
busy AS (SELECT * FROM unnest(CAST(:queue_tenants AS uuid[]), CAST(:hosts AS text[]), CAST(:rooms AS int[]))
    AS b(tenant_id, host, room)),
shares AS (SELECT * FROM unnest(CAST(:tenants AS uuid[]), CAST(:tenant_rooms AS int[])) AS s(tenant_id, room)),
heads AS (
    SELECT d.id, d.next_attempt_at, q.tenant_id,
        row_number() OVER (PARTITION BY q.tenant_id ORDER BY d.next_attempt_at) AS turn
    FROM queues q LEFT JOIN busy USING (host, tenant_id) CROSS JOIN LATERAL (
        SELECT id, next_attempt_at FROM webhook_deliveries w
        WHERE w.host = q.host AND w.tenant_id = q.tenant_id AND w.status = 'pending' AND w.next_attempt_at <= {CLOCK}
        ORDER BY w.next_attempt_at LIMIT coalesce(busy.room, :room_per_host)) d
),
due AS (
    SELECT heads.id FROM heads LEFT JOIN shares USING (tenant_id)
    WHERE heads.turn <= coalesce(shares.room, :room_per_tenant)
    ORDER BY heads.turn, heads.next_attempt_at LIMIT :room
),
pick AS MATERIALIZED (
    SELECT d.id FROM due CROSS JOIN LATERAL (
        SELECT * FROM webhook_deliveries w WHERE w.id = due.id FOR NO KEY UPDATE SKIP LOCKED) d
    WHERE d.status = 'pending' AND d.next_attempt_at <= {CLOCK}
),
claimed AS (
    UPDATE webhook_deliveries d SET num_attempts = d.num_attempts + 1,
        next_attempt_at = {CLOCK} + make_interval(secs => :lease_seconds)
    FROM pick WHERE d.id = pick.id RETURNING d.*
)
SELECT c.id, c.tenant_id, c.event_id, c.type, c.created_at, c.endpoint_id, c.url, c.host, c.num_attempts,
    c.num_attempts - c.num_attempts_before AS num_tries, {CLOCK} AS now, coalesce(p.secret, s.secret) AS secret,
    CASE WHEN coalesce(p.previous_secret_expires_at, s.previous_secret_expires_at) > {CLOCK}
        THEN coalesce(p.previous_secret, s.previous_secret) END AS previous_secret,
    (SELECT j.traceparent FROM job_payloads j WHERE j.job_id = c.event_id) AS traceparent
FROM claimed c LEFT JOIN webhook_endpoints p ON p.id = c.endpoint_id AND p.tenant_id = c.tenant_id
LEFT JOIN webhook_secrets s ON c.endpoint_id IS NULL AND s.tenant_id = c.tenant_id
""")  # noqa: S608  (CLOCK is a constant)

RECORD = text(f"""
WITH outcome AS MATERIALIZED (
    SELECT * FROM unnest(
        CAST(:ids AS uuid[]), CAST(:attempts AS int[]), CAST(:verdicts AS text[]), CAST(:status_codes AS int[]),
        CAST(:errors AS text[]), CAST(:seconds AS float8[]), CAST(:delays AS float8[]))
        AS o(id, attempt, verdict, status_code, error, seconds, delay)
),
logged AS (
    INSERT INTO webhook_attempts (delivery_id, number, attempted_at, seconds, status_code, error)
    SELECT o.id, o.attempt, {CLOCK} - make_interval(secs => o.seconds), o.seconds, o.status_code, o.error
    FROM outcome o JOIN webhook_deliveries d USING (id) ON CONFLICT DO NOTHING
)
UPDATE webhook_deliveries d SET last_status_code = o.status_code, last_error = o.error,
    next_attempt_at = {CLOCK} + make_interval(secs => o.delay),
    delivered_at = CASE WHEN o.verdict = 'delivered' THEN {CLOCK} END,
    status = CASE WHEN o.verdict = 'pending' AND {CLOCK} + make_interval(secs => o.delay) > d.retry_until
        THEN 'failed' ELSE o.verdict END
FROM outcome o WHERE d.id = o.id AND d.num_attempts = o.attempt AND d.status = 'pending'
RETURNING d.id, d.status
""")  # noqa: S608  (CLOCK is a constant)

BACKLOG = text(f"""
SELECT count(*) AS num_pending,
    greatest(0, coalesce(extract(epoch FROM {CLOCK} - min(next_attempt_at)), 0))::float8 AS oldest_due_seconds
FROM webhook_deliveries WHERE status = 'pending'
""")  # noqa: S608  (CLOCK is a constant)


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """An attempt that this sender must make. `secrets` are those to sign it with, newest first; empty if the endpoint
    was deleted."""

    id: UUID
    tenant_id: UUID
    event_id: UUID
    type: str
    created_at: datetime
    endpoint_id: UUID | None
    url: str
    host: str
    attempt: int
    num_tries: int  # attempts since it was last requested, including this one
    now: datetime
    secrets: tuple[str, ...]
    traceparent: str | None = None  # of the job that ended, to send on

    @property
    def queue(self) -> tuple[UUID, str]:
        return self.tenant_id, self.host


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an attempt. A `status` of PENDING means that it will be retried."""

    delivery: ClaimedDelivery
    status: DeliveryStatus
    status_code: int | None
    error: str | None
    seconds: float
    is_gone: bool = False


def claim(
    session: Session,
    *,
    room: int,
    room_per_tenant: int,
    room_by_tenant: Mapping[UUID, int],
    room_per_host: int,
    room_by_host: Mapping[tuple[UUID, str], int],
    lease_seconds: float,
) -> list[ClaimedDelivery]:
    """Claim up to `room` due deliveries, in turns of their tenants. For each tenant, at most its entry in
    `room_by_tenant`, else `room_per_tenant`; for each host of a tenant, its entry in `room_by_host`, else
    `room_per_host`."""
    if room <= 0:
        return []
    parameters = {
        "room": room,
        "room_per_tenant": room_per_tenant,
        "tenants": list(room_by_tenant),
        "tenant_rooms": list(room_by_tenant.values()),
        "room_per_host": room_per_host,
        "queue_tenants": [tenant_id for tenant_id, _ in room_by_host],
        "hosts": [host for _, host in room_by_host],
        "rooms": list(room_by_host.values()),
        "lease_seconds": lease_seconds,
    }
    return [
        ClaimedDelivery(
            id=row.id,
            tenant_id=row.tenant_id,
            event_id=row.event_id,
            type=row.type,
            created_at=row.created_at,
            endpoint_id=row.endpoint_id,
            url=row.url,
            host=row.host,
            attempt=row.num_attempts,
            num_tries=row.num_tries,
            now=row.now,
            secrets=_secrets(session, row.tenant_id, row.endpoint_id, (row.secret, row.previous_secret)),
            traceparent=row.traceparent,
        )
        for row in session.execute(CLAIM, parameters).all()
    ]


def _secrets(
    session: Session, tenant_id: UUID, endpoint_id: UUID | None, stored: tuple[str | None, str | None]
) -> tuple[str, ...]:
    """The secrets to sign with, newest first. A tenant without a secret gets one now."""
    found = tuple(secret for secret in stored if secret is not None)
    if found or endpoint_id is not None:
        return found
    return (webhooks.tenant_secret(session, tenant_id).secret,)


def callback_of(session: Session, job_id: UUID) -> CeleryCallback | None:
    """The Celery message of a job; None if the job was deleted."""
    return session.scalar(select(JobPayload.callback).where(JobPayload.job_id == job_id))


def record(session: Session, outcomes: Sequence[Outcome]) -> dict[UUID, DeliveryStatus]:
    """Log attempts and update their deliveries. Returns the new statuses. Deliveries that another sender has claimed in
    the meantime are logged but left out of the result. An endpoint that answered 410 is disabled. Safe to repeat."""
    if not outcomes:
        return {}
    parameters = {
        "ids": [outcome.delivery.id for outcome in outcomes],
        "attempts": [outcome.delivery.attempt for outcome in outcomes],
        "verdicts": [outcome.status.value for outcome in outcomes],
        "status_codes": [outcome.status_code for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
        "seconds": [outcome.seconds for outcome in outcomes],
        "delays": [retry_delay(outcome.delivery.num_tries) for outcome in outcomes],
    }
    recorded = {row.id: DeliveryStatus(row.status) for row in session.execute(RECORD, parameters)}
    for outcome in outcomes:
        if outcome.is_gone and outcome.delivery.endpoint_id is not None:
            webhooks.disable_endpoint(session, outcome.delivery.endpoint_id, outcome.delivery.url, GONE)
    return recorded


def retry_delay(num_tries: int) -> float:
    """Seconds to wait after the `num_tries`th failure, with 10 % jitter, so that deliveries which failed together are
    not retried together."""
    return RETRY_SECONDS[min(num_tries, len(RETRY_SECONDS)) - 1] * random.uniform(0.9, 1.1)


def list_deliveries(
    session: Session,
    tenant_id: UUID,
    *,
    job_id: UUID | None = None,
    endpoint_id: UUID | None = None,
    status: DeliveryStatus | None = None,
    after: UUID | None = None,
    limit: int,
) -> list[WebhookDelivery]:
    """A tenant's deliveries, newest first. Empty after an unknown `after`."""
    wanted: list[ColumnElement[bool]] = [WebhookDelivery.tenant_id == tenant_id]
    if job_id is not None:
        wanted.append(WebhookDelivery.event_id == job_id)
    if endpoint_id is not None:
        wanted.append(WebhookDelivery.endpoint_id == endpoint_id)
    if status is not None:
        wanted.append(WebhookDelivery.status == status)
    if after is not None:
        wanted.append(_is_after(tenant_id, after))
    order = (WebhookDelivery.created_at.desc(), WebhookDelivery.id.desc())
    return list(session.scalars(select(WebhookDelivery).where(and_(*wanted)).order_by(*order).limit(limit)))


def _is_after(tenant_id: UUID, after: UUID) -> ColumnElement[bool]:
    one = (WebhookDelivery.id == after, WebhookDelivery.tenant_id == tenant_id)
    created_at = select(WebhookDelivery.created_at).where(*one).scalar_subquery()
    earlier = WebhookDelivery.created_at < created_at
    return or_(earlier, and_(WebhookDelivery.created_at == created_at, WebhookDelivery.id < after))


def get(session: Session, delivery_id: UUID, tenant_id: UUID) -> tuple[WebhookDelivery, list[WebhookAttempt]] | None:
    """A delivery with its attempts in order, or None if the tenant has no such delivery."""
    delivery = session.get(WebhookDelivery, delivery_id, populate_existing=True)
    if delivery is None or delivery.tenant_id != tenant_id:
        return None
    attempts = select(WebhookAttempt).where(WebhookAttempt.delivery_id == delivery_id).order_by(WebhookAttempt.number)
    return delivery, list(session.scalars(attempts))


def redeliver(session: Session, delivery_id: UUID, tenant_id: UUID) -> bool:
    """Make a delivery due immediately, and for another 72 hours, whatever its status. If an attempt is in progress, it
    may arrive twice. False if the tenant has no such delivery."""
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.tenant_id == tenant_id)
        .values(
            status=DeliveryStatus.PENDING,
            num_attempts=WebhookDelivery.num_attempts + 1,  # fences off a current attempt by using up its number
            num_attempts_before=WebhookDelivery.num_attempts + 1,
            next_attempt_at=func.statement_timestamp(),
            retry_until=func.statement_timestamp() + text(f"interval '{RETRY_HOURS} hours'"),
            delivered_at=None,
        )
        .returning(WebhookDelivery.id)
    )
    return session.scalar(statement) is not None


def has_pending(session: Session) -> bool:
    """Whether any delivery is left to be sent, now or later: without one, the claim need not be planned."""
    return bool(session.scalar(HAS_PENDING))


def backlog(session: Session) -> tuple[int, float]:
    """The number of pending deliveries of all tenants, and for how many seconds the oldest has been due."""
    row = session.execute(BACKLOG).one()
    return row.num_pending, row.oldest_due_seconds


def prune(session: Session, *, limit: int = 1_000) -> int:
    """Delete ended deliveries that are more than KEPT_DAYS old, with their attempts. Returns how many."""
    too_old = WebhookDelivery.created_at < func.statement_timestamp() - text(f"interval '{KEPT_DAYS} days'")
    done = WebhookDelivery.status != DeliveryStatus.PENDING
    old = select(WebhookDelivery.id).where(done, too_old).limit(limit).with_for_update(skip_locked=True)
    gone = delete(WebhookDelivery).where(WebhookDelivery.id.in_(old)).returning(WebhookDelivery.id)
    return len(session.scalars(gone).all())
