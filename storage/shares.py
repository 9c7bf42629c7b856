"""Who runs and who waits: what a worker reads to see whether a tenant holds more than its share of the slots.

The rule that is applied to it is in `gpu_worker/pausing.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.orm import Session

from domain.jobs import Lane
from storage import job_statements as sql
from storage.jobs import ClaimedJob, claimed_jobs, extent


@dataclass(frozen=True, slots=True)
class NextJob:
    """A job that could be claimed now."""

    id: UUID
    tenant_id: UUID
    num_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Shares:
    """The tenants of one model: what they run, on all workers together, and the jobs at the head of the queue."""

    num_running: Mapping[UUID, int]  # sequences, each of which takes a slot
    weights: Mapping[UUID, float]
    received: Mapping[UUID, float]  # tokens per weight, of all models, without what running jobs may still take
    waiting: Sequence[NextJob] = ()  # in the order of claims


def look(session: Session, model: str, *, model_revision: str, limit: int) -> Shares | None:
    """The shares of this model, and at least `limit` waiting jobs if there are as many; batch lines are left out. No
    other worker can look until the transaction ends; None if another one just does."""
    if not session.execute(sql.TAKE_SHARING_TURN, {"model": model}).scalar_one():
        return None
    waiting = session.execute(sql.NEXT_IN_TURN, _claimable(model, model_revision) | extent(limit)).all()
    if not waiting:
        return Shares({}, {}, {})
    running = session.execute(sql.RUNNING_BY_TENANT, {"model": model}).all()
    tenant_ids = list({row.tenant_id for row in (*running, *waiting)})
    tenants = {row.tenant_id: row for row in session.execute(sql.RECEIVED, {"tenant_ids": tenant_ids})}
    return Shares(
        num_running={row.tenant_id: row.num_running for row in running},
        weights={tenant_id: row.weight for tenant_id, row in tenants.items()},
        received={tenant_id: row.tokens for tenant_id, row in tenants.items()},
        waiting=[NextJob(row.id, row.tenant_id, row.num_sequences) for row in waiting if row.tenant_id in tenants],
    )


def claim_these(
    session: Session, model: str, job_ids: Sequence[UUID], *, owner: UUID, model_revision: str, lease_seconds: float
) -> list[ClaimedJob]:
    """Like `jobs.claim`, but claims these jobs, in this order. Those that another worker has just claimed are left."""
    parameters = {"ids": list(job_ids), "limit": len(job_ids), "owner": owner, "lease_seconds": lease_seconds}
    parameters["num_slots"] = math.inf  # as many as are given up for them
    rows = session.execute(sql.CLAIM_THESE, _claimable(model, model_revision) | parameters).all()
    return claimed_jobs(session, rows, owner=owner)


def _claimable(model: str, model_revision: str) -> dict[str, object]:
    """Jobs of the standard lane that are not batch lines."""
    return {
        "model": model,
        "model_revision": model_revision,
        "lane": Lane.STANDARD.value,
        "min_suspicions": 0,
        "min_standing": 0,
    }
