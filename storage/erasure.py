"""Erases what one user of a tenant has asked for and got, in steps that are short transactions.

A user is known by an API key of their own, or by an entry that the tenant puts into the metadata of jobs, batches and
conversations. Jobs go with their input, output, stream, attempts and cached answers, batches with their files, and
conversations with their items. The ledger keeps its counts, which contain no text. Files of batches that are not the
user's stay, even if they have lines of theirs, and are named.
"""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from domain.jobs import parse_id_of_other
from storage import batches, conversations, jobs
from storage.conversations import Conversation
from storage.files import Batch
from storage.tables import Job
from storage.webhooks import WebhookDelivery

FIRST = UUID(int=0)  # before all ids
MAX_READ = 2_000  # rows per step
MAX_ERASED = 100  # jobs per step; each is a statement of its own


@dataclass(frozen=True, slots=True)
class Person:
    """Of the two, exactly one is set."""

    key_id: str | None = None
    metadata: tuple[str, str] | None = None  # name and value

    def has(self, key_id: str | None, metadata: dict[str, str]) -> bool:
        if self.metadata is None:
            return key_id == self.key_id
        name, value = self.metadata
        return metadata.get(name) == value


@dataclass(frozen=True, slots=True)
class Step:
    """What one step has done. The next one gets `after`; None: there is nothing left."""

    num_erased: int
    after: UUID | None
    num_unfinished: int = 0  # batches that were asked to stop, and can be erased when they have
    batch_ids: frozenset[UUID] = frozenset()  # of which erased jobs were lines


def erase_jobs(session: Session, tenant_id: UUID, person: Person, *, after: UUID) -> Step:
    """Jobs in any state. Running ones are taken from their workers."""
    columns = select(Job.id, Job.key_id, Job.job_metadata, Job.idempotency_key)
    later = columns.where(Job.tenant_id == tenant_id, Job.id > after).order_by(Job.id)
    rows = session.execute(later.limit(MAX_READ)).all()
    found = [row for row in rows if person.has(row.key_id, row.job_metadata)]
    last = rows[-1].id if len(rows) == MAX_READ else None
    if len(found) > MAX_ERASED:
        found = found[:MAX_ERASED]
        last = found[-1].id
    ids = [row.id for row in found]
    session.execute(delete(WebhookDelivery).where(WebhookDelivery.event_id.in_(ids)))
    num_erased = sum(jobs.delete(session, job_id, tenant_id) for job_id in ids)
    batch_ids = (_batch_of(row.idempotency_key) for row in found)
    return Step(num_erased, last, batch_ids=frozenset(batch_id for batch_id in batch_ids if batch_id is not None))


def _batch_of(idempotency_key: str | None) -> UUID | None:
    """The batch whose line has this key: the name of the batch, a space and a number. The keys of retries and of calls
    with several prompts have spaces, too."""
    name, space, _ = (idempotency_key or "").partition(" ")
    try:
        return parse_id_of_other(name, "batch") if space else None
    except ValueError:
        return None


def erase_batches(session: Session, tenant_id: UUID, person: Person, *, after: UUID) -> Step:
    """Batches that have ended. The others are asked to stop."""
    columns = select(Batch.id, Batch.key_id, Batch.batch_metadata)
    later = columns.where(Batch.tenant_id == tenant_id, Batch.id > after).order_by(Batch.id)
    rows = session.execute(later.limit(MAX_ERASED)).all()
    ids = [row.id for row in rows if person.has(row.key_id, row.batch_metadata)]
    num_erased = 0
    for batch_id in ids:
        if batches.delete_ended(session, batch_id, tenant_id):
            num_erased += 1
        else:
            batches.cancel(session, batch_id, tenant_id)
    last = rows[-1].id if len(rows) == MAX_ERASED else None
    return Step(num_erased, last, num_unfinished=len(ids) - num_erased)


def erase_conversations(session: Session, tenant_id: UUID, person: Person, *, after: UUID) -> Step:
    """Conversations, which have metadata and no key."""
    columns = select(Conversation.id, Conversation.conversation_metadata)
    later = columns.where(Conversation.tenant_id == tenant_id, Conversation.id > after).order_by(Conversation.id)
    rows = session.execute(later.limit(MAX_READ)).all() if person.metadata is not None else []
    ids = [row.id for row in rows if person.has(None, row.conversation_metadata)]
    num_erased = sum(conversations.delete_conversation(session, id_, tenant_id) for id_ in ids)
    return Step(num_erased, rows[-1].id if len(rows) == MAX_READ else None)


def files_of_others(session: Session, tenant_id: UUID, person: Person, batch_ids: frozenset[UUID]) -> list[UUID]:
    """The files of those of the tenant's batches that are not the user's."""
    named = select(Batch).where(Batch.tenant_id == tenant_id, Batch.id.in_(batch_ids))
    found = session.scalars(named.order_by(Batch.id)).all()
    others = [batch for batch in found if not person.has(batch.key_id, batch.batch_metadata)]
    ids = [id_ for batch in others for id_ in (batch.input_file_id, batch.output_file_id, batch.error_file_id)]
    return [id_ for id_ in ids if id_ is not None]
