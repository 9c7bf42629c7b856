"""What is left of the limits of tenants and keys, for those who ask before they are refused."""

from uuid import UUID

from sqlalchemy.orm import Session

from domain.access import LIMIT_NAMES, Limits
from storage.admission import Meter, Subject, meters
from storage.limits import OF_TENANT, limits_of_keys, limits_of_tenants
from storage.tables import Tenant, TenantLoad

Left = dict[str, int | None]  # by the name of the limit; None: there is none, or it is that of each API process


def left_to_tenant(session: Session, tenant: Tenant) -> tuple[Limits, Left]:
    """Its limits, and what is left of each."""
    limits = limits_of_tenants(session, [tenant])[tenant.id]
    left = _left(session, (tenant.id, OF_TENANT))
    if limits.queued_jobs is not None:  # which has no row in `limits`
        num_queued = session.get_one(TenantLoad, tenant.id, populate_existing=True).num_queued
        left["queued_jobs"] = max(0, limits.queued_jobs - num_queued)
    return limits, left


def left_to_key(session: Session, tenant_id: UUID, key_id: str) -> tuple[Limits, Left]:
    """Likewise. Its tenant may have less left."""
    return limits_of_keys(session, [key_id])[key_id], _left(session, (tenant_id, key_id))


def _left(session: Session, subject: Subject) -> Left:
    meter = meters(session, [subject]).get(subject)
    return dict.fromkeys(LIMIT_NAMES) if meter is None else _left_of(meter)


def _left_of(meter: Meter) -> Left:
    row, (on_day, in_month) = meter.row, meter.num_used_tokens
    used = {
        "queued_jobs": meter.num_queued,
        "unfinished_jobs": meter.num_unfinished,
        "queued_tokens": meter.queued_tokens,
        "tokens_per_day": on_day,
        "tokens_per_month": in_month,
    }
    left: Left = dict.fromkeys(LIMIT_NAMES)
    for name, number in used.items():
        limit = getattr(row, name)
        left[name] = None if limit is None else max(0, limit - number)
    for name, bucket in (("requests_per_minute", meter.requests), ("tokens_per_minute", meter.tokens)):
        left[name] = None if bucket is None else bucket.standing.num_remaining
    return left
