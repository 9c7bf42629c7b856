"""Batches: created, taken a step further by whoever holds the lock on their row, ended. Their lines are in
`storage/batch_lines.py`.

A step is prepared without a lock, and then written down in one short transaction under the lock of the batch's row, if
the batch still stands where it stood: the lines it moves, their jobs and the batch's own counters change together or
not at all. So it does not matter when the process that takes it is killed, nor how many take the same one. All
functions are synchronous on a `Session` and do not commit.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import Select, case, delete, func, select, text, update
from sqlalchemy.orm import Session

from domain.batches import BatchError, BatchErrors, BatchStatus, FileStatus
from domain.errors import FileNotFound, TooManyQueuedJobs
from domain.ids import external_id, new_id
from storage import files
from storage.batch_tables import UNFINISHED, Batch, BatchLine, File
from storage.webhook_outbox import write_batch_deliveries

MAX_UNFINISHED = 100  # batches of one tenant
MAX_STEP_FAILURES = 3  # of one kind, one after another; then the batch fails

# What was kept for the batch alone may go when every finished job of today goes.
LET_JOBS_GO = text("""
UPDATE jobs j SET prune_at = least(prune_at, statement_timestamp() + make_interval(secs => :ttl_seconds))
FROM batch_lines l WHERE l.batch_id = :batch_id AND j.id = l.job_id AND j.finished_at IS NOT NULL
""")


def create(
    session: Session,
    tenant_id: UUID,
    *,
    input_file_id: UUID,
    endpoint: str,
    completion_window: str,
    window_seconds: int,
    metadata: Mapping[str, str],
    output_ttl_seconds: int,
) -> Batch:
    """Raises FileNotFound, or TooManyQueuedJobs where the tenant has MAX_UNFINISHED batches already."""
    file = session.scalar(
        select(File)
        .where(File.id == input_file_id, File.tenant_id == tenant_id, File.status == FileStatus.PROCESSED)
        .with_for_update(read=True)  # a delete waits, and then finds the batch
    )
    if file is None:
        raise FileNotFound(
            f"there is no file {external_id(input_file_id, 'file')!r}; upload it first", param="input_file_id"
        )
    unfinished = select(func.count()).where(Batch.tenant_id == tenant_id, text(UNFINISHED))
    if (session.scalar(unfinished) or 0) >= MAX_UNFINISHED:
        raise TooManyQueuedJobs(
            f"{MAX_UNFINISHED} of your batches are unfinished; wait for one", retry_after_seconds=60
        )
    batch = Batch(
        id=new_id(),
        tenant_id=tenant_id,
        endpoint=endpoint,
        input_file_id=input_file_id,
        completion_window=completion_window,
        batch_metadata=dict(metadata),
        output_ttl_seconds=output_ttl_seconds,
        expires_at=func.statement_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, window_seconds),
    )
    session.add(batch)
    session.flush()
    return _detached(session, batch)


def find_again(
    session: Session, tenant_id: UUID, *, input_file_id: UUID, endpoint: str, within_seconds: float
) -> Batch | None:
    """The newest batch that the same request made lately: a client asks again for what it did not get."""
    since = func.statement_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, within_seconds)
    same = (Batch.tenant_id == tenant_id, Batch.input_file_id == input_file_id, Batch.endpoint == endpoint)
    batch = session.scalar(select(Batch).where(*same, Batch.created_at > since).order_by(Batch.id.desc()).limit(1))
    return None if batch is None else _detached(session, batch)


def get(session: Session, batch_id: UUID, tenant_id: UUID) -> Batch | None:
    """None: no such batch of this tenant."""
    batch = session.scalar(
        select(Batch)
        .where(Batch.id == batch_id, Batch.tenant_id == tenant_id)
        .execution_options(populate_existing=True)
    )
    return None if batch is None else _detached(session, batch)


def of_file(session: Session, file_id: UUID) -> Batch | None:
    """The batch that writes this file."""
    batch = session.scalar(select(Batch).where((Batch.output_file_id == file_id) | (Batch.error_file_id == file_id)))
    return None if batch is None else _detached(session, batch)


def list_batches(
    session: Session, tenant_id: UUID, *, after: UUID | None, limit: int, order: Literal["asc", "desc"] = "desc"
) -> list[Batch]:
    """One page in the order of ids, which is that of creation; `after` is the last id of the page before."""
    statement: Select[Batch] = select(Batch).where(Batch.tenant_id == tenant_id)
    if after is not None:
        statement = statement.where(Batch.id > after if order == "asc" else Batch.id < after)
    statement = statement.order_by(Batch.id.asc() if order == "asc" else Batch.id.desc()).limit(limit)
    found = list(session.scalars(statement.execution_options(populate_existing=True)))
    session.expunge_all()
    return found


def cancel(session: Session, batch_id: UUID, tenant_id: UUID) -> Batch | None:
    """Ask it to stop; one that has ended, or is about to, stays as it is. None: no such batch of this tenant."""
    is_open = Batch.status.in_([BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS])
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.tenant_id == tenant_id, is_open)
        .values(status=BatchStatus.CANCELLING, cancelling_at=func.statement_timestamp())
    )
    return get(session, batch_id, tenant_id)


# What maintenance does


def unfinished_ids(session: Session) -> dict[UUID, list[UUID]]:
    """By tenant, each tenant's oldest first."""
    ids_by_tenant: dict[UUID, list[UUID]] = {}
    for row in session.execute(select(Batch.tenant_id, Batch.id).where(text(UNFINISHED)).order_by(Batch.id)):
        ids_by_tenant.setdefault(row.tenant_id, []).append(row.id)
    return ids_by_tenant


def find_unfinished(session: Session, batch_id: UUID) -> Batch | None:
    """As it stands now, without a lock. None: it has ended."""
    batch = session.scalar(select(Batch).where(Batch.id == batch_id, text(UNFINISHED)))
    if batch is not None:
        session.expunge(batch)
    return batch


def lock(session: Session, batch_id: UUID, status: BatchStatus) -> Batch | None:
    """The right to write down a step of a batch with this status, until the transaction ends. None: somebody else is at
    it, or the status is another one by now."""
    statement = select(Batch).where(Batch.id == batch_id, Batch.status == status)
    return session.scalar(
        statement.with_for_update(skip_locked=True, key_share=True).execution_options(populate_existing=True)
    )


def note_step_failure(session: Session, batch_id: UUID, way: str) -> bool:
    """A step of it failed in this way. True: so did the ones before, and it will not get any further."""
    is_same = Batch.step_failure == way
    statement = (
        update(Batch)
        .where(Batch.id == batch_id, text(UNFINISHED))
        .values(step_failure=way, num_step_failures=case((is_same, Batch.num_step_failures + 1), else_=1))
        .returning(Batch.num_step_failures)
    )
    return (session.scalar(statement) or 0) >= MAX_STEP_FAILURES


def forget_step_failures(session: Session, batch_id: UUID) -> None:
    """A step went well."""
    session.execute(update(Batch).where(Batch.id == batch_id).values(step_failure=None, num_step_failures=0))


def now(session: Session) -> datetime:
    """The database's clock."""
    moment = session.scalar(select(func.statement_timestamp()))
    assert isinstance(moment, datetime)
    return moment


def begin(session: Session, batch: Batch) -> None:
    """Every line is valid."""
    name = external_id(batch.id, "batch")
    batch.output_file_id = files.create_live(session, batch.tenant_id, f"{name}_output.jsonl")
    batch.error_file_id = files.create_live(session, batch.tenant_id, f"{name}_error.jsonl")
    batch.status, batch.in_progress_at = BatchStatus.IN_PROGRESS, now(session)


def fail(session: Session, batch: Batch, errors: BatchErrors) -> None:
    """The file is refused: no line of it runs."""
    batch.errors = errors
    _end(session, batch, BatchStatus.FAILED)


def expire(session: Session, batch: Batch) -> None:
    """Its window closed before its file was read to the end: no line of it runs."""
    _end(session, batch, BatchStatus.EXPIRED)


def give_up(session: Session, batch_id: UUID, error: BatchError, *, job_ttl_seconds: int) -> None:
    """A batch that cannot be taken any further fails. What was written of its output can be read; its jobs are let go,
    and the caller asks those in flight to stop."""
    batch = session.scalar(
        select(Batch)
        .where(Batch.id == batch_id, text(UNFINISHED))
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if batch is not None:
        batch.errors = BatchErrors(data=(error,))
        _close_files(session, batch, job_ttl_seconds)
        _end(session, batch, BatchStatus.FAILED)


def num_in_flight(session: Session, tenant_id: UUID) -> int:
    """Lines of all its batches whose jobs have not been seen to end."""
    session.flush()
    total = select(func.coalesce(func.sum(Batch.num_in_flight), 0)).where(
        Batch.tenant_id == tenant_id, text(UNFINISHED)
    )
    return int(session.scalar(total) or 0)


def end(session: Session, batch: Batch, *, job_ttl_seconds: int) -> None:
    """Everything is written: freeze the files, let the jobs go, tell the webhooks."""
    _close_files(session, batch, job_ttl_seconds)
    if batch.cancelling_at is not None:
        _end(session, batch, BatchStatus.CANCELLED)
    elif batch.expired_at is not None:
        _end(session, batch, BatchStatus.EXPIRED)
    else:
        _end(session, batch, BatchStatus.COMPLETED)


def _close_files(session: Session, batch: Batch, job_ttl_seconds: int) -> None:
    for name in ("output_file_id", "error_file_id"):
        file_id = getattr(batch, name)
        if file_id is not None and not files.freeze(session, file_id, ttl_seconds=batch.output_ttl_seconds):
            setattr(batch, name, None)
    session.execute(LET_JOBS_GO, {"batch_id": batch.id, "ttl_seconds": job_ttl_seconds})


def _end(session: Session, batch: Batch, status: BatchStatus) -> None:
    batch.status = status
    setattr(batch, f"{status.value}_at", now(session))
    session.flush()
    session.execute(delete(BatchLine).where(BatchLine.batch_id == batch.id))
    write_batch_deliveries(session, batch.id, batch.tenant_id, status.value)


# What dispatch asks


def has_unfinished(session: Session) -> bool:
    return session.scalar(select(Batch.id).where(text(UNFINISHED)).limit(1)) is not None


def _detached(session: Session, batch: Batch) -> Batch:
    session.refresh(batch)
    session.expunge(batch)
    return batch
