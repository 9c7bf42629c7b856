"""Every statement of the job protocol against every status and every caller: exactly the allowed cells change."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import ALLOWED_TRANSITIONS, BATCH_PRIORITY, FinishReason, JobStatus, Usage
from domain.requests import GenerationResult, TokenChunk
from storage import jobs, workers
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import Job, JobChunk, TenantLoad
from storage.workers import WorkerReport
from tests.conftest import MakeJob, MakeTenant

QUEUED, IN_PROGRESS, CANCELLED = JobStatus.QUEUED, JobStatus.IN_PROGRESS, JobStatus.CANCELLED
COMPLETED, EXPIRED, FAILED = JobStatus.COMPLETED, JobStatus.EXPIRED, JobStatus.FAILED
PAST = datetime.now(UTC) - timedelta(hours=1)


@dataclass(frozen=True)
class Caller:
    """What a statement is called with: the truth, or what a zombie or a stranger believes."""

    owner: UUID
    attempt: int
    tenant_id: UUID


Call = Callable[[Session, Job, Caller], object]


def finalise_as(status: JobStatus) -> Call:
    def call(session: Session, job: Job, caller: Caller) -> object:
        result = GenerationResult(choices=(), usage=Usage())
        return jobs.finalise(session, [Finalisation(job.id, caller.attempt, 0, status, result)])

    return call


def commit_chunk(session: Session, job: Job, caller: Caller) -> object:
    chunk = TokenChunk(sequence_number=1, text="a", token_ids=(5,))
    return jobs.commit_chunks(session, [ChunkCommit(job.id, caller.attempt, [chunk])], lease_seconds=15)


def claim(session: Session, job: Job, caller: Caller) -> object:
    return jobs.claim(session, job.model, limit=8, owner=uuid4(), model_revision="main", lease_seconds=15)


def under_another_revision(statement: Callable[..., object]) -> Call:
    """Where a worker of the revision `main` is there alone."""

    def call(session: Session, job: Job, caller: Caller) -> object:
        report = WorkerReport(uuid4(), "gpu@here", job.model, 8, 0, 0.0, model_revision="main")
        workers.heartbeat(session, report)
        return statement(session, job.model, "gone", live_seconds=60)

    return call


STATEMENTS: dict[str, Call] = {
    "claimable_soon": lambda session, job, caller: jobs.claimable_soon(
        session, job.model, model_revisions=["main"], limit=8
    ),
    "let_lines_in": lambda session, job, caller: jobs.let_lines_in(session, job.model, limit=8),
    "claim": claim,
    "cancel_queued": lambda session, job, caller: jobs.cancel_queued(session, [job.id]),
    "commit_chunks": commit_chunk,
    "renew": lambda session, job, caller: jobs.renew(session, [job.id], owner=caller.owner, lease_seconds=99),
    "finalise completed": finalise_as(COMPLETED),
    "finalise failed": finalise_as(FAILED),
    "finalise cancelled": finalise_as(CANCELLED),
    "finalise expired": finalise_as(EXPIRED),
    "release": lambda session, job, caller: jobs.release(session, [job.id], owner=caller.owner),
    "pause": lambda session, job, caller: jobs.pause(session, [job.id], owner=caller.owner),
    "report_crash": lambda session, job, caller: jobs.report_crash(session, {job.id: 1}, owner=caller.owner),
    "rescue": lambda session, job, caller: jobs.rescue(
        session, as_of=datetime.now(UTC), grace_seconds=2, quiet_seconds=0
    ),
    "cancel": lambda session, job, caller: jobs.cancel(session, job.id, caller.tenant_id),
    "request_cancel": lambda session, job, caller: jobs.request_cancel(session, [job.id]),
    "restart": under_another_revision(jobs.restart),
    "fail_gone": under_another_revision(jobs.fail_gone),
    "expire": lambda session, job, caller: jobs.expire(session),
}

#: status before, statement -> status after. What is not listed leaves the row as it is, whoever calls.
CHANGES: dict[tuple[JobStatus, str], JobStatus] = {
    (QUEUED, "claim"): IN_PROGRESS,
    (QUEUED, "cancel"): CANCELLED,
    (QUEUED, "cancel_queued"): CANCELLED,
    (QUEUED, "request_cancel"): CANCELLED,
    (IN_PROGRESS, "commit_chunks"): IN_PROGRESS,
    (IN_PROGRESS, "renew"): IN_PROGRESS,
    (IN_PROGRESS, "finalise completed"): COMPLETED,
    (IN_PROGRESS, "finalise failed"): FAILED,
    (IN_PROGRESS, "finalise cancelled"): CANCELLED,
    (IN_PROGRESS, "finalise expired"): EXPIRED,
    (IN_PROGRESS, "release"): QUEUED,
    (IN_PROGRESS, "pause"): QUEUED,
    (IN_PROGRESS, "report_crash"): QUEUED,
    (IN_PROGRESS, "cancel"): IN_PROGRESS,  # a timestamp, not a status
    (IN_PROGRESS, "request_cancel"): IN_PROGRESS,
}

#: As above, for rows of which a condition besides the status is set: the lease or the deadline passed, and so on.
CONDITIONS: dict[str, tuple[JobStatus, dict[str, object]]] = {
    "lapsed": (IN_PROGRESS, {"lease_expires_at": PAST}),
    "lapsed, last failure": (IN_PROGRESS, {"lease_expires_at": PAST, "num_failures": 3, "max_failures": 3}),
    "lapsed, cancel asked": (IN_PROGRESS, {"lease_expires_at": PAST, "cancel_requested_at": PAST}),
    "lapsed, past deadline": (IN_PROGRESS, {"lease_expires_at": PAST, "deadline_at": PAST}),
    "past deadline": (QUEUED, {"deadline_at": PAST}),
    "past start deadline": (QUEUED, {"start_deadline_at": PAST}),
    "marked by an earlier release": (
        QUEUED,
        {"num_dispatches": 1, "dispatch_at": datetime.now(UTC) + timedelta(hours=1)},
    ),
    "line": (QUEUED, {"priority": BATCH_PRIORITY}),
    "line let in": (QUEUED, {"priority": BATCH_PRIORITY, "num_dispatches": 1}),
    "isolated line": (QUEUED, {"priority": BATCH_PRIORITY, "lane": "isolated"}),
    "cancel asked": (IN_PROGRESS, {"cancel_requested_at": PAST}),
    "not yet available": (QUEUED, {"available_at": datetime.now(UTC) + timedelta(hours=1)}),
    "isolated": (QUEUED, {"lane": "isolated"}),
    "begun under a revision that is gone": (
        QUEUED,
        {"attempt": 1, "model_revision": "gone", "committed_sequence_number": 1},
    ),
    "begun anew": (
        QUEUED,
        {"attempt": 1, "model_revision": "gone", "committed_sequence_number": 2, "reset_sequence_number": 2},
    ),
}
CONDITIONAL_CHANGES: dict[tuple[str, str], JobStatus] = {
    ("lapsed", "rescue"): QUEUED,
    ("lapsed, last failure", "rescue"): FAILED,
    ("lapsed, cancel asked", "rescue"): CANCELLED,
    ("lapsed, past deadline", "rescue"): EXPIRED,
    ("past deadline", "expire"): EXPIRED,
    ("past start deadline", "expire"): EXPIRED,
    ("marked by an earlier release", "claim"): IN_PROGRESS,
    ("line", "let_lines_in"): QUEUED,
    ("line let in", "claim"): IN_PROGRESS,
    ("begun under a revision that is gone", "restart"): QUEUED,
    ("begun under a revision that is gone", "fail_gone"): FAILED,
    ("begun anew", "claim"): IN_PROGRESS,
    ("cancel asked", "release"): CANCELLED,
    ("cancel asked", "pause"): CANCELLED,
    ("cancel asked", "report_crash"): CANCELLED,
}
MAINTENANCE = ("claimable_soon", "let_lines_in", "claim", "rescue", "expire", "restart", "fail_gone")
#: What a stale owner or another tenant may still do: the statements that are nobody's own.
FENCED_BY_ATTEMPT = [name for name in STATEMENTS if name.startswith(("commit_chunks", "finalise"))]
FENCED_BY_OWNER = ["renew", "release", "pause", "report_crash"]
FENCED_BY_TENANT = ["cancel"]


def snapshot(session: Session, job: Job) -> dict[str, object]:
    session.rollback()
    row = session.execute(select(*Job.__table__.c).where(Job.__table__.c.id == job.id)).one()
    num_chunks = len(session.scalars(select(JobChunk.sequence_number).where(JobChunk.job_id == job.id)).all())
    session.rollback()
    return {**row._mapping, "num_chunks": num_chunks}


def run(session: Session, statement: str, job: Job, caller: Caller) -> tuple[dict[str, object], dict[str, object]]:
    """The row before and after the statement; the tenant's counters must agree with the rows after it."""
    before = snapshot(session, job)
    STATEMENTS[statement](session, job, caller)
    session.commit()
    after = snapshot(session, job)
    load = session.get_one(TenantLoad, job.tenant_id, populate_existing=True)
    assert (load.num_queued, load.num_running) == (after["status"] == QUEUED, after["status"] == IN_PROGRESS)
    return before, after


def owner_of(job: Job) -> Caller:
    return Caller(job.lease_owner or uuid4(), job.attempt, job.tenant_id)


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_changes_exactly_the_rows_it_may(session: Session, make_job: MakeJob, statement: str) -> None:
    tables = session.get_bind()
    for status in JobStatus:
        job = make_job(status=status)
        before, after = run(session, statement, job, owner_of(job))
        expected = CHANGES.get((status, statement))
        assert (after != before) == (expected is not None), f"{statement} on {status} in {tables}"
        assert after["status"] == (expected or status)
        jobs.delete(session, job.id, job.tenant_id)
        session.commit()


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_beside_the_status_are_judged(session: Session, make_job: MakeJob, condition: str) -> None:
    status, columns = CONDITIONS[condition]
    relevant = {*MAINTENANCE, *(name for name_of, name in CONDITIONAL_CHANGES if name_of == condition)}
    for statement in sorted(relevant):
        job = make_job(status=status, **columns)
        before, after = run(session, statement, job, owner_of(job))
        expected = CONDITIONAL_CHANGES.get((condition, statement))
        assert (after != before) == (expected is not None), f"{statement} on {condition}"
        assert after["status"] == (expected or status), f"{statement} on {condition}"
        jobs.delete(session, job.id, job.tenant_id)
        session.commit()


@pytest.mark.parametrize("statement", [*FENCED_BY_ATTEMPT, *FENCED_BY_OWNER, *FENCED_BY_TENANT])
@pytest.mark.parametrize("status", JobStatus)
def test_a_zombie_or_a_stranger_changes_nothing(
    session: Session, make_job: MakeJob, make_tenant: MakeTenant, statement: str, status: JobStatus
) -> None:
    stranger = make_tenant()
    job = make_job(status=status, attempt=2)
    truth = owner_of(job)
    if statement in FENCED_BY_ATTEMPT:
        callers = [Caller(truth.owner, attempt, truth.tenant_id) for attempt in (1, 3)]
    elif statement in FENCED_BY_OWNER:
        callers = [Caller(uuid4(), truth.attempt, truth.tenant_id)]
    else:
        callers = [Caller(truth.owner, truth.attempt, stranger.id)]
    for caller in callers:
        before, after = run(session, statement, job, caller)
        assert after == before


def test_the_statements_make_the_allowed_transitions_and_no_others() -> None:
    made = {(before, after) for (before, _), after in CHANGES.items()}
    made |= {(CONDITIONS[name][0], after) for (name, _), after in CONDITIONAL_CHANGES.items()}
    allowed = {(before, after) for before, afters in ALLOWED_TRANSITIONS.items() for after in afters}
    assert {(before, after) for before, after in made if before != after} == allowed


def test_no_statement_moves_a_terminal_job(session: Session, make_job: MakeJob) -> None:
    for status in (COMPLETED, FAILED, CANCELLED, EXPIRED):
        job = make_job(status=status, finish_reason=FinishReason.STOP, deadline_at=PAST, attempt=1)
        for statement in STATEMENTS:
            before, after = run(session, statement, job, owner_of(job))
            assert after == before, f"{statement} on {status}"


def test_a_terminal_job_belongs_to_nobody_and_keeps_its_time(
    session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    job = make_job(status=IN_PROGRESS)
    with session_factory.begin() as session:
        finalise_as(COMPLETED)(session, job, owner_of(job))
    with session_factory() as session:
        row = session.get_one(Job, job.id)
        assert row.lease_owner is None
        assert row.lease_expires_at is None
        assert row.finished_at is not None
        assert row.prune_at == row.finished_at + timedelta(seconds=row.result_ttl_seconds)
