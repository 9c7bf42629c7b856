"""Batches and their lines: created, advanced under a lock, ended.

A step is prepared without a lock. It is then written in one short transaction, under the lock on the batch's row, and
only if the batch has not changed: its lines, their jobs and the batch's counters change together or not at all. A
process may therefore be killed at any time, and several may attempt the same step. All functions are synchronous on a
`Session` and do not commit; those that write need the lock on the batch's row.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from typing import Literal
from uuid import UUID

from sqlalchemy import Select, case, delete, func, select, text, update
from sqlalchemy.orm import Session

from domain.errors import FileNotFound, TooManyQueuedJobs
from domain.jobs import (
    PIECE_BYTES,
    TERMINAL_BATCH_STATUSES,
    BatchError,
    BatchErrors,
    BatchStatus,
    FileStatus,
    LineOutcome,
    LineRefusal,
    external_id,
    new_id,
)
from storage import files
from storage.files import UNFINISHED, Batch, BatchLine, File
from storage.job_queries import JobRecord
from storage.tables import Job, JobResult
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


# A line has also ended if the tenant has deleted its job.
RECORD_ENDED = text("""
WITH ended AS MATERIALIZED (
    SELECT l.line, coalesce(j.status, 'cancelled') AS outcome, j.num_prompt_tokens, j.num_committed_tokens
    FROM batch_lines l LEFT JOIN jobs j ON j.id = l.job_id
    WHERE l.batch_id = :batch_id AND l.job_id IS NOT NULL AND l.outcome IS NULL
        AND (j.id IS NULL OR j.finished_at IS NOT NULL)
),
recorded AS (
    UPDATE batch_lines l SET outcome = ended.outcome FROM ended WHERE l.batch_id = :batch_id AND l.line = ended.line
)
SELECT count(*) AS num_ended, count(*) FILTER (WHERE outcome = 'completed') AS num_completed,
    coalesce(sum(num_prompt_tokens) FILTER (WHERE outcome = 'completed'), 0) AS prompt_tokens,
    coalesce(sum(num_committed_tokens) FILTER (WHERE outcome = 'completed'), 0) AS completion_tokens
FROM ended
""")

ADD_LINES = text("""
INSERT INTO batch_lines (batch_id, line, custom_id, first_byte, num_bytes, prefix_hash)
SELECT :batch_id, * FROM unnest(CAST(:lines AS int[]), CAST(:custom_ids AS text[]), CAST(:firsts AS bigint[]),
    CAST(:lengths AS int[]), CAST(:hashes AS bigint[]))
ON CONFLICT DO NOTHING RETURNING line
""")

ATTACH = text("""
UPDATE batch_lines l SET job_id = n.job_id, num_sequences = n.num_sequences
FROM unnest(CAST(:lines AS int[]), CAST(:job_ids AS uuid[]), CAST(:nums AS int[])) AS n(line, job_id, num_sequences)
WHERE l.batch_id = :batch_id AND l.line = n.line
""")

END_WAITING = text("""
WITH waiting AS (SELECT line FROM batch_lines WHERE batch_id = :batch_id AND job_id IS NULL AND outcome IS NULL),
ended AS (
    UPDATE batch_lines l SET outcome = :outcome FROM waiting WHERE l.batch_id = :batch_id AND l.line = waiting.line
)
SELECT count(*) FROM waiting
""")

# The number of sequences of lines that workers are running or are about to get.
OUTSTANDING = text("""
SELECT coalesce(sum(l.num_sequences), 0) FROM batch_lines l JOIN jobs j ON j.id = l.job_id
WHERE l.job_id IS NOT NULL AND l.outcome IS NULL AND j.model = :model AND (j.status = 'in_progress'
    OR (j.status = 'queued' AND j.num_dispatches > 0 AND j.dispatch_at > statement_timestamp()))
""")

TAKE_TURN = text("SELECT pg_try_advisory_xact_lock(hashtextextended('celeriac batches of ' || :model, 0))")


@dataclass(frozen=True, slots=True)
class NewLine:
    """A valid line and its position in the file."""

    line: int
    custom_id: str
    first_byte: int
    num_bytes: int
    prefix_hash: int


@dataclass(frozen=True, slots=True)
class EndedLine:
    """A line that has ended; `record` is None if it had no job, or its job was deleted."""

    line: BatchLine
    record: JobRecord | None


def add_lines(session: Session, batch_id: UUID, lines: Sequence[NewLine]) -> set[int]:
    """Add lines to the batch. Returns the numbers of those whose custom_id was not taken."""
    columns = {
        "lines": [line.line for line in lines],
        "custom_ids": [line.custom_id for line in lines],
        "firsts": [line.first_byte for line in lines],
        "lengths": [line.num_bytes for line in lines],
        "hashes": [line.prefix_hash for line in lines],
    }
    return set(session.execute(ADD_LINES, columns | {"batch_id": batch_id}).scalars())


def record_ended(session: Session, batch: Batch) -> None:
    """Record which lines' jobs have ended."""
    ended = session.execute(RECORD_ENDED, {"batch_id": batch.id}).one()
    batch.num_in_flight -= ended.num_ended
    batch.num_completed += ended.num_completed
    batch.num_failed += ended.num_ended - ended.num_completed
    batch.prompt_tokens += int(ended.prompt_tokens)
    batch.completion_tokens += int(ended.completion_tokens)


def waiting_lines(session: Session, batch_id: UUID, *, limit: int, max_bytes: int) -> list[BatchLine]:
    """The next lines without a job, at least one if there are any, up to `max_bytes` in total. Lines with the same
    beginning are adjacent."""
    statement = (
        select(BatchLine)
        .where(BatchLine.batch_id == batch_id, BatchLine.job_id.is_(None), BatchLine.outcome.is_(None))
        .order_by(BatchLine.prefix_hash, BatchLine.line)
        .limit(limit)
    )
    lines = list(session.scalars(statement))
    return lines[: num_within([line.num_bytes for line in lines], max_bytes)]


def still_waiting(session: Session, batch_id: UUID, lines: Iterable[int]) -> dict[int, BatchLine]:
    """Those of these lines that still have neither a job nor an outcome, by number."""
    waiting = (BatchLine.job_id.is_(None), BatchLine.outcome.is_(None))
    statement = select(BatchLine).where(BatchLine.batch_id == batch_id, BatchLine.line.in_(list(lines)), *waiting)
    found = session.scalars(statement.execution_options(populate_existing=True))
    return {line.line: line for line in found}


def attach_jobs(session: Session, batch: Batch, jobs: Mapping[int, tuple[UUID, int]]) -> None:
    """Record the lines' jobs. `jobs` maps a line number to the job's id and its number of sequences."""
    columns = {
        "lines": list(jobs),
        "job_ids": [job_id for job_id, _ in jobs.values()],
        "nums": [num_sequences for _, num_sequences in jobs.values()],
    }
    session.execute(ATTACH, columns | {"batch_id": batch.id})
    batch.num_in_flight += len(jobs)


def refuse_line(batch: Batch, line: BatchLine, refusal: LineRefusal) -> None:
    """Record that this line cannot become a job."""
    line.outcome, line.refusal = LineOutcome.FAILED, refusal
    batch.num_failed += 1


def end_waiting_lines(session: Session, batch: Batch, outcome: LineOutcome) -> None:
    """End all lines that have no job yet."""
    batch.num_failed += session.execute(END_WAITING, {"batch_id": batch.id, "outcome": outcome.value}).scalar_one()


def in_flight_job_ids(session: Session, batch_id: UUID) -> list[UUID]:
    statement = select(BatchLine.job_id).where(
        BatchLine.batch_id == batch_id, BatchLine.job_id.is_not(None), BatchLine.outcome.is_(None)
    )
    return [job_id for job_id in session.scalars(statement) if job_id is not None]


def ended_lines(
    session: Session, batch_id: UUID, *, after: int, limit: int, max_bytes: int, is_completed: bool | None = None
) -> list[EndedLine]:
    """Ended lines with a number above `after`, in order. `is_completed` selects completed lines, the others, or (None)
    all. At least one line if there are any, up to `max_bytes` of stored requests and results in total."""
    num_bytes = func.coalesce(func.pg_column_size(JobResult.result), 0) + BatchLine.num_bytes
    statement = (
        select(BatchLine, num_bytes)
        .outerjoin(JobResult, JobResult.job_id == BatchLine.job_id)
        .where(BatchLine.batch_id == batch_id, BatchLine.line > after, BatchLine.outcome.is_not(None))
    )
    if is_completed is not None:
        was_completed = BatchLine.outcome == LineOutcome.COMPLETED
        statement = statement.where(was_completed if is_completed else ~was_completed)
    found = session.execute(statement.order_by(BatchLine.line).limit(limit)).all()
    lines = [row[0] for row in found[: num_within([row[1] for row in found], max_bytes)]]
    rows = session.execute(
        select(Job, JobResult.result)
        .outerjoin(JobResult, JobResult.job_id == Job.id)
        .where(Job.id.in_([line.job_id for line in lines if line.job_id is not None]))
    )
    record_by_id = {row[0].id: JobRecord(row[0], None, row[1]) for row in rows}
    return [EndedLine(line, record_by_id.get(line.job_id) if line.job_id is not None else None) for line in lines]


def num_within(sizes: Iterable[int], bound: int) -> int:
    """How many sizes, from the first on, add up to at most `bound`; at least 1."""
    return max(1, sum(total <= bound for total in accumulate(sizes)))


# What dispatch asks


def count_outstanding(session: Session, model: str) -> int | None:
    """The number of sequences of batch lines that run or are about to. No other process can count them until the
    transaction ends; None if another one already does."""
    if not session.execute(TAKE_TURN, {"model": model}).scalar_one():
        return None
    return num_outstanding(session, model)


def num_outstanding(session: Session, model: str) -> int:
    """The same count, without the lock."""
    return int(session.execute(OUTSTANDING, {"model": model}).scalar_one())
