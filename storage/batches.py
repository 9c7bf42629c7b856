"""Batches and their lines: created, advanced under a lock, ended.

A step is prepared without a lock. It is then written in one short transaction, under the lock on the batch's row, and
only if the batch has not changed: its lines, their jobs and the batch's counters change together or not at all. A
process may therefore be killed at any time, and several may attempt the same step. All functions are synchronous on a
`Session` and do not commit; those that write need the lock on the batch's row.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal
from uuid import UUID

from sqlalchemy import Select, case, delete, func, select, text, update
from sqlalchemy.orm import Session

from domain.errors import FileNotFound, TooManyQueuedJobs
from domain.job_options import NO_TIMEOUTS, Timeouts
from domain.jobs import (
    PIECE_BYTES,
    TERMINAL_BATCH_STATUSES,
    BatchError,
    BatchErrors,
    BatchStatus,
    FileStatus,
    external_id,
    new_id,
)
from storage import files
from storage.files import UNFINISHED, Batch, BatchLine, File
from storage.webhooks import write_batch_deliveries

MAX_UNFINISHED = 100  # unfinished batches per tenant

MAX_STEP_FAILURES = 3  # consecutive failures of one kind before the batch fails

# Jobs that were kept only for the batch may now be pruned like jobs that finish today.
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
    key_id: str | None = None,
    timeouts: Timeouts = NO_TIMEOUTS,
    traceparent: str | None = None,
) -> Batch:
    """Create a batch. Raises FileNotFound, or TooManyQueuedJobs if the tenant has MAX_UNFINISHED unfinished batches."""
    file = session.scalar(
        select(File)
        .where(File.id == input_file_id, File.tenant_id == tenant_id, File.status == FileStatus.PROCESSED)
        .with_for_update(read=True)  # a concurrent delete of the file waits, and then finds the batch
    )
    if file is None:
        raise FileNotFound(
            f"there is no file {external_id(input_file_id, 'file')!r}; upload it first", param="input_file_id"
        )
    unfinished = select(func.count()).where(Batch.tenant_id == tenant_id, text(UNFINISHED))
    if (session.scalar(unfinished) or 0) >= MAX_UNFINISHED:
        raise TooManyQueuedJobs(
            f"{MAX_UNFINISHED} of your batches are unfinished; wait for one to end", retry_after_seconds=60
        )
    batch = Batch(
        id=new_id(),
        tenant_id=tenant_id,
        endpoint=endpoint,
        input_file_id=input_file_id,
        completion_window=completion_window,
        batch_metadata=dict(metadata),
        output_ttl_seconds=output_ttl_seconds,
        key_id=key_id,
        start_timeout_seconds=timeouts.start_seconds,
        run_timeout_seconds=timeouts.run_seconds,
        traceparent=traceparent,
        expires_at=func.statement_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, window_seconds),
    )
    session.add(batch)
    session.flush()
    return _detached(session, batch)


def find_again(
    session: Session, tenant_id: UUID, *, input_file_id: UUID, endpoint: str, within_seconds: float
) -> Batch | None:
    """The newest batch that the same request created recently, for clients that retry after losing the answer."""
    since = func.statement_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, within_seconds)
    same = (Batch.tenant_id == tenant_id, Batch.input_file_id == input_file_id, Batch.endpoint == endpoint)
    batch = session.scalar(select(Batch).where(*same, Batch.created_at > since).order_by(Batch.id.desc()).limit(1))
    return None if batch is None else _detached(session, batch)


def create_with_file(
    session: Session,
    tenant_id: UUID,
    content: bytes,
    *,
    file_name: str,
    max_bytes: int,
    endpoint: str,
    completion_window: str,
    window_seconds: int,
    metadata: Mapping[str, str],
    ttl_seconds: int,
    key_id: str | None = None,
    timeouts: Timeouts = NO_TIMEOUTS,
    traceparent: str | None = None,
) -> Batch:
    """A batch whose lines came with the request for it. Raises as `create` does, and InsufficientQuota where the
    tenant's files have `max_bytes`."""
    file_id = files.begin_upload(session, tenant_id, max_bytes=max_bytes)
    for number, first in enumerate(range(0, len(content), PIECE_BYTES)):
        files.append(session, file_id, number, content[first : first + PIECE_BYTES])
    files.finish_upload(
        session,
        file_id,
        tenant_id,
        filename=file_name,
        purpose="batch",
        ttl_seconds=ttl_seconds,
        max_bytes=max_bytes,
    )
    return create(
        session,
        tenant_id,
        input_file_id=file_id,
        endpoint=endpoint,
        completion_window=completion_window,
        window_seconds=window_seconds,
        metadata=metadata,
        output_ttl_seconds=ttl_seconds,
        key_id=key_id,
        timeouts=timeouts,
        traceparent=traceparent,
    )


def find_with_file(session: Session, tenant_id: UUID, *, file_name: str, within_seconds: float) -> Batch | None:
    """The newest batch that was created recently with a file of this name."""
    since = func.statement_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, within_seconds)
    batch = session.scalar(
        select(Batch)
        .join(File, File.id == Batch.input_file_id)
        .where(Batch.tenant_id == tenant_id, File.filename == file_name, Batch.created_at > since)
        .order_by(Batch.id.desc())
        .limit(1)
    )
    return None if batch is None else _detached(session, batch)


def delete_ended(session: Session, batch_id: UUID, tenant_id: UUID) -> bool:
    """Delete a batch with its files. False: the tenant has no such batch that has ended."""
    batch = session.scalar(
        select(Batch)
        .where(Batch.id == batch_id, Batch.tenant_id == tenant_id, Batch.status.in_(TERMINAL_BATCH_STATUSES))
        .with_for_update()
    )
    if batch is None:
        return False
    file_ids = [id_ for id_ in (batch.input_file_id, batch.output_file_id, batch.error_file_id) if id_ is not None]
    session.delete(batch)
    session.flush()
    session.execute(delete(File).where(File.id.in_(file_ids), File.tenant_id == tenant_id))
    return True


def get(session: Session, batch_id: UUID, tenant_id: UUID) -> Batch | None:
    """The batch, or None if the tenant has no such batch."""
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
    session: Session,
    tenant_id: UUID,
    *,
    after: UUID | None,
    limit: int,
    order: Literal["asc", "desc"] = "desc",
    endpoint: str | None = None,
) -> list[Batch]:
    """One page in the order of ids, which is the order of creation; `after` is the last id of the previous page."""
    statement: Select[Batch] = select(Batch).where(Batch.tenant_id == tenant_id)
    if endpoint is not None:
        statement = statement.where(Batch.endpoint == endpoint)
    if after is not None:
        statement = statement.where(Batch.id > after if order == "asc" else Batch.id < after)
    statement = statement.order_by(Batch.id.asc() if order == "asc" else Batch.id.desc()).limit(limit)
    found = list(session.scalars(statement.execution_options(populate_existing=True)))
    session.expunge_all()
    return found


def cancel(session: Session, batch_id: UUID, tenant_id: UUID) -> Batch | None:
    """Ask the batch to stop. Returns it unchanged if it has ended or is about to; None if the tenant has no such
    batch."""
    is_open = Batch.status.in_([BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS])
    session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.tenant_id == tenant_id, is_open)
        .values(status=BatchStatus.CANCELLING, cancelling_at=func.statement_timestamp())
    )
    return get(session, batch_id, tenant_id)


# What maintenance does


def unfinished_ids(session: Session) -> dict[UUID, list[UUID]]:
    """The ids of unfinished batches by tenant, each tenant's oldest first."""
    ids_by_tenant: dict[UUID, list[UUID]] = {}
    for row in session.execute(select(Batch.tenant_id, Batch.id).where(text(UNFINISHED)).order_by(Batch.id)):
        ids_by_tenant.setdefault(row.tenant_id, []).append(row.id)
    return ids_by_tenant


def find_unfinished(session: Session, batch_id: UUID) -> Batch | None:
    """The current row, without a lock; None if the batch has ended."""
    batch = session.scalar(select(Batch).where(Batch.id == batch_id, text(UNFINISHED)))
    if batch is not None:
        session.expunge(batch)
    return batch


def lock(session: Session, batch_id: UUID, status: BatchStatus) -> Batch | None:
    """Lock a batch with this status until the transaction ends, to write a step. None if another process has the lock
    or the status has changed."""
    statement = select(Batch).where(Batch.id == batch_id, Batch.status == status)
    return session.scalar(
        statement.with_for_update(skip_locked=True, key_share=True).execution_options(populate_existing=True)
    )


def note_step_failure(session: Session, batch_id: UUID, way: str) -> bool:
    """Record that a step failed in this way. Returns True if it keeps failing like this, so that the batch must be
    given up."""
    is_same = Batch.step_failure == way
    statement = (
        update(Batch)
        .where(Batch.id == batch_id, text(UNFINISHED))
        .values(step_failure=way, num_step_failures=case((is_same, Batch.num_step_failures + 1), else_=1))
        .returning(Batch.num_step_failures)
    )
    return (session.scalar(statement) or 0) >= MAX_STEP_FAILURES


def forget_step_failures(session: Session, batch_id: UUID) -> None:
    """Record that a step succeeded."""
    session.execute(update(Batch).where(Batch.id == batch_id).values(step_failure=None, num_step_failures=0))


def now(session: Session) -> datetime:
    """The database's clock."""
    moment = session.scalar(select(func.statement_timestamp()))
    assert isinstance(moment, datetime)
    return moment


def begin(session: Session, batch: Batch) -> None:
    """Start the batch, all of whose lines are valid."""
    name = external_id(batch.id, "batch")
    batch.output_file_id = files.create_live(session, batch.tenant_id, f"{name}_output.jsonl")
    batch.error_file_id = files.create_live(session, batch.tenant_id, f"{name}_error.jsonl")
    batch.status, batch.in_progress_at = BatchStatus.IN_PROGRESS, now(session)


def fail(session: Session, batch: Batch, errors: BatchErrors) -> None:
    """Fail the batch because of its file; none of its lines will run."""
    batch.errors = errors
    _end(session, batch, BatchStatus.FAILED)


def expire(session: Session, batch: Batch) -> None:
    """End the batch because its completion window closed before the whole file was read; none of its lines will run."""
    _end(session, batch, BatchStatus.EXPIRED)


def give_up(session: Session, batch_id: UUID, error: BatchError, *, job_ttl_seconds: int) -> None:
    """Fail a batch that cannot be advanced. Its output so far can be read, and its jobs may be pruned. The caller must
    ask running jobs to stop."""
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
    """The number of the tenant's lines, over all batches, whose jobs are not known to have ended."""
    session.flush()
    total = select(func.coalesce(func.sum(Batch.num_in_flight), 0)).where(
        Batch.tenant_id == tenant_id, text(UNFINISHED)
    )
    return int(session.scalar(total) or 0)


def end(session: Session, batch: Batch, *, job_ttl_seconds: int) -> None:
    """End a batch whose output is complete: freeze its files, let its jobs be pruned, notify webhooks."""
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
