"""Conversations: items in order, and at most one response that is to add to them (docs/adr/0048 says why it is so).

A response in a conversation is an open turn from its acceptance on. Its end is its job's end and nothing else: whoever
uses the conversation next adds the items of an ended job and closes the turn in one transaction, once. While a job
runs, its conversation accepts neither another response nor items. All functions are synchronous on a `Session` and do
not commit.

Locks: a tenant's load comes before a conversation, as in `begin_turn`. Nothing here locks a job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import orjson
from sqlalchemy import BigInteger, ForeignKey, Index, UniqueConstraint, delete, func, insert, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.errors import ConversationLocked, ConversationNotFound, InsufficientQuota, InvalidRequest
from domain.job_options import ConversationTurn
from domain.jobs import JobStatus, external_id, new_id
from storage.job_accept import Accepted, AcceptOutcome, NewJob, accept
from storage.tables import Job, Row

MAX_ITEMS = 8_192  # of a conversation; the items of its last response may exceed it

MAX_BYTES = 4 * 2**20  # of their JSON, likewise

FLOOR_BYTES = 16_384  # what each conversation counts at least, so that the limit on bytes limits their number as well


class Conversation(Row):
    """A conversation of one tenant. `version` changes with its items, and counts what was done to them."""

    __tablename__ = "conversations"
    __table_args__ = (
        Index("conversations_tenant_idx", "tenant_id"),
        Index("conversations_expires_idx", "expires_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    conversation_metadata: Mapped[dict[str, str]] = mapped_column("metadata")
    version: Mapped[int] = mapped_column(server_default="0")
    num_items: Mapped[int] = mapped_column(server_default="0")
    num_bytes: Mapped[int] = mapped_column(BigInteger)  # of the items' JSON, and FLOOR_BYTES
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]


class ConversationItem(Row):
    """One item, in the form in which it is listed."""

    __tablename__ = "conversation_items"
    __table_args__ = (UniqueConstraint("conversation_id", "item_id"),)

    conversation_id: Mapped[UUID] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)  # ascending, with gaps where items were deleted
    item_id: Mapped[str]
    item: Mapped[dict[str, Any]]


class OpenTurn(Row):
    """A response in a conversation whose items have not been added yet."""

    __tablename__ = "conversation_turns"
    __table_args__ = (UniqueConstraint("job_id"),)

    conversation_id: Mapped[UUID] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True)
    job_id: Mapped[UUID]  # no foreign key: a tenant may delete the job, and then the turn adds nothing


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """A conversation at one moment, detached from the session. `job_status` is None if the job was deleted."""

    conversation: Conversation
    job_id: UUID | None = None  # of its open turn
    job_status: JobStatus | None = None

    @property
    def has_ended_turn(self) -> bool:
        return self.job_id is not None and (self.job_status is None or self.job_status.is_terminal)


def not_found(name: str) -> ConversationNotFound:
    return ConversationNotFound(
        f"there is no conversation {name[:64]!r}; it may have been deleted or have expired", param="conversation"
    )


def create(
    session: Session,
    tenant_id: UUID,
    *,
    metadata: Mapping[str, str],
    items: Sequence[Mapping[str, Any]],
    ttl_seconds: int,
    max_bytes: int,
) -> Conversation:
    """Raises InsufficientQuota if the tenant's conversations would exceed `max_bytes`."""
    conversation = Conversation(
        id=new_id(),
        tenant_id=tenant_id,
        conversation_metadata=dict(metadata),
        version=0,
        num_items=0,
        num_bytes=FLOOR_BYTES,
        expires_at=_seconds_from_now(ttl_seconds),
    )
    session.add(conversation)
    session.flush()
    _append(session, conversation, items)
    _refuse_over_quota(session, tenant_id, max_bytes)
    return _detached(session, conversation)


def get(session: Session, conversation_id: UUID, tenant_id: UUID) -> ConversationRecord | None:
    """The conversation, or None if the tenant has no such conversation or it has expired."""
    statement = (
        select(Conversation, OpenTurn.job_id, Job.status)
        .outerjoin(OpenTurn, OpenTurn.conversation_id == Conversation.id)
        .outerjoin(Job, Job.id == OpenTurn.job_id)
        .where(Conversation.id == conversation_id, Conversation.tenant_id == tenant_id)
        .where(Conversation.expires_at > func.statement_timestamp())
    )
    row = session.execute(statement.execution_options(populate_existing=True)).one_or_none()
    if row is None:
        return None
    session.expunge(row[0])
    return ConversationRecord(*row)


def turn_of(session: Session, job_id: UUID) -> UUID | None:
    """The conversation in which this job is the open turn."""
    return session.scalar(select(OpenTurn.conversation_id).where(OpenTurn.job_id == job_id))


def set_metadata(
    session: Session, conversation_id: UUID, tenant_id: UUID, metadata: Mapping[str, str], *, ttl_seconds: int
) -> Conversation:
    """Raises ConversationNotFound."""
    conversation = _locked(session, conversation_id, tenant_id)
    conversation.conversation_metadata = dict(metadata)
    conversation.expires_at = _seconds_from_now(ttl_seconds)
    session.flush()
    return _detached(session, conversation)


def delete_conversation(session: Session, conversation_id: UUID, tenant_id: UUID) -> bool:
    """Erase it with its items. Its open turn goes on as a response that belongs to no conversation."""
    wanted = (Conversation.id == conversation_id, Conversation.tenant_id == tenant_id)
    return session.execute(delete(Conversation).where(*wanted).returning(Conversation.id)).first() is not None


def add_items(
    session: Session,
    conversation_id: UUID,
    tenant_id: UUID,
    items: Sequence[Mapping[str, Any]],
    *,
    ttl_seconds: int,
    max_bytes: int,
) -> list[dict[str, Any]]:
    """Returns the items as they are stored: an id that the conversation has already is replaced. Raises
    ConversationNotFound, ConversationLocked, InvalidRequest if the conversation is full, InsufficientQuota."""
    conversation = _locked(session, conversation_id, tenant_id)
    _refuse_if_busy(session, conversation)
    num_bytes = sum(len(orjson.dumps(item)) for item in items)
    _refuse_if_full(conversation, num_items=len(items), num_bytes=num_bytes, param="items")
    added = _append(session, conversation, items)
    conversation.expires_at = _seconds_from_now(ttl_seconds)
    session.flush()
    _refuse_over_quota(session, tenant_id, max_bytes)
    return added


def list_items(
    session: Session,
    conversation_id: UUID,
    *,
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"],
) -> list[dict[str, Any]] | None:
    """One page; `after` is the id of the last item of the previous one. None if there is no such item. The caller has
    checked the conversation's tenant."""
    statement = select(ConversationItem.item).where(ConversationItem.conversation_id == conversation_id)
    position = ConversationItem.position
    if after is not None:
        last = session.scalar(_item(select(position), conversation_id, after))
        if last is None:
            return None
        statement = statement.where(position > last if order == "asc" else position < last)
    return list(session.scalars(statement.order_by(position.asc() if order == "asc" else position.desc()).limit(limit)))


def all_items(session: Session, conversation_id: UUID) -> list[dict[str, Any]]:
    """All items in order: bounded, as a conversation is. The caller has checked the tenant."""
    statement = select(ConversationItem.item).where(ConversationItem.conversation_id == conversation_id)
    return list(session.scalars(statement.order_by(ConversationItem.position)))


def get_item(session: Session, conversation_id: UUID, item_id: str) -> dict[str, Any] | None:
    """The caller has checked the conversation's tenant."""
    item: dict[str, Any] | None = session.scalar(_item(select(ConversationItem.item), conversation_id, item_id))
    return item


def delete_item(session: Session, conversation_id: UUID, tenant_id: UUID, item_id: str) -> Conversation | None:
    """Erase one item. None if there is no such item. Raises ConversationNotFound."""
    conversation = _locked(session, conversation_id, tenant_id)
    deletion = _item(delete(ConversationItem), conversation_id, item_id).returning(ConversationItem.item)
    item = session.scalar(deletion)
    if item is None:
        return None
    conversation.version += 1
    conversation.num_items -= 1
    conversation.num_bytes -= len(orjson.dumps(item))
    session.flush()
    return _detached(session, conversation)


def begin_turn(
    session: Session,
    turn: ConversationTurn,
    new_job: NewJob,
    *,
    num_items: int,
    ttl_seconds: int,
    max_bytes: int,
    max_queued_jobs: int,
    max_poison_jobs_per_hour: int,
) -> Accepted:
    """Accept a response whose prompt begins with the conversation, as it was at `turn.version`. `num_items` are those
    of its input. Raises ConversationNotFound, ConversationLocked if the conversation has
    changed or is busy, InvalidRequest if it is full, InsufficientQuota; then nothing is accepted."""
    # Kept as long as its conversation, so that its items are there whenever the conversation is used next.
    kept = replace(new_job, result_ttl_seconds=max(new_job.result_ttl_seconds, ttl_seconds))
    [accepted] = accept(
        session, [kept], max_queued_jobs=max_queued_jobs, max_poison_jobs_per_hour=max_poison_jobs_per_hour
    )
    if accepted.outcome is not AcceptOutcome.ACCEPTED:
        return accepted
    conversation = _locked(session, turn.conversation_id, new_job.tenant_id)
    _refuse_if_busy(session, conversation)
    if conversation.version != turn.version:
        raise _busy(conversation.id)
    _refuse_if_full(conversation, num_items=num_items, num_bytes=len(new_job.endpoint_body or ""), param="conversation")
    _refuse_over_quota(session, new_job.tenant_id, max_bytes)
    conversation.expires_at = _seconds_from_now(ttl_seconds)
    session.add(OpenTurn(conversation_id=conversation.id, job_id=new_job.id))
    session.flush()
    return accepted


def end_turn(
    session: Session, conversation_id: UUID, tenant_id: UUID, job_id: UUID, items: Sequence[Mapping[str, Any]]
) -> None:
    """Add the items of a job that has ended, and close its turn. Does nothing if the turn is closed already. Raises
    ConversationNotFound."""
    conversation = _locked(session, conversation_id, tenant_id)
    closing = delete(OpenTurn).where(OpenTurn.conversation_id == conversation_id, OpenTurn.job_id == job_id)
    if session.execute(closing.returning(OpenTurn.job_id)).first() is not None:
        _append(session, conversation, items)


def set_result_ttl(session: Session, job_id: UUID, seconds: int) -> None:
    """How long a job is kept once its turn is closed. Until then it is kept as long as its conversation."""
    kept = {
        "result_ttl_seconds": seconds,
        "prune_at": Job.finished_at + func.make_interval(0, 0, 0, 0, 0, 0, seconds),
    }
    session.execute(update(Job).where(Job.id == job_id).values(kept))


def prune(session: Session, *, limit: int = 20) -> int:
    """Delete conversations that have expired. Returns how many."""
    is_over = Conversation.expires_at <= func.statement_timestamp()
    picked = select(Conversation.id).where(is_over).limit(limit).with_for_update(skip_locked=True)
    return len(
        session.execute(delete(Conversation).where(Conversation.id.in_(picked)).returning(Conversation.id)).all()
    )


def _locked(session: Session, conversation_id: UUID, tenant_id: UUID) -> Conversation:
    """Raises ConversationNotFound."""
    wanted = select(Conversation).where(Conversation.id == conversation_id, Conversation.tenant_id == tenant_id)
    found = session.scalar(wanted.with_for_update(key_share=True).execution_options(populate_existing=True))
    if found is None:
        raise not_found(external_id(conversation_id, "conv"))
    return found


def _refuse_if_busy(session: Session, conversation: Conversation) -> None:
    if session.scalar(select(OpenTurn.job_id).where(OpenTurn.conversation_id == conversation.id)) is not None:
        raise _busy(conversation.id)


def _busy(conversation_id: UUID) -> ConversationLocked:
    return ConversationLocked(
        f"another request is working on {external_id(conversation_id, 'conv')}; send yours again when it is done",
        param="conversation",
    )


def _refuse_if_full(conversation: Conversation, *, num_items: int, num_bytes: int, param: str) -> None:
    if conversation.num_items + num_items > MAX_ITEMS:
        raise InvalidRequest(
            f"the conversation has {conversation.num_items} items and would have more than {MAX_ITEMS} with "
            f"{num_items} more; delete some of them, or begin a new conversation",
            param=param,
        )
    if conversation.num_bytes + num_bytes > MAX_BYTES + FLOOR_BYTES:
        raise InvalidRequest(
            f"the conversation would have more than {MAX_BYTES} bytes with the {num_bytes} of this request; delete "
            "some of its items, or begin a new conversation",
            param=param,
        )


def _refuse_over_quota(session: Session, tenant_id: UUID, max_bytes: int) -> None:
    """Raises InsufficientQuota."""
    total = select(func.coalesce(func.sum(Conversation.num_bytes), 0)).where(Conversation.tenant_id == tenant_id)
    num_bytes = int(session.scalar(total) or 0)
    if num_bytes > max_bytes:
        raise InsufficientQuota(
            f"your conversations would have {num_bytes} bytes, but the limit is {max_bytes}; delete some of them "
            f"(each counts at least {FLOOR_BYTES} bytes)"
        )


def _append(session: Session, conversation: Conversation, items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the items as they are stored. The caller holds the lock on the conversation."""
    if not items:
        return []
    own = ConversationItem.conversation_id == conversation.id
    ids = [item["id"].replace("\0", "") for item in items]
    taken = set(session.scalars(select(ConversationItem.item_id).where(own, ConversationItem.item_id.in_(ids))))
    last = session.scalar(select(func.coalesce(func.max(ConversationItem.position), -1)).where(own))
    assert last is not None
    added: list[dict[str, Any]] = []
    for item in items:
        is_usable = item["id"] not in taken and "\0" not in item["id"]
        id_ = item["id"] if is_usable else f"item_{new_id().hex}"
        taken.add(id_)
        added.append({**item, "id": id_})
    rows = [
        {"conversation_id": conversation.id, "position": position, "item_id": item["id"], "item": item}
        for position, item in enumerate(added, start=last + 1)
    ]
    session.execute(insert(ConversationItem), rows)
    conversation.version += 1
    conversation.num_items += len(added)
    conversation.num_bytes += sum(len(orjson.dumps(item)) for item in added)
    session.flush()
    return added


def _item(statement: Any, conversation_id: UUID, item_id: str) -> Any:
    """Narrow a statement to one item. No text of SQL may contain U+0000, which no id has."""
    return statement.where(
        ConversationItem.conversation_id == conversation_id, ConversationItem.item_id == item_id.replace("\0", "")
    )


def _seconds_from_now(seconds: int) -> Any:
    return func.statement_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def _detached(session: Session, conversation: Conversation) -> Conversation:
    session.refresh(conversation)
    session.expunge(conversation)
    return conversation
