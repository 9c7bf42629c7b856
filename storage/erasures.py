"""Erasures that administrators have asked for: what was erased so far, and where to go on (storage/erasure.py erases).

Each step locks the erasure's row, erases, and notes it there in the same transaction. So any number of processes may
take steps, one that dies has lost nothing, and it does not matter who goes on: maintenance or the command.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.dialects.postgresql import UUID as PgUuid
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.errors import NotFound
from domain.jobs import new_id, parse_id_of_other
from storage import administration, erasure
from storage.erasure import FIRST, Person
from storage.job_statements import CLOCK
from storage.tables import Row, Tenant

STOPPING_SECONDS = 5.0  # until batches that were asked to stop are looked at again

ARCHIVE_SECONDS = 300.0  # after which a process that has begun with the archive counts as dead

ZERO = text("0")


class Erasure(Row):
    """Whose jobs it erases is forgotten at its end, except for the key or the name in the metadata."""

    __tablename__ = "erasures"
    __table_args__ = (
        CheckConstraint("step IN ('batches', 'jobs', 'conversations', 'archive', 'done')", name="step"),
        CheckConstraint("(step = 'done') = (finished_at IS NOT NULL)", name="finished_at"),
        CheckConstraint("step <> 'done' OR metadata_value IS NULL", name="metadata_value"),
        Index("erasures_tenant_idx", "tenant_id", text("id DESC")),
        Index("erasures_due_idx", "due_at", postgresql_where=text("step <> 'done'")),
        Index(
            "erasures_one_of_each",
            *("tenant_id", "key_id", "metadata_name", "metadata_value"),
            unique=True,
            postgresql_nulls_not_distinct=True,
            postgresql_where=text("step <> 'done'"),
        ),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)  # a ULID
    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id", ondelete="CASCADE"))
    key_id: Mapped[str | None]
    metadata_name: Mapped[str | None]
    metadata_value: Mapped[str | None]
    actor: Mapped[str]  # who asked for it
    step: Mapped[str] = mapped_column(server_default="batches")
    after: Mapped[UUID] = mapped_column(server_default=str(FIRST))  # where the step goes on
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())
    num_jobs: Mapped[int] = mapped_column(server_default=ZERO)
    num_batches: Mapped[int] = mapped_column(server_default=ZERO)
    num_conversations: Mapped[int] = mapped_column(server_default=ZERO)
    num_archived_jobs: Mapped[int] = mapped_column(server_default=ZERO)
    num_unfinished_batches: Mapped[int] = mapped_column(server_default=ZERO)
    file_ids: Mapped[list[UUID]] = mapped_column(ARRAY(PgUuid), server_default=text("'{}'"))
    error: Mapped[str | None]  # why it does not go on at the moment
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]

    @property
    def person(self) -> Person:
        if self.metadata_name is None:
            return Person(key_id=self.key_id)
        return Person(metadata=(self.metadata_name, self.metadata_value or ""))

    @property
    def is_done(self) -> bool:
        return self.step == "done"

    @property
    def is_waiting(self) -> bool:
        """For batches that were asked to stop."""
        return self.step == "batches" and self.after == FIRST and self.num_unfinished_batches > 0


def ask(session: Session, tenant: Tenant, person: Person, *, actor: str) -> Erasure:
    """Have a user erased. One that is under way already is returned."""
    name, value = person.metadata or (None, None)
    whose = {"tenant_id": tenant.id, "key_id": person.key_id, "metadata_name": name, "metadata_value": value}
    made = session.scalar(
        insert(Erasure).values(id=new_id(), actor=actor, **whose).on_conflict_do_nothing().returning(Erasure.id)
    )
    if made is not None:
        administration.note_erasure(session, "tenant.erase", tenant.name, _by(person), actor=actor)
    unfinished = select(Erasure).filter_by(**whose).where(Erasure.step != "done")
    found = session.scalar(unfinished)
    return found if found is not None else ask(session, tenant, person, actor=actor)  # it has ended just now


def find(session: Session, tenant: Tenant, erasure_id: str) -> Erasure:
    """Raises NotFound."""
    try:
        found = session.get(Erasure, parse_id_of_other(erasure_id, "erasure"))
    except ValueError:
        found = None
    if found is None or found.tenant_id != tenant.id:
        raise NotFound(f"{tenant.name} has no erasure {erasure_id[:64]!r}; list the tenant's erasures for their ids")
    return found


def list_of(session: Session, tenant: Tenant, *, after: UUID | None, limit: int) -> Sequence[Erasure]:
    """Newest first."""
    own = select(Erasure).where(Erasure.tenant_id == tenant.id).order_by(Erasure.id.desc()).limit(limit)
    return session.scalars(own if after is None else own.where(Erasure.id < after)).all()


def take_due(session: Session, erasure_id: UUID | None = None) -> Erasure | None:
    """Lock this erasure, or the one that has been due for longest. None: nothing is to be done here. At the archive it
    is nobody else's for a while."""
    rows = select(Erasure).where(Erasure.step != "done").with_for_update(skip_locked=True)
    if erasure_id is None:
        rows = rows.where(Erasure.due_at <= text(CLOCK)).order_by(Erasure.due_at).limit(1)
    else:
        rows = rows.where(Erasure.id == erasure_id)
    found = session.scalar(rows)
    if found is not None and found.step == "archive":
        _put_off(found, ARCHIVE_SECONDS)
    return found


def take_step(session: Session, found: Erasure, *, has_archive: bool) -> None:
    """Do one step of an erasure that was locked, whose turn comes again after those that are due. Its step must not be
    `archive`, which is done outside of transactions: see `end_archive`. `has_archive`: this process has one; whether
    the tenant's jobs were archived is known since they first were, but not of those that an older release archived."""
    found.due_at, found.error = func.now(), None
    done = _STEPS[found.step](session, found.tenant_id, found.person, after=found.after)
    if found.step == "batches":
        if found.after == FIRST:
            found.num_unfinished_batches = 0
        found.num_batches += done.num_erased
        found.num_unfinished_batches += done.num_unfinished
    elif found.step == "jobs":
        found.num_jobs += done.num_erased
        others = erasure.files_of_others(session, found.tenant_id, found.person, done.batch_ids)
        found.file_ids = [*found.file_ids, *(id_ for id_ in others if id_ not in found.file_ids)]
    else:
        found.num_conversations += done.num_erased
    found.after = done.after or FIRST
    if done.after is None:
        _begin_next(session, found, has_archive=has_archive)


def put_off(session: Session, erasure_id: UUID, *, error: str) -> None:
    """Its step has failed, and is tried again when others have had their turns."""
    found = session.get_one(Erasure, erasure_id, with_for_update=True)
    if not found.is_done:
        found.error = error
        _put_off(found, STOPPING_SECONDS)


def end_archive(session: Session, erasure_id: UUID, num_erased: int) -> None:
    found = session.get_one(Erasure, erasure_id, with_for_update=True)
    if found.step == "archive":  # otherwise another process has done it
        found.num_archived_jobs += num_erased
        found.error = None
        _end(session, found)


_STEPS = {
    "batches": erasure.erase_batches,
    "jobs": erasure.erase_jobs,
    "conversations": erasure.erase_conversations,
}

_NEXT = {"batches": "jobs", "jobs": "conversations"}


def _begin_next(session: Session, found: Erasure, *, has_archive: bool) -> None:
    if found.step in _NEXT:
        found.step = _NEXT[found.step]
    elif found.num_unfinished_batches:  # whose lines have become more jobs
        found.step = "batches"
        _put_off(found, STOPPING_SECONDS)
    elif has_archive or session.get_one(Tenant, found.tenant_id).archived_at is not None:
        found.step = "archive"
        _put_off(found, ARCHIVE_SECONDS)
    else:
        _end(session, found)


def _put_off(found: Erasure, seconds: float) -> None:
    found.due_at = func.now() + text(f"interval '{seconds} seconds'")


def _end(session: Session, found: Erasure) -> None:
    counts = {"jobs": found.num_jobs, "batches": found.num_batches, "conversations": found.num_conversations}
    counts |= {"archived_jobs": found.num_archived_jobs} if found.num_archived_jobs else {}
    tenant = session.get_one(Tenant, found.tenant_id).name
    administration.note_erasure(session, "tenant.erased", tenant, _by(found.person) | counts, actor=found.actor)
    found.step, found.metadata_value, found.finished_at = "done", None, func.now()


def _by(person: Person) -> dict[str, str | None]:
    return {"key_id": person.key_id} if person.metadata is None else {"metadata": person.metadata[0]}
