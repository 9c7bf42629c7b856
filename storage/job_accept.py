"""How jobs come in: inserts a group of new jobs in one statement, and reports the outcome of each.

As in `storage/jobs.py`, all functions are synchronous on a `Session` and do not commit.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Row
from sqlalchemy.orm import Session

from domain.callbacks import CeleryCallback
from domain.errors import CeleriacError
from domain.eta import Eta
from domain.jobs import MIN_PRIORITY, Endpoint, JobStatus, Lane
from domain.limits import ClientCall, LimitStanding
from domain.requests import GenerationRequest, JobRequest
from storage import full_queues
from storage import job_statements as sql
from storage.admission import Admission, Asking
from storage.database import discard_plans
from storage.job_queries import JobRecord
from storage.job_statements import Packed

MAX_POISON_JOBS_PER_HOUR = 3


def nobody(session: Session, new_jobs: Sequence["NewJob"]) -> dict[UUID, "Accepted"]:
    """Of none of them is the answer known."""
    return {}


MAX_DOCUMENT_BYTES = 2**28  # of a group; PostgreSQL takes 2**30, and says that it has no memory for more


class CannotSendTogether(Exception):
    """These jobs are too long for one statement, or one of them cannot be sent."""


@dataclass(slots=True)
class NewJob:
    """A validated request that is to become a job. `request` has all defaults resolved. Nobody changes one; not frozen,
    as making an object with so many fields would take four times as long."""

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
    fingerprint: bytes | None = None  # equal for requests that are the same to an engine
    lane: Lane = Lane.STANDARD  # isolated: accept the job even if its request is known to be poison
    retry_of: UUID | None = None
    idempotency_key: str | None = None
    priority: int = 0
    deadline_at: datetime | None = None
    start_timeout_seconds: float | None = None
    run_timeout_seconds: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    input_lengths: Sequence[int] | None = None  # for embeddings: tokens per input; the ids are in prompt_token_ids
    webhook_url: str | None = None  # validated, and normalised by `domain.webhooks`
    webhook_statuses: Sequence[JobStatus] = ()  # the final statuses that are sent to it
    endpoint: Endpoint = Endpoint.JOBS
    is_stored: bool = False
    endpoint_body: str | None = None  # JSON
    callback: CeleryCallback | None = None
    request_id: str | None = None  # the id of the HTTP request that submitted it
    traceparent: str | None = None  # its place in a trace (W3C Trace Context)
    answer_key: bytes | None = None  # equal for requests of which one may have the other's answer; None: it must run
    key_id: str | None = None  # of the API key that it was sent with
    eta: Eta | None = None  # of its start and end
    hopeless_seconds: float | None = (
        None  # its predicted wait, if that is too long: it is accepted only if it was before
    )
    is_limited: bool = False  # its tenant or key may have limits
    call: ClientCall | None = None  # that takes several jobs, of which this is one
    written: bytes | None = None  # what `written_once` made of an equal job

    @property
    def cost(self) -> int:
        """The most tokens that the job can take. Fairness charges this until the actual number is known."""
        return len(self.prompt_token_ids) + self.num_sequences * self.max_tokens

    @property
    def max_output_tokens(self) -> int:
        """Over all of its sequences."""
        return self.cost - len(self.prompt_token_ids)

    @property
    def num_sequences(self) -> int:
        """How many of a worker's slots the job takes."""
        return self.request.params.num_sequences if isinstance(self.request, GenerationRequest) else 1


class AcceptOutcome(StrEnum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # same idempotency key (or id) and same request: `job_id` is that of the first one
    KEY_REUSED = "key_reused"  # same idempotency key, but a different request
    TOO_MANY_QUEUED = "too_many_queued"  # the tenant has reached its limit
    UNATTAINABLE = "unattainable"  # it would start too late
    LIMIT_REACHED = "limit_reached"  # another limit, of the tenant or of the key
    POISON = "poison"  # the same request has crashed an engine within the last day


@dataclass(frozen=True, slots=True)
class Accepted:
    job_id: UUID
    outcome: AcceptOutcome
    created_at: datetime | None = None  # set if ACCEPTED; by the database's clock
    record: JobRecord | None = None  # if it was completed at once, with a known answer: what it is now
    refusal: CeleriacError | None = None  # set if LIMIT_REACHED or TOO_MANY_QUEUED
    standing: LimitStanding | None = None  # of the limits with a rate, if there are any
    num_queued: int | None = None  # if ACCEPTED: jobs of its tenant that wait, this one included

    @property
    def is_queued(self) -> bool:
        """Whether it is a new job that waits for a worker."""
        return self.outcome is AcceptOutcome.ACCEPTED and self.record is None


AcceptAnswered = Callable[[Session, Sequence[NewJob]], dict[UUID, Accepted]]


def accept(
    session: Session,
    new_jobs: Sequence[NewJob],
    *,
    max_queued_jobs: int,
    max_poison_jobs_per_hour: int = MAX_POISON_JOBS_PER_HOUR,
    answer: AcceptAnswered = nobody,
) -> list[Accepted]:
    """Insert a group of jobs as `queued` in one statement, after `answer` has inserted those whose answers are known.
    Returns one outcome per job, in order.

    Safe to repeat after an ambiguous commit: jobs with the same id or idempotency key then get DUPLICATE.
    `max_queued_jobs` applies to tenants without a limit of their own. If a tenant has had more than
    `max_poison_jobs_per_hour`, all its new jobs run isolated. If any of the jobs is limited, the session must have a
    transaction, so that the limits stay locked until the commit.
    """
    terms = _Terms(max_queued_jobs, max_poison_jobs_per_hour, answer)
    outcomes = _admit(session, new_jobs, terms)
    full = [place for place, one in enumerate(outcomes) if one.outcome is AcceptOutcome.TOO_MANY_QUEUED]
    calls = [(new_jobs[place].tenant_id, new_jobs[place].call) for place in full]
    refusals = full_queues.refusals(session, calls, max_queued_jobs=max_queued_jobs)
    for place, refusal in zip(full, refusals, strict=True):
        outcomes[place] = replace(outcomes[place], refusal=refusal)
    return outcomes


def plan_ahead(session: Session, *, max_queued_jobs: int, max_poison_jobs_per_hour: int) -> None:
    """Call in a quiet moment, on a connection that keeps plans: makes the one that the next job would wait for."""
    discard_plans(session)  # unless they were when the connection was taken from its pool
    bounds = {"max_queued_jobs": max_queued_jobs, "max_poison_jobs_per_hour": max_poison_jobs_per_hour}
    session.execute(sql.ACCEPT, of_new_jobs([]) | bounds)


@dataclass(frozen=True, slots=True)
class _Terms:
    max_queued_jobs: int
    max_poison_jobs_per_hour: int
    answer: AcceptAnswered


def _admit(session: Session, new_jobs: Sequence[NewJob], terms: _Terms) -> list[Accepted]:
    """Accept those for which limits and queues have room."""
    if not new_jobs:
        return []
    firsts = [place for place in first_of_each(new_jobs) if new_jobs[place].hopeless_seconds is None]
    if not any(job.is_limited for job in new_jobs):
        return _accept(session, new_jobs, firsts, terms)
    asking = {place: _asking(new_jobs[place]) for place in firsts if new_jobs[place].is_limited}
    admission = Admission.begin(session, list(asking.values()))
    refusals = {place: refusal for place, one in asking.items() if (refusal := admission.refusal_of(one)) is not None}
    admitted = [place for place in firsts if place not in refusals]
    outcomes = _accept(session, new_jobs, admitted, terms)
    if _give_back(admission, asking, outcomes, admitted) and refusals:
        # Ask once more: what jobs that exist already seemed to take is left for new ones.
        rest = [place for place, one in enumerate(outcomes) if one.outcome is AcceptOutcome.TOO_MANY_QUEUED]
        asked_again = [place for place in rest if place in refusals]
        admitted = [place for place in asked_again if admission.refusal_of(asking[place]) is None]
        numbers = [number for number, place in enumerate(rest) if place in admitted]
        rest_jobs = [new_jobs[place] for place in rest]
        found = _accept(session, rest_jobs, numbers, terms)
        for place, outcome in zip(rest, found, strict=True):
            outcomes[place] = outcome
        _give_back(admission, asking, outcomes, admitted)
    admission.charge(session)
    standings = admission.standings_of([_asking(job) if job.is_limited else None for job in new_jobs])
    return [
        _of_limits(outcome, refusals.get(place), standing)
        for (place, outcome), standing in zip(enumerate(outcomes), standings, strict=True)
    ]


def _give_back(
    admission: Admission, asking: Mapping[int, Asking], outcomes: Sequence[Accepted], admitted: Sequence[int]
) -> bool:
    """Whether any of the jobs that had room were not accepted after all."""
    places = [place for place in admitted if place in asking and outcomes[place].outcome is not AcceptOutcome.ACCEPTED]
    for place in places:
        admission.give_back(asking[place])
    return bool(places)


def _asking(job: NewJob) -> Asking:
    return Asking(job.tenant_id, job.key_id, job.cost, job.call, is_line=job.priority < MIN_PRIORITY)


def _of_limits(outcome: Accepted, refusal: CeleriacError | None, standing: LimitStanding | None) -> Accepted:
    """A job that exists already, or is poison, is told that, whatever its limits."""
    if refusal is not None and outcome.outcome is AcceptOutcome.TOO_MANY_QUEUED:
        return replace(outcome, outcome=AcceptOutcome.LIMIT_REACHED, refusal=refusal, standing=standing)
    return outcome if standing is None else replace(outcome, standing=standing)


def _accept(session: Session, new_jobs: Sequence[NewJob], admitted: Sequence[int], terms: _Terms) -> list[Accepted]:
    """Insert the jobs at the places `admitted`. The outcome of each job; of those that there is no reason to refuse,
    TOO_MANY_QUEUED."""
    if any(job.is_limited and job.answer_key is not None for job in new_jobs):
        # An answered job counts for its tenant's limits at once. Ends of jobs do that after they have locked the load.
        session.execute(sql.LOCK_LOADS, {"tenant_ids": list({job.tenant_id for job in new_jobs})})
    accepted = terms.answer(session, [new_jobs[place] for place in admitted])
    rest = [job for place in admitted if (job := new_jobs[place]).id not in accepted]
    parameters = of_new_jobs(rest) | {
        "max_queued_jobs": terms.max_queued_jobs,
        "max_poison_jobs_per_hour": terms.max_poison_jobs_per_hour,
    }
    accepted |= {row.id: _accepted(row) for row in session.execute(sql.ACCEPT, parameters)} if rest else {}
    first_place = {new_jobs[place].id: place for place in admitted}
    others = {p: job for p, job in enumerate(new_jobs) if job.id not in accepted or first_place.get(job.id) != p}
    outcomes = _outcomes_of_others(session, others)
    return [outcomes.get(place) or accepted[job.id] for place, job in enumerate(new_jobs)]


def _accepted(row: Row[Any]) -> Accepted:
    return Accepted(row.id, AcceptOutcome.ACCEPTED, row.created_at, num_queued=row.num_queued)


def _outcomes_of_others(session: Session, job_by_place: dict[int, NewJob]) -> dict[int, Accepted]:
    """The outcomes of jobs that were not inserted, because they already exist, are poison, or did not have room."""
    if not job_by_place:
        return {}
    places, new_jobs = list(job_by_place), list(job_by_place.values())
    outcomes = {
        p: Accepted(
            job.id, AcceptOutcome.TOO_MANY_QUEUED if job.hopeless_seconds is None else AcceptOutcome.UNATTAINABLE
        )
        for p, job in job_by_place.items()
    }
    for row in session.execute(sql.POISONED, of_fingerprints(new_jobs)):
        place = places[row.place - 1]
        outcomes[place] = Accepted(job_by_place[place].id, AcceptOutcome.POISON)
    for row in session.execute(sql.EXISTING, of_names(new_jobs)):
        place = places[row.place - 1]
        if row.is_same:
            outcomes[place] = Accepted(row.id, AcceptOutcome.DUPLICATE)
        elif outcomes[place].outcome is not AcceptOutcome.DUPLICATE:
            outcomes[place] = Accepted(row.id, AcceptOutcome.KEY_REUSED)
    return outcomes


def of_new_jobs(new_jobs: Sequence[NewJob]) -> dict[str, Any]:
    return {"jobs": document_of([row_of(place, job) for place, job in enumerate(new_jobs)])}


def document_of(rows: Sequence[orjson.Fragment]) -> str:
    """All of them as one JSON document: psycopg would look at each item of thirty arrays several times. What is JSON
    itself is a string in it, since PostgreSQL refuses a U+0000 that it meets while it takes the document apart. Raises
    CannotSendTogether."""
    document = orjson.dumps(rows)
    if len(document) > MAX_DOCUMENT_BYTES and len(rows) > 1:
        raise CannotSendTogether
    return document.decode()


def row_of(place: int, job: NewJob, leader_id: UUID | None = None) -> orjson.Fragment:
    """The job's part of that document. `leader_id` is that of the job whose answer it has. Raises
    CannotSendTogether."""
    own = {
        "place": place,
        "id": job.id,
        "idempotency_key": job.idempotency_key,
        "deadline_at": job.deadline_at,
        "retry_of": job.retry_of,
        "request_id": job.request_id,
        "traceparent": job.traceparent,
        "key_id": job.key_id,
        "eta": job.eta and f"{{{','.join(map(str, job.eta.stored))}}}",
        "call_size": 1 if job.call is None else job.call.num_jobs,
        "leader_id": leader_id,
    }
    return orjson.Fragment(_dumped(own)[:-1] + b"," + (job.written or written_once(job))[1:])


def written_once(job: NewJob) -> bytes:
    """The columns that the jobs of a request have in common, as JSON. Raises CannotSendTogether."""
    request = job.request
    shared = {
        "tenant_id": job.tenant_id,
        "model": request.model_id,
        "adapter": request.adapter,
        "model_revision": job.model_revision,
        "priority": job.priority,
        "request_hash": _hex(job.request_hash),
        "max_failures": job.max_failures,
        "start_timeout": job.start_timeout_seconds,
        "run_timeout_seconds": job.run_timeout_seconds,
        "num_prompt_tokens": len(job.prompt_token_ids),
        "max_tokens": job.max_tokens,
        "seed": job.seed,
        "cost": job.cost,
        "metadata": json.dumps(job.metadata),
        "result_ttl_seconds": job.result_ttl_seconds,
        "request": request.model_dump_json(),
        "webhook_url": job.webhook_url,
        "webhook_statuses": job.webhook_url and "{" + ",".join(job.webhook_statuses) + "}",
        "kind": request.kind,
        "input_lengths": _int_array(job.input_lengths),
        "endpoint": job.endpoint,
        "is_stored": job.is_stored,
        "endpoint_body": job.endpoint_body,
        "prompt_token_ids": _int_array(job.prompt_token_ids),
        "fingerprint": _hex(job.fingerprint),
        "lane": job.lane,
        "callback": None if job.callback is None else job.callback.model_dump_json(),
    }
    return _dumped(shared)


def _dumped(columns: dict[str, Any]) -> bytes:
    """Without those that are NULL, so that PostgreSQL has less to read."""
    try:
        return orjson.dumps({name: value for name, value in columns.items() if value is not None})
    except TypeError as exc:  # a text that no encoding has
        raise CannotSendTogether from exc


def _hex(digest: bytes | None) -> str | None:
    return None if digest is None else f"\\x{digest.hex()}"


def of_fingerprints(new_jobs: Sequence[NewJob]) -> dict[str, Any]:
    """Parameters for finding requests that are known to be poison."""
    return {
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "fingerprints": Packed(job.fingerprint for job in new_jobs),
        "lanes": [job.lane.value for job in new_jobs],
    }


def _int_array(numbers: Sequence[int] | None) -> str | None:
    """A PostgreSQL array literal. Ten times faster than calling `str` for each number, of which a long prompt has a
    hundred thousand."""
    return None if numbers is None else "{" + orjson.dumps(list(numbers))[1:-1].decode() + "}"


def of_names(new_jobs: Sequence[NewJob]) -> dict[str, Any]:
    """Parameters for finding jobs that already exist."""
    return {
        "ids": [job.id for job in new_jobs],
        "tenant_ids": [job.tenant_id for job in new_jobs],
        "idempotency_keys": [job.idempotency_key for job in new_jobs],
        "request_hashes": Packed(job.request_hash for job in new_jobs),
    }


def first_of_each(new_jobs: Sequence[NewJob]) -> list[int]:
    """For each id and idempotency key in this group, the position of the first job that has it."""
    seen: set[tuple[UUID, str] | UUID] = set()
    firsts = []
    for place, job in enumerate(new_jobs):
        names: set[tuple[UUID, str] | UUID] = {job.id}
        if job.idempotency_key is not None:
            names.add((job.tenant_id, job.idempotency_key))
        if seen.isdisjoint(names):
            firsts.append(place)
        seen |= names
    return firsts
