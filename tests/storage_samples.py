"""Small jobs, chunks and results for the tests of storage."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import text
from sqlalchemy.orm import Session
from ulid import ULID

from domain.jobs import FinishReason, Lane, Usage
from domain.requests import GenerationRequest, GenerationResult, ResultChoice, TokenChunk
from storage import jobs
from storage.job_accept import NewJob
from storage.job_statements import BEGUN, CHARGE, RUNNABLE, claimed
from storage.jobs import ClaimedJob
from storage.tables import DEFAULT_TENANT_ID, TenantLoad

MODEL = "test-model"
PAST = datetime.now(UTC) - timedelta(hours=1)


def new_job(**fields: object) -> NewJob:
    job = NewJob(
        id=UUID(bytes=ULID().bytes),
        tenant_id=DEFAULT_TENANT_ID,
        request=GenerationRequest(model=MODEL, prompt="Once"),
        prompt_token_ids=[1, 2, 3],
        model_revision="main",
        max_tokens=16,
        seed=7,
        max_failures=3,
        result_ttl_seconds=60,
        request_hash=b"hash",
    )
    return replace(job, **fields)  # type: ignore[arg-type]


THESE = f"""j.id = ANY(CAST(:ids AS uuid[])) AND {RUNNABLE} AND j.lane = :lane AND j.cancel_requested_at IS NULL
    AND (NOT {BEGUN} OR j.model_revision = :model_revision)"""

CLAIM_THESE = text(
    "WITH "
    + claimed(f"""
pick AS MATERIALIZED (
    SELECT j.id, array_position(CAST(:ids AS uuid[]), j.id) AS place, j.paused_at, {CHARGE} AS charge,
        1 AS num_sequences
    FROM jobs j
    WHERE {THESE} ORDER BY j.id FOR NO KEY UPDATE
)""")
)


def claim_these(
    session: Session,
    job_ids: Sequence[UUID],
    *,
    owner: UUID,
    model_revision: str,
    lease_seconds: float,
    lane: Lane = Lane.STANDARD,
) -> list[ClaimedJob]:
    """Like `jobs.claim`, but claims those of these jobs that may run, in this order, whose turn it may be."""
    parameters = {
        "ids": list(job_ids),
        "owner": owner,
        "model_revision": model_revision,
        "lease_seconds": lease_seconds,
        "lane": lane.value,
        "num_slots": len(job_ids),
    }
    rows = session.execute(CLAIM_THESE, parameters).all()
    return jobs.claimed_jobs(session, rows, owner=owner)


def claim(session: Session, *ids: UUID, owner: UUID | None = None, **arguments: object) -> list[ClaimedJob]:
    options = {"owner": owner or uuid4(), "model_revision": "main", "lease_seconds": 60.0, **arguments}
    return claim_these(session, ids, **options)  # type: ignore[arg-type]


def chunk(number: int, *, index: int = 0, reason: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(sequence_number=number, index=index, text=f"{number} ", token_ids=(number,), finish_reason=reason)


def result(num_tokens: int) -> GenerationResult:
    choice = ResultChoice(index=0, text="x", finish_reason=FinishReason.STOP, num_tokens=num_tokens)
    return GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=num_tokens))


def load_of(session: Session, tenant_id: UUID = DEFAULT_TENANT_ID) -> TenantLoad:
    return session.get_one(TenantLoad, tenant_id, populate_existing=True)
