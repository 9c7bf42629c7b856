"""Jobs come in: a group of new jobs in one statement, and what became of each of them.

The rules of `storage/jobs.py` hold here too: synchronous on a `Session`, and nothing commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.orm import Session

from domain.jobs import Endpoint, JobStatus, Lane
from domain.kinds import JobRequest
from domain.requests import GenerationRequest
from storage import jobs_columns as columns
from storage import jobs_sql as sql

MAX_POISON_JOBS_PER_HOUR = 3


@dataclass(frozen=True, slots=True)
class NewJob:
    """A validated request on its way into the job table. `request` has every default resolved."""

    id: UUID
    tenant_id: UUID
    request: JobRequest
    prompt_token_ids: Sequence[int]
    model_revision: str
    max_tokens: int
    seed: int
    max_failures: int
    result_ttl_seconds: int
    request_hash: bytes
    fingerprint: bytes | None = None  # of the request as an engine sees it
    lane: Lane = Lane.STANDARD  # isolated: also where the request is known as poison
    retry_of: UUID | None = None
    idempotency_key: str | None = None
    priority: int = 0
    deadline_at: datetime | None = None
    start_timeout_seconds: float | None = None
    run_timeout_seconds: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    input_lengths: Sequence[int] | None = None  # of an embedding: tokens of each input; their ids are prompt_token_ids
    webhook_url: str | None = None  # checked, and spelt as `domain.webhook_urls` does
    webhook_statuses: Sequence[JobStatus] = ()  # the ends that it is told of
    endpoint: Endpoint = Endpoint.JOBS
    is_stored: bool = False
    endpoint_body: str | None = None  # JSON
    request_id: str | None = None  # of the HTTP request that brought it

    @property
    def cost(self) -> int:
        """The most tokens it can take: what fairness charges until the end tells."""
        return len(self.prompt_token_ids) + self.num_sequences * self.max_tokens

    @property
    def num_sequences(self) -> int:
        """Slots that it takes of a worker."""
        return self.request.params.num_sequences if isinstance(self.request, GenerationRequest) else 1


class AcceptOutcome(StrEnum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # same idempotency key (or id), same request: `job_id` names the first one
    KEY_REUSED = "key_reused"  # same idempotency key, another request
    TOO_MANY_QUEUED = "too_many_queued"  # the tenant's bound
    POISON = "poison"  # the same request crashed an engine within a day


@dataclass(frozen=True, slots=True)
class QueueRoom:
    """How many jobs a tenant may have waiting, and how many more that are after an accept."""

    max_queued: int
    num_free: int


@dataclass(frozen=True, slots=True)
class Accepted:
    job_id: UUID
    outcome: AcceptOutcome
    created_at: datetime | None = None  # of ACCEPTED, by the database's clock
    room: QueueRoom | None = None  # of ACCEPTED


def accept(
    session: Session,
    new_jobs: Sequence[NewJob],
    *,
    max_queued_jobs: int,
    max_poison_jobs_per_hour: int = MAX_POISON_JOBS_PER_HOUR,
) -> list[Accepted]:
    """Insert a group of jobs as `queued` in one statement; one outcome per job, in order. Safe to repeat after an
    ambiguous commit: the same id or idempotency key answers DUPLICATE. `max_queued_jobs` bounds tenants without a
    bound of their own; beyond `max_poison_jobs_per_hour` all jobs of a tenant run isolated."""
    if not new_jobs:
        return []
    firsts = columns.first_of_each(new_jobs)
    parameters = columns.of_new_jobs([new_jobs[place] for place in firsts]) | {
        "max_queued_jobs": max_queued_jobs,
        "max_poison_jobs_per_hour": max_poison_jobs_per_hour,
    }
    row_by_id = {row.id: row for row in session.execute(sql.ACCEPT, parameters)}
    accepted = {place for place in firsts if new_jobs[place].id in row_by_id}
    outcomes = _outcomes_of_others(session, {p: job for p, job in enumerate(new_jobs) if p not in accepted})
    return [
        _accepted(row_by_id[job.id]) if place in accepted else outcomes[place] for place, job in enumerate(new_jobs)
    ]


def _accepted(row: Row[Any]) -> Accepted:
    return Accepted(row.id, AcceptOutcome.ACCEPTED, row.created_at, QueueRoom(row.max_queued, row.room))


def _outcomes_of_others(session: Session, job_by_place: dict[int, NewJob]) -> dict[int, Accepted]:
    """What became of the jobs that were not inserted: they exist already, or there was no room."""
    if not job_by_place:
        return {}
    places, new_jobs = list(job_by_place), list(job_by_place.values())
    outcomes = {p: Accepted(job.id, AcceptOutcome.TOO_MANY_QUEUED) for p, job in job_by_place.items()}
    for row in session.execute(sql.POISONED, columns.of_fingerprints(new_jobs)):
        place = places[row.place - 1]
        outcomes[place] = Accepted(job_by_place[place].id, AcceptOutcome.POISON)
    for row in session.execute(sql.EXISTING, columns.of_names(new_jobs)):
        place = places[row.place - 1]
        if row.is_same:
            outcomes[place] = Accepted(row.id, AcceptOutcome.DUPLICATE)
        elif outcomes[place].outcome is not AcceptOutcome.DUPLICATE:
            outcomes[place] = Accepted(row.id, AcceptOutcome.KEY_REUSED)
    return outcomes
