"""Small jobs, chunks and results for the tests of storage."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy.orm import Session
from ulid import ULID

from domain.jobs import FinishReason, Usage
from domain.requests import GenerationRequest, GenerationResult, ResultChoice, TokenChunk
from storage import jobs
from storage.job_accept import NewJob
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


def claim(session: Session, *ids: UUID, owner: UUID | None = None, **arguments: object) -> list[ClaimedJob]:
    options = {"owner": owner or uuid4(), "model_revision": "main", "lease_seconds": 60.0, **arguments}
    return jobs.claim(session, ids, **options)  # type: ignore[arg-type]


def chunk(number: int, *, index: int = 0, reason: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(sequence_number=number, index=index, text=f"{number} ", token_ids=(number,), finish_reason=reason)


def result(num_tokens: int) -> GenerationResult:
    choice = ResultChoice(index=0, text="x", finish_reason=FinishReason.STOP, num_tokens=num_tokens)
    return GenerationResult(choices=(choice,), usage=Usage(prompt_tokens=3, completion_tokens=num_tokens))


def load_of(session: Session, tenant_id: UUID = DEFAULT_TENANT_ID) -> TenantLoad:
    return session.get_one(TenantLoad, tenant_id, populate_existing=True)
