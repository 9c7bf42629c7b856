"""Whose jobs are queued and running for which model, over all tenants; for administrators."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from storage.job_queues import waiting_rows
from storage.tables import Tenant

RUNNING = text("""
SELECT model, tenant_id, count(*)::int AS num_jobs FROM jobs WHERE status = 'in_progress' GROUP BY model, tenant_id
""")


@dataclass(frozen=True, slots=True)
class TenantQueueFigures:
    """One tenant's unfinished jobs of one model."""

    model: str
    tenant_id: UUID
    num_queued: int
    num_running: int
    oldest_queued_seconds: float  # since the oldest queued job was accepted; 0 if none is queued
    tenant: str  # its name


def tenant_queues(session: Session, *, limit: int) -> list[TenantQueueFigures]:
    """The longest queues first, without those of a tenant that is deleted meanwhile. Reads what `queue_rows` does, so
    call it at most every few seconds."""
    num_queued, oldest_seconds = Counter[tuple[str, UUID]](), defaultdict[tuple[str, UUID], float](float)
    for row in waiting_rows(session):
        key = row.model, row.tenant_id
        num_queued[key] += row.num_jobs
        oldest_seconds[key] = max(oldest_seconds[key], row.oldest_seconds)
    num_running = {(row.model, row.tenant_id): row.num_jobs for row in session.execute(RUNNING)}
    keys = sorted(num_queued.keys() | num_running, key=lambda key: (-num_queued[key], -num_running.get(key, 0), key))
    names = select(Tenant.id, Tenant.name).where(Tenant.id.in_({tenant_id for _, tenant_id in keys[:limit]}))
    name_by_id = {row.id: row.name for row in session.execute(names)}
    return [
        TenantQueueFigures(
            model=model,
            tenant_id=tenant_id,
            num_queued=num_queued[model, tenant_id],
            num_running=num_running.get((model, tenant_id), 0),
            oldest_queued_seconds=oldest_seconds[model, tenant_id],
            tenant=name_by_id[tenant_id],
        )
        for model, tenant_id in keys[:limit]
        if tenant_id in name_by_id
    ]
