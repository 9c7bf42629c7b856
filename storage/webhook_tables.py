"""The row classes of webhooks: whom to tell, what is due, and how every attempt went."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, Computed, Double, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from domain.webhooks import DeliveryStatus
from storage.column_types import TextEnum
from storage.tables import Row


class WebhookEndpoint(Row):
    """Where a tenant wants to hear of events of certain types."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("webhook_endpoints_tenant_idx", "tenant_id", text("id DESC")),)

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]]
    secret: Mapped[str]  # as it is: a signature needs it
    previous_secret: Mapped[str | None]
    previous_secret_expires_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
    disabled_at: Mapped[datetime | None]  # it answered 410, or was told to rest


class WebhookSecret(Row):
    """What signs the events of jobs that named a URL themselves."""

    __tablename__ = "webhook_secrets"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True)
    secret: Mapped[str]
    previous_secret: Mapped[str | None]
    previous_secret_expires_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WebhookDelivery(Row):
    """One event for one destination. It outlives its job; nothing of the job but its id is in it."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("event_id", "endpoint_id", postgresql_nulls_not_distinct=True),
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        CheckConstraint("(status = 'delivered') = (delivered_at IS NOT NULL)", name="delivered_at"),
        Index("webhook_deliveries_due_idx", "host", "next_attempt_at", postgresql_where=text("status = 'pending'")),
        Index("webhook_deliveries_tenant_idx", "tenant_id", text("created_at DESC"), text("id DESC")),
        Index("webhook_deliveries_endpoint_idx", "endpoint_id", postgresql_where=text("endpoint_id IS NOT NULL")),
        Index("webhook_deliveries_prune_idx", "created_at", postgresql_where=text("status <> 'pending'")),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, server_default=func.gen_random_uuid())
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    event_id: Mapped[UUID]  # of the job it is about: one end, one event
    type: Mapped[str]
    endpoint_id: Mapped[UUID | None]  # None: the URL came with the job. No foreign key, see storage/webhook_outbox.py
    url: Mapped[str]
    host: Mapped[str] = mapped_column(Computed("split_part(url, '/', 3)", persisted=True))  # and port, if it has one
    status: Mapped[DeliveryStatus] = mapped_column(TextEnum(DeliveryStatus), server_default="pending")
    num_attempts: Mapped[int] = mapped_column(server_default="0")  # also the fence: +1 at every claim, never reset
    num_attempts_before: Mapped[int] = mapped_column(server_default="0")  # those before it was asked for once more
    next_attempt_at: Mapped[datetime] = mapped_column(server_default=func.now())  # while in hand: the end of the lease
    retry_until: Mapped[datetime] = mapped_column(server_default=text("now() + interval '72 hours'"))
    last_status_code: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    delivered_at: Mapped[datetime | None]


class WebhookAttempt(Row):
    """How one attempt went. One whose sender died before it could say so is missing."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[UUID] = mapped_column(ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    attempted_at: Mapped[datetime]
    seconds: Mapped[float] = mapped_column(Double)
    status_code: Mapped[int | None]
    error: Mapped[str | None]
