"""Webhook endpoints, their secrets, and the outbox to which the ends of jobs are written.

Secrets are stored in plain text, because signing needs them. They are shown when they are created; only the tenant's
own secret, which signs events for URLs that came with jobs, can be read again.

Deliveries are written in the transaction that ends a job. The statements that end jobs only report whether there may be
a receiver (IS_TOLD), so a job without a webhook has no further cost; for other jobs, `write_deliveries` is called.
"""

# ruff: noqa: S608  (only constants of this module are inserted into the text; values are bound)

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    CheckConstraint,
    ColumnElement,
    Computed,
    Double,
    ForeignKey,
    Index,
    UniqueConstraint,
    delete,
    func,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.jobs import new_id
from domain.webhooks import DeliveryStatus, new_secret
from storage.column_types import TextEnum
from storage.tables import Row


class WebhookEndpoint(Row):
    """Where a tenant wants to be notified of certain types of events."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("webhook_endpoints_tenant_idx", "tenant_id", text("id DESC")),)

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]]
    secret: Mapped[str]  # in plain text, since signing needs it
    previous_secret: Mapped[str | None]
    previous_secret_expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]  # set when it answered 410 or the tenant disabled it


class WebhookSecret(Row):
    """A tenant's secret, which signs events for URLs that came with jobs."""

    __tablename__ = "webhook_secrets"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    secret: Mapped[str]
    previous_secret: Mapped[str | None]
    previous_secret_expires_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookDelivery(Row):
    """One event for one destination. It outlives its job, of which it contains only the id."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("event_id", "endpoint_id", postgresql_nulls_not_distinct=True),
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        CheckConstraint("(status = 'delivered') = (delivered_at IS NOT NULL)", name="delivered_at"),
        Index("webhook_deliveries_due_idx", "host", "next_attempt_at", postgresql_where=text("status = 'pending'")),
        Index(
            "webhook_deliveries_turn_idx",
            "host",
            "tenant_id",
            "next_attempt_at",
            postgresql_where=text("status = 'pending'"),
        ),
        Index("webhook_deliveries_tenant_idx", "tenant_id", text("created_at DESC"), text("id DESC")),
        Index("webhook_deliveries_endpoint_idx", "endpoint_id", postgresql_where=text("endpoint_id IS NOT NULL")),
        Index("webhook_deliveries_prune_idx", "created_at", postgresql_where=text("status <> 'pending'")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    event_id: Mapped[UUID]  # the id of the job that ended; a job ends once, so there is one event per job
    type: Mapped[str]
    endpoint_id: Mapped[UUID | None]  # None: the URL came with the job. No foreign key, see storage/webhooks.py
    url: Mapped[str]
    host: Mapped[str] = mapped_column(Computed("split_part(url, '/', 3)", persisted=True))  # and port, if it has one
    status: Mapped[DeliveryStatus] = mapped_column(TextEnum(DeliveryStatus), server_default="pending")
    num_attempts: Mapped[int] = mapped_column(server_default="0")  # also the fence: +1 at every claim, never reset
    num_attempts_before: Mapped[int] = mapped_column(server_default="0")  # attempts before it was requested again
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())  # during an attempt: end of its lease
    retry_until: Mapped[datetime] = mapped_column(server_default=text("now() + interval '72 hours'"))
    last_status_code: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    delivered_at: Mapped[datetime | None]


class WebhookAttempt(Row):
    """The outcome of one attempt. Missing if the sender died before recording it."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    attempted_at: Mapped[datetime]
    seconds: Mapped[float] = mapped_column(Double)
    status_code: Mapped[int | None]
    error: Mapped[str | None]


MAX_ENDPOINTS = 50  # per tenant; every end of a job reads them

OVERLAP_HOURS = 24

_NOW = func.statement_timestamp()

_OVERLAP_ENDS = _NOW + text(f"interval '{OVERLAP_HOURS} hours'")


def create_endpoint(
    session: Session, tenant_id: UUID, *, name: str, url: str, event_types: Sequence[str]
) -> WebhookEndpoint | None:
    """Create an endpoint with a new secret, or return None if the tenant already has MAX_ENDPOINTS."""
    owned = select(func.count()).select_from(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    if (session.scalar(owned) or 0) >= MAX_ENDPOINTS:
        return None
    endpoint = WebhookEndpoint(
        id=new_id(), tenant_id=tenant_id, name=name, url=url, event_types=list(event_types), secret=new_secret()
    )
    session.add(endpoint)
    session.flush()
    session.refresh(endpoint)
    return endpoint


def get_endpoint(session: Session, endpoint_id: UUID, tenant_id: UUID) -> WebhookEndpoint | None:
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    return session.scalar(select(WebhookEndpoint).where(*wanted).execution_options(populate_existing=True))


def list_endpoints(session: Session, tenant_id: UUID, *, after: UUID | None, limit: int) -> list[WebhookEndpoint]:
    """One page of the tenant's endpoints, newest first."""
    statement = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    if after is not None:
        statement = statement.where(WebhookEndpoint.id < after)
    return list(session.scalars(statement.order_by(WebhookEndpoint.id.desc()).limit(limit)))


def change_endpoint(
    session: Session,
    endpoint_id: UUID,
    tenant_id: UUID,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
    enabled: bool | None = None,
) -> WebhookEndpoint | None:
    """Change the fields that are not None. Pending deliveries go to the new URL. Returns None if the tenant has no such
    endpoint."""
    endpoint = get_endpoint(session, endpoint_id, tenant_id)
    if endpoint is None:
        return None
    values: dict[str, object] = {"name": name, "url": url, "event_types": event_types and list(event_types)}
    changed = {key: value for key, value in values.items() if value is not None and value != getattr(endpoint, key)}
    if enabled is not None and enabled != (endpoint.disabled_at is None):
        changed["disabled_at"] = None if enabled else _NOW
    if changed:
        session.execute(update(WebhookEndpoint).where(_is(endpoint)).values(**changed, updated_at=_NOW))
    if "url" in changed:
        session.execute(update(WebhookDelivery).where(*_pending_of(endpoint_id)).values(url=url))
    if enabled is False:
        _give_up(session, endpoint_id, "the endpoint was disabled")
    return get_endpoint(session, endpoint_id, tenant_id)


def remove_endpoint(session: Session, endpoint_id: UUID, tenant_id: UUID) -> bool:
    """Delete an endpoint with its deliveries. False if the tenant has no such endpoint."""
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    if session.scalar(delete(WebhookEndpoint).where(*wanted).returning(WebhookEndpoint.id)) is None:
        return False
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id))
    return True


def rotate_secret(
    session: Session, endpoint_id: UUID, tenant_id: UUID, *, with_overlap: bool
) -> WebhookEndpoint | None:
    """Create a new secret. With `with_overlap`, the old one signs as well for another day. Returns None if the tenant
    has no such endpoint."""
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    values = {
        "secret": new_secret(),
        "previous_secret": WebhookEndpoint.secret if with_overlap else None,
        "previous_secret_expires_at": _OVERLAP_ENDS if with_overlap else None,
        "updated_at": _NOW,
    }
    session.execute(update(WebhookEndpoint).where(*wanted).values(**values))
    return get_endpoint(session, endpoint_id, tenant_id)


def disable_endpoint(session: Session, endpoint_id: UUID, url: str, reason: str) -> None:
    """Disable an endpoint whose receiver at `url` wants no more events, unless its URL has changed since."""
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.url == url, WebhookEndpoint.disabled_at.is_(None))
    values = {"disabled_at": _NOW, "updated_at": _NOW}
    if session.scalar(update(WebhookEndpoint).where(*wanted).values(**values).returning(WebhookEndpoint.id)):
        _give_up(session, endpoint_id, reason)


def tenant_secret(session: Session, tenant_id: UUID) -> WebhookSecret:
    """The secret that signs events for URLs that came with jobs. Created on first use."""
    session.execute(insert(WebhookSecret).values(tenant_id=tenant_id, secret=new_secret()).on_conflict_do_nothing())
    return session.get_one(WebhookSecret, tenant_id, populate_existing=True)


def rotate_tenant_secret(session: Session, tenant_id: UUID, *, with_overlap: bool) -> WebhookSecret:
    tenant_secret(session, tenant_id)
    values = {
        "secret": new_secret(),
        "previous_secret": WebhookSecret.secret if with_overlap else None,
        "previous_secret_expires_at": _OVERLAP_ENDS if with_overlap else None,
        "updated_at": _NOW,
    }
    session.execute(update(WebhookSecret).where(WebhookSecret.tenant_id == tenant_id).values(**values))
    return session.get_one(WebhookSecret, tenant_id, populate_existing=True)


def _is(endpoint: WebhookEndpoint) -> ColumnElement[bool]:
    return WebhookEndpoint.id == endpoint.id


def _pending_of(endpoint_id: UUID) -> tuple[ColumnElement[bool], ...]:
    return WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.status == DeliveryStatus.PENDING


def _give_up(session: Session, endpoint_id: UUID, reason: str) -> None:
    values = {"status": DeliveryStatus.FAILED, "last_error": reason}
    session.execute(update(WebhookDelivery).where(*_pending_of(endpoint_id)).values(**values))


# For the RETURNING of a statement that ends jobs `j`.
IS_TOLD = """(j.webhook_url IS NOT NULL OR EXISTS (
        SELECT FROM webhook_endpoints p WHERE p.tenant_id = j.tenant_id)) AS is_told"""

# The public name of the event, and its name on the job's route, which is the one that OpenAI's SDKs expect.
JOB_EVENT = "'job.' || j.status"

EVENT_OF_ROUTE = f"""CASE WHEN j.endpoint <> 'responses' THEN {JOB_EVENT} ELSE 'response.' || CASE
        WHEN j.status = 'completed' AND j.finish_reason = 'length' THEN 'incomplete'
        WHEN j.status = 'expired' THEN CASE WHEN j.num_committed_tokens > 0 THEN 'incomplete' ELSE 'failed' END
        ELSE j.status END END"""

# The event has its job's id, so there cannot be two for the same destination. Endpoints are not foreign keys, so that
# deleting one at this moment does not keep jobs from ending.
WRITE_DELIVERIES = text(f"""
WITH ended AS MATERIALIZED (
    SELECT j.id, j.tenant_id, {JOB_EVENT} AS job_event, {EVENT_OF_ROUTE} AS event_of_route,
        CASE WHEN j.status = ANY(j.webhook_statuses) THEN j.webhook_url END AS url
    FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.finished_at IS NOT NULL
)
INSERT INTO webhook_deliveries (tenant_id, event_id, type, endpoint_id, url)
SELECT tenant_id, id, event_of_route, NULL::uuid, url FROM ended WHERE url IS NOT NULL
UNION ALL
SELECT ended.tenant_id, ended.id,
    CASE WHEN event_of_route = ANY(p.event_types) THEN event_of_route ELSE job_event END, p.id, p.url
FROM ended JOIN webhook_endpoints p ON p.tenant_id = ended.tenant_id AND p.disabled_at IS NULL
    AND p.event_types && ARRAY[event_of_route, job_event]
ON CONFLICT DO NOTHING
""")


def write_deliveries(session: Session, job_ids: Sequence[UUID]) -> None:
    """Write one delivery per interested destination for each of these jobs that has ended. Call in the transaction that
    ended them; repeating it has no effect."""
    if job_ids:
        session.execute(WRITE_DELIVERIES, {"ids": list(job_ids)})


# A batch ends once, in a transaction that locks its row, so its event needs no guard besides its id.
WRITE_BATCH_DELIVERIES = text("""
INSERT INTO webhook_deliveries (tenant_id, event_id, type, endpoint_id, url)
SELECT tenant_id, :batch_id, :type, id, url FROM webhook_endpoints
WHERE tenant_id = :tenant_id AND disabled_at IS NULL AND :type = ANY(event_types)
ON CONFLICT DO NOTHING
""")


def write_batch_deliveries(session: Session, batch_id: UUID, tenant_id: UUID, status: str) -> None:
    """As `write_deliveries`, for a batch that ends with `status`."""
    parameters = {"batch_id": batch_id, "tenant_id": tenant_id, "type": f"batch.{status}"}
    session.execute(WRITE_BATCH_DELIVERIES, parameters)
