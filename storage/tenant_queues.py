"""Whose jobs are queued and running for which model, over all tenants; for administrators."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from storage.job_statements import CLOCK

TENANT_QUEUES = text(f"""
SELECT q.*, t.name AS tenant FROM (
    SELECT model, tenant_id, count(*) FILTER (WHERE status = 'queued')::int AS num_queued,
        count(*) FILTER (WHERE status = 'in_progress')::int AS num_running,
        coalesce(extract(epoch FROM {CLOCK} - min(created_at) FILTER (WHERE status = 'queued')), 0)::float8
            AS oldest_queued_seconds
    FROM jobs WHERE status IN ('queued', 'in_progress') GROUP BY model, tenant_id
    ORDER BY num_queued DESC, num_running DESC, model, tenant_id LIMIT :limit
) q JOIN tenants t ON t.id = q.tenant_id
ORDER BY num_queued DESC, num_running DESC, model, tenant
""")  # noqa: S608  (CLOCK is a constant)


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
    """The longest queues first. Reads every unfinished job, so call it at most every few seconds."""
    return [TenantQueueFigures(**row._mapping) for row in session.execute(TENANT_QUEUES, {"limit": limit})]
