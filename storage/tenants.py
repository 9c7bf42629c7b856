"""Tenants: who jobs belong to, with the load row that every one of them needs."""

from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from storage.tables import Tenant, TenantLoad


def create(session: Session, name: str, *, max_queued: int | None = None, weight: float = 1.0) -> Tenant:
    """Raises IntegrityError where the name is taken."""
    tenant = Tenant(id=uuid4(), name=name, max_queued=max_queued, weight=weight)
    session.add(tenant)
    session.flush()
    session.add(TenantLoad(tenant_id=tenant.id))
    session.flush()
    return tenant


def get(session: Session, tenant_id: UUID) -> Tenant | None:
    return session.get(Tenant, tenant_id)


def get_by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))
