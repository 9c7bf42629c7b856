"""Jobs that are due to be deleted, whole, for the archive that gets them first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import orjson
from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, Engine, Text, cast, func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from domain.jobs import external_id
from storage import job_ends as ends
from storage.tables import Job, JobPayload, JobResult, Tenant

MAX_READ = 50  # jobs at a time, all of whose texts are in memory
ARCHIVE_LOCK = 0x0CE1_E41A_AC41  # a key of PostgreSQL's advisory locks

WAIT_AT_MOST = text("SELECT set_config('lock_timeout', :wait, true)")
TAKE_LOCK = text("SELECT pg_try_advisory_xact_lock(:key)")
WAIT_FOR_LOCK = text("SELECT pg_advisory_xact_lock(:key)")

# The lock is held as long as its transaction, in which nothing else happens meanwhile. This is its last statement,
# since it needs no snapshot: the last query's would be kept, and nothing vacuumed, for as long as an erasure takes.
HOLD_ON = text("SET LOCAL idle_in_transaction_session_timeout = 0")

# Columns of a job that say what it was and how it went; how it was run is of no use after it.
COLUMNS = (
    "model",
    "adapter",
    "model_revision",
    "endpoint",
    "kind",
    "status",
    "priority",
    "attempt",
    "num_failures",
    "finish_reason",
    "num_prompt_tokens",
    "num_committed_tokens",
    "max_tokens",
    "seed",
    "created_at",
    "started_at",
    "first_token_at",
    "finished_at",
    "key_id",
    "idempotency_key",
)


@dataclass(frozen=True, slots=True)
class DueJob:
    """`line` is what the archive keeps of it."""

    id: UUID
    tenant_id: UUID
    day: date  # on which it ended, UTC
    line: dict[str, Any]


def list_due(session: Session) -> list[DueJob]:
    """The jobs that may be deleted now, those that are due longest first. They are not locked: whoever reads them holds
    the archive's lock."""
    due = [
        row.id for statement in (ends.DUE, ends.DUE_RETAINED) for row in session.execute(statement, {"limit": MAX_READ})
    ]
    ids = list(dict.fromkeys(due))[:MAX_READ]
    texts = cast(JobPayload.request, Text), cast(JobResult.result, Text)
    statement = select(Job, *texts).where(Job.id.in_(ids), Job.finished_at.is_not(None))
    statement = statement.outerjoin(JobPayload, JobPayload.job_id == Job.id)
    rows = session.execute(statement.outerjoin(JobResult, JobResult.job_id == Job.id)).all()
    by_id = {job.id: _due_job(job, request, result) for job, request, result in rows}
    return [by_id[id_] for id_ in ids if id_ in by_id]


def _due_job(job: Job, request: str | None, result: str | None) -> DueJob:
    """Request and result as they are stored, whichever release has written them."""
    assert job.finished_at is not None
    line: dict[str, Any] = {"id": external_id(job.id)}
    line |= {name: _plain(getattr(job, name)) for name in COLUMNS}
    line |= {
        "metadata": job.job_metadata,
        "error": None if job.error is None else job.error.model_dump(mode="json"),
        "request": None if request is None else orjson.Fragment(request),
        "result": None if result is None else orjson.Fragment(result),
    }
    return DueJob(job.id, job.tenant_id, job.finished_at.astimezone(UTC).date(), line)


def _plain(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value


def delete_archived(session: Session, tenant_id: UUID, job_ids: Sequence[UUID]) -> int:
    """Delete those of the tenant's jobs that are still due, with everything that belongs to them, and note that the
    archive has jobs of it."""
    is_first = (Tenant.id == tenant_id) & Tenant.archived_at.is_(None)
    session.execute(update(Tenant).where(is_first).values(archived_at=func.now()))
    deleted = session.connection().execute(ends.DELETE_DUE, {"ids": list(job_ids)})
    return int(deleted.rowcount)


def _take_lock(connection: Connection, wait_seconds: int) -> bool:
    if not wait_seconds:
        return bool(connection.scalar(TAKE_LOCK, {"key": ARCHIVE_LOCK}))
    connection.execute(WAIT_AT_MOST, {"wait": f"{wait_seconds}s"})
    try:
        connection.execute(WAIT_FOR_LOCK, {"key": ARCHIVE_LOCK})
    except OperationalError as exc:
        if isinstance(exc.orig, LockNotAvailable):
            return False
        raise
    return True


@contextmanager
def archive_lock(database: Engine, *, wait_seconds: int = 0) -> Iterator[bool]:
    """Holds the lock of the archive; whether it was got. Only one process at a time writes to the archive or erases
    from it. The lock is a transaction's, since behind a pooler nothing else lasts; that transaction keeps no
    snapshot, so it keeps no table from being vacuumed."""
    with database.connect() as connection:
        is_taken = _take_lock(connection, wait_seconds)
        if is_taken:
            connection.execute(HOLD_ON)
        yield is_taken
