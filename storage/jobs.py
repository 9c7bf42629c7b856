"""The job protocol: every transition of a job is one fenced compare-and-set statement of this module.

The only writer of `Job.status`. All functions are synchronous on a `Session` and do not commit; the API calls them
through `AsyncSession.run_sync`. Only the database's clock sets and judges leases and deadlines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy.orm import Session

from domain.chunks import TokenChunk
from domain.jobs import FinishReason, JobError, JobStatus, Lane
from domain.requests import GenerationRequest, GenerationResult


@dataclass(frozen=True, slots=True)
class NewJob:
    """A validated request on its way into the job table. `request` has every default resolved."""

    id: UUID
    tenant_id: UUID
    request: GenerationRequest
    prompt_token_ids: Sequence[int]
    model_revision: str
    max_tokens: int
    seed: int
    max_failures: int
    result_ttl_seconds: int
    request_hash: bytes
    idempotency_key: str | None = None
    priority: int = 0
    deadline_at: datetime | None = None
    start_timeout_seconds: float | None = None
    run_timeout_seconds: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)


class AcceptOutcome(StrEnum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # same idempotency key (or id), same request: `job_id` names the first one
    KEY_REUSED = "key_reused"  # same idempotency key, another request
    TOO_MANY_QUEUED = "too_many_queued"  # the tenant's bound


@dataclass(frozen=True, slots=True)
class Accepted:
    job_id: UUID
    outcome: AcceptOutcome


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job this worker now owns under `attempt`, with all it needs to start or to continue where others stopped."""

    id: UUID
    tenant_id: UUID
    attempt: int
    request: GenerationRequest
    prompt_token_ids: list[int]
    max_tokens: int
    seed: int
    priority: int
    lane: Lane
    committed_chunks: list[TokenChunk]  # in order; empty on a first attempt


@dataclass(frozen=True, slots=True)
class ChunkCommit:
    """The chunks one job gained in this flush: consecutive, starting at committed_sequence_number + 1."""

    job_id: UUID
    attempt: int
    chunks: Sequence[TokenChunk]


@dataclass(frozen=True, slots=True)
class Held:
    """What a successful commit or renewal says of a job: still ours, and what its owner wants."""

    job_id: UUID
    attempt: int
    is_cancel_requested: bool
    is_past_deadline: bool


@dataclass(frozen=True, slots=True)
class Finalisation:
    """The end of one attempt. `last_sequence_number` is the last chunk committed: the second fence beside `attempt`."""

    job_id: UUID
    attempt: int
    last_sequence_number: int
    status: JobStatus
    result: GenerationResult | None
    finish_reason: FinishReason | None = None
    error: JobError | None = None


def accept(session: Session, new_jobs: Sequence[NewJob]) -> list[Accepted]:
    """Insert a group of jobs as `queued` in one statement; one outcome per job, in order. Safe to repeat after an
    ambiguous commit: the same id or idempotency key answers DUPLICATE."""
    raise NotImplementedError


def dispatch(session: Session, model: str, *, room: int) -> list[UUID]:
    """Mark up to `room` due jobs of `model` as dispatched, fairest first, and return their ids in order. They come due
    again on their own if nobody claims them."""
    raise NotImplementedError


def claim(
    session: Session,
    job_ids: Sequence[UUID],
    *,
    owner: UUID,
    model_revision: str,
    lease_seconds: float,
    lane: Lane = Lane.STANDARD,
) -> list[ClaimedJob]:
    """Take the queued ones among `job_ids`: attempt + 1, lease, request and committed prefix, in one round trip.
    A job with committed chunks is taken only under its own `model_revision`.
    A job that is missing in the answer is done, cancelled, expired, or somebody else's: drop its message."""
    raise NotImplementedError


def claim_next(
    session: Session,
    model: str,
    *,
    limit: int,
    owner: UUID,
    model_revision: str,
    lease_seconds: float,
    lane: Lane = Lane.STANDARD,
) -> list[ClaimedJob]:
    """Claim due jobs straight from SQL, for a worker that has free slots and hears nothing from the queue."""
    raise NotImplementedError


def commit_chunks(session: Session, commits: Sequence[ChunkCommit], *, lease_seconds: float) -> list[Held]:
    """Append the chunks of the whole running batch, renew the leases and read the cancel flags, in one statement.
    A job missing in the answer was fenced off: abort its sequences and publish nothing."""
    raise NotImplementedError


def renew(session: Session, job_ids: Sequence[UUID], *, owner: UUID, lease_seconds: float) -> list[Held]:
    """Renew the leases of jobs that had no chunk lately. Missing in the answer: no longer ours."""
    raise NotImplementedError


def finalise(session: Session, finalisations: Sequence[Finalisation]) -> list[UUID]:
    """Make jobs terminal, with their results. Returns the ids that were ours to end."""
    raise NotImplementedError


def release(session: Session, job_ids: Sequence[UUID], *, owner: UUID) -> list[UUID]:
    """Give running jobs back to the queue at once, committed prefix kept, nothing charged (drain)."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Returned:
    """Where a rescued or crashed job went: `queued` again, or terminal."""

    job_id: UUID
    status: JobStatus
    attempt: int


def report_crash(session: Session, weight_by_job_id: dict[UUID, int], *, owner: UUID) -> list[Returned]:
    """Give back the jobs of a crashed engine: one failure charged to each, suspicion by weight, isolated from 2 on."""
    raise NotImplementedError


def rescue(session: Session, *, grace_seconds: float, quiet_seconds: float, limit: int = 200) -> list[Returned]:
    """Give back the jobs whose lease lapsed. Does nothing until the database server is `quiet_seconds` up: after an
    outage every lease looks lapsed."""
    raise NotImplementedError


def cancel(session: Session, job_id: UUID, tenant_id: UUID) -> JobStatus | None:
    """Cancel a queued job now, or ask a running one to stop. Returns the status after it; None: no such job here.
    Idempotent: a terminal job keeps its status."""
    raise NotImplementedError


def request_cancel(session: Session, job_ids: Sequence[UUID]) -> list[UUID]:
    """The worker's side of a cancel that came from Flower or `celery control`, by whoever owns the jobs."""
    raise NotImplementedError


def expire(session: Session, *, limit: int = 200) -> list[UUID]:
    """End queued jobs whose deadline or start deadline passed."""
    raise NotImplementedError


def prune(session: Session, *, limit: int = 200) -> int:
    """Delete finished jobs older than their result_ttl_seconds, with all that hangs on them."""
    raise NotImplementedError


def redispatch_all(session: Session) -> int:
    """Make every queued job due for a message now: Redis lost what it held."""
    raise NotImplementedError


def delete(session: Session, job_id: UUID, tenant_id: UUID) -> bool:
    """Erase a job's rows, input and output with them; cancels first (the owner is fenced off)."""
    raise NotImplementedError
