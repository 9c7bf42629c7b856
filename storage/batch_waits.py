"""Why the lines of a batch wait that are not jobs yet, where that may take hours: a budget of tokens is spent.

Other limits leave room again within a minute, or as soon as jobs end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.orm import Session

from domain.jobs import BatchStatus
from storage import batches
from storage.admission import spent_budgets
from storage.files import Batch
from storage.limits import OF_TENANT


@dataclass(frozen=True, slots=True)
class BatchWait:
    code: str  # that of the refusal which a request would get
    message: str
    until: datetime


@dataclass(frozen=True, slots=True)
class ToldBatch:
    batch: Batch
    wait: BatchWait | None = None


def get(session: Session, batch_id: UUID, tenant_id: UUID) -> ToldBatch | None:
    """The batch, or None if the tenant has no such batch."""
    batch = batches.get(session, batch_id, tenant_id)
    return None if batch is None else _told(session, [batch])[0]


def list_batches(session: Session, tenant_id: UUID, *, after: UUID | None, limit: int) -> list[ToldBatch]:
    return _told(session, batches.list_batches(session, tenant_id, after=after, limit=limit))


def _told(session: Session, found: Sequence[Batch]) -> list[ToldBatch]:
    waiting = [batch for batch in found if _has_waiting_lines(batch)]
    if not waiting:
        return [ToldBatch(batch) for batch in found]
    subjects = {(batch.tenant_id, key) for batch in waiting for key in (OF_TENANT, batch.key_id) if key is not None}
    spent = spent_budgets(session, sorted(subjects))
    waits: dict[UUID, BatchWait] = {}
    for batch in waiting:
        keys = (OF_TENANT, batch.key_id or OF_TENANT)
        own = [spent[batch.tenant_id, key] for key in keys if (batch.tenant_id, key) in spent]
        if own:
            until, refusal = max(own, key=lambda one: one[0])
            what, _, _ = refusal.message.partition(";")  # what follows is the remedy of a request
            message = f"{what}; the lines that are not jobs yet begin after {until:%Y-%m-%d %H:%M} UTC"
            waits[batch.id] = BatchWait(refusal.code, message, until)
    return [ToldBatch(batch, waits.get(batch.id)) for batch in found]


def _has_waiting_lines(batch: Batch) -> bool:
    num_begun = batch.num_completed + batch.num_failed + batch.num_in_flight
    return batch.status is BatchStatus.IN_PROGRESS and num_begun < batch.num_lines
