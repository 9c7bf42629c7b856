"""What only the jobs of the OpenAI routes need: a retry finds its job, and an answer that was delivered is noted."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from storage.jobs_sql import CLOCK

# ruff: noqa: S608  (only CLOCK is put into the text; values are bound)

ATTACHABLE = text(f"""
SELECT id FROM jobs WHERE tenant_id = :tenant_id AND request_hash = :request_hash AND endpoint <> 'jobs'
    AND created_at > {CLOCK} - make_interval(secs => :within_seconds) AND cancel_requested_at IS NULL
    AND status IN ('queued', 'in_progress', 'completed') AND delivered_at IS NULL
ORDER BY id DESC LIMIT 1
""")

MARK_DELIVERED = text(f"""
UPDATE jobs SET delivered_at = {CLOCK} WHERE id = ANY(CAST(:ids AS uuid[])) AND delivered_at IS NULL
    AND (SELECT set_config('synchronous_commit', 'off', true)) = 'off'
""")


def find_attachable(session: Session, tenant_id: UUID, request_hash: bytes, *, within_seconds: float) -> UUID | None:
    """The newest job for the same request that is under way, or done and nobody has its answer."""
    parameters = {"tenant_id": tenant_id, "request_hash": request_hash, "within_seconds": within_seconds}
    job_id: UUID | None = session.scalar(ATTACHABLE, parameters)
    return job_id


def mark_delivered(session: Session, job_ids: Sequence[UUID]) -> None:
    """Note that a client has the whole answer: a retry of the same request is a new one from now on. The note need not
    survive a crash of the database."""
    session.execute(MARK_DELIVERED, {"ids": list(job_ids)})
