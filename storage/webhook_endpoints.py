"""Endpoints of webhooks and the secrets that sign for them, always one tenant's.

Secrets are stored as they are: whoever signs needs them. They are shown when they are made; a tenant's own one, which
signs for the URLs that come with jobs, can be read again.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.ids import new_id
from domain.webhooks import DeliveryStatus, new_secret
from storage.webhook_tables import WebhookDelivery, WebhookEndpoint, WebhookSecret

MAX_ENDPOINTS = 50  # of one tenant; every end of a job looks at them
OVERLAP_HOURS = 24

_NOW = func.statement_timestamp()
_OVERLAP_ENDS = _NOW + text(f"interval '{OVERLAP_HOURS} hours'")


def create(
    session: Session, tenant_id: UUID, *, name: str, url: str, event_types: Sequence[str]
) -> WebhookEndpoint | None:
    """With a new secret. None: the tenant has as many as it may have."""
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


def get(session: Session, endpoint_id: UUID, tenant_id: UUID) -> WebhookEndpoint | None:
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    return session.scalar(select(WebhookEndpoint).where(*wanted).execution_options(populate_existing=True))


def list_endpoints(session: Session, tenant_id: UUID, *, after: UUID | None, limit: int) -> list[WebhookEndpoint]:
    """Newest first."""
    statement = select(WebhookEndpoint).where(WebhookEndpoint.tenant_id == tenant_id)
    if after is not None:
        statement = statement.where(WebhookEndpoint.id < after)
    return list(session.scalars(statement.order_by(WebhookEndpoint.id.desc()).limit(limit)))


def change(
    session: Session,
    endpoint_id: UUID,
    tenant_id: UUID,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
    enabled: bool | None = None,
) -> WebhookEndpoint | None:
    """Change what is not None. What is still to be delivered goes to the new URL. None: no such one of this tenant."""
    endpoint = get(session, endpoint_id, tenant_id)
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
    return get(session, endpoint_id, tenant_id)


def remove(session: Session, endpoint_id: UUID, tenant_id: UUID) -> bool:
    """With its deliveries. False: no such one of this tenant."""
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    if session.scalar(delete(WebhookEndpoint).where(*wanted).returning(WebhookEndpoint.id)) is None:
        return False
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id))
    return True


def rotate(session: Session, endpoint_id: UUID, tenant_id: UUID, *, with_overlap: bool) -> WebhookEndpoint | None:
    """A new secret; `with_overlap` the old one signs as well for another day. None: no such one of this tenant."""
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.tenant_id == tenant_id)
    values = {
        "secret": new_secret(),
        "previous_secret": WebhookEndpoint.secret if with_overlap else None,
        "previous_secret_expires_at": _OVERLAP_ENDS if with_overlap else None,
        "updated_at": _NOW,
    }
    session.execute(update(WebhookEndpoint).where(*wanted).values(**values))
    return get(session, endpoint_id, tenant_id)


def disable(session: Session, endpoint_id: UUID, url: str, reason: str) -> None:
    """The receiver at `url` wants no more. Nothing happens if the endpoint has another URL by now."""
    wanted = (WebhookEndpoint.id == endpoint_id, WebhookEndpoint.url == url, WebhookEndpoint.disabled_at.is_(None))
    values = {"disabled_at": _NOW, "updated_at": _NOW}
    if session.scalar(update(WebhookEndpoint).where(*wanted).values(**values).returning(WebhookEndpoint.id)):
        _give_up(session, endpoint_id, reason)


def tenant_secret(session: Session, tenant_id: UUID) -> WebhookSecret:
    """What signs for the URLs that come with jobs; made at its first use."""
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
