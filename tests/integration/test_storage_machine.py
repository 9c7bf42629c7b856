"""Any sequence of protocol calls, zombies and repeated calls among them, leaves the store as a small model says."""

from dataclasses import dataclass, field
from uuid import UUID, uuid4

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.chunks import TokenChunk
from domain.jobs import FinishReason, JobStatus, Lane
from storage import jobs
from storage.jobs import AcceptOutcome, ChunkCommit, Finalisation
from storage.tables import DEFAULT_TENANT_ID, Job, JobChunk, JobResult, TenantLoad
from tests.storage_samples import MODEL, PAST, chunk, claim, new_job, result

WORKERS = [uuid4() for _ in range(3)]
MAX_FAILURES = 2


@dataclass
class ModelJob:
    """What a job should be."""

    key: str
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    owner: UUID | None = None
    num_failures: int = 0
    num_suspicions: int = 0
    is_cancel_requested: bool = False
    is_lapsed: bool = False
    chunks: list[TokenChunk] = field(default_factory=list)
    has_result: bool = False

    @property
    def lane(self) -> Lane:
        return Lane.ISOLATED if self.num_suspicions >= 2 else Lane.STANDARD

    def end(self, status: JobStatus) -> None:
        self.status, self.owner, self.is_lapsed = status, None, False
        self.has_result = self.has_result or bool(self.chunks)

    def give_back(self) -> None:
        self.status, self.owner, self.is_lapsed = JobStatus.QUEUED, None, False

    def lose(self, *, is_poison: bool = False) -> None:
        """A charged failure."""
        self.num_failures += 1
        if self.is_cancel_requested:
            self.end(JobStatus.CANCELLED)
        elif is_poison or self.num_failures > MAX_FAILURES:
            self.end(JobStatus.FAILED)
        else:
            self.give_back()


@dataclass(frozen=True)
class Belief:
    """What a worker remembers of a claim; the job may have moved on since."""

    job_id: UUID
    attempt: int
    owner: UUID


class Store(RuleBasedStateMachine):
    submitted: Bundle[UUID] = Bundle("submitted")
    beliefs: Bundle[Belief] = Bundle("beliefs")

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        super().__init__()
        self.sessions = sessions
        self.jobs: dict[UUID, ModelJob] = {}
        with self.sessions.begin() as session:
            session.execute(text("TRUNCATE jobs CASCADE"))
            session.execute(update(TenantLoad).values(num_queued=0, num_running=0, virtual_time=0))

    def current(self, belief: Belief) -> ModelJob | None:
        """The job, if the belief is still true."""
        job = self.jobs[belief.job_id]
        is_true = job.status is JobStatus.IN_PROGRESS and (job.attempt, job.owner) == (belief.attempt, belief.owner)
        return job if is_true else None

    @rule(target=submitted, key=st.sampled_from("abcde"))
    def submit(self, key: str) -> UUID:
        job = new_job(idempotency_key=key, max_failures=MAX_FAILURES)
        with self.sessions.begin() as session:
            [accepted] = jobs.accept(session, [job], max_queued_jobs=3)
        by_key = {known.key: job_id for job_id, known in self.jobs.items()}
        num_queued = sum(known.status is JobStatus.QUEUED for known in self.jobs.values())
        if key in by_key:
            assert (accepted.outcome, accepted.job_id) == (AcceptOutcome.DUPLICATE, by_key[key])
        elif num_queued >= 3:
            assert accepted.outcome is AcceptOutcome.TOO_MANY_QUEUED
            return multiple()  # type: ignore[return-value]
        else:
            assert accepted.outcome is AcceptOutcome.ACCEPTED
            self.jobs[job.id] = ModelJob(key)
        return accepted.job_id

    @rule(target=beliefs, job_id=submitted, owner=st.sampled_from(WORKERS), lane=st.sampled_from(Lane))
    def claim(self, job_id: UUID, owner: UUID, lane: Lane) -> Belief:
        job = self.jobs[job_id]
        with self.sessions.begin() as session:
            claimed = claim(session, job_id, owner=owner, lane=lane)
        if job.status is not JobStatus.QUEUED or job.lane is not lane:
            assert claimed == []
            return multiple()  # type: ignore[return-value]
        job.status, job.owner, job.attempt = JobStatus.IN_PROGRESS, owner, job.attempt + 1
        assert [(c.attempt, c.committed_chunks) for c in claimed] == [(job.attempt, job.chunks)]
        return Belief(job_id, job.attempt, owner)

    @rule(belief=beliefs, count=st.integers(1, 3), start=st.integers(-1, 1), is_repeated=st.booleans())
    def flush(self, belief: Belief, count: int, start: int, is_repeated: bool) -> None:
        """`start` 0 is the next chunk; -1 repeats one, 1 leaves a gap."""
        known = self.jobs[belief.job_id].chunks
        first = max(1, len(known) + 1 + start)
        chunks = [chunk(number) for number in range(first, first + count)]
        job = self.current(belief)
        is_next = first == len(known) + 1
        was_applied = chunks[-1].sequence_number == len(known)  # an ambiguous commit, repeated
        for _ in range(1 + is_repeated):
            with self.sessions.begin() as session:
                commit = ChunkCommit(belief.job_id, belief.attempt, chunks)
                held = jobs.commit_chunks(session, [commit], lease_seconds=60)
            assert [h.job_id for h in held] == ([belief.job_id] if job and (is_next or was_applied) else [])
            assert all(h.is_cancel_requested == self.jobs[belief.job_id].is_cancel_requested for h in held)
        if job and is_next:
            job.chunks += chunks
        if job and (is_next or was_applied):
            job.is_lapsed = False

    @rule(belief=beliefs)
    def renew(self, belief: Belief) -> None:
        job = self.jobs[belief.job_id]
        is_owner = job.status is JobStatus.IN_PROGRESS and job.owner == belief.owner
        with self.sessions.begin() as session:
            held = jobs.renew(session, [belief.job_id], owner=belief.owner, lease_seconds=60)
        assert [h.attempt for h in held] == ([job.attempt] if is_owner else [])
        job.is_lapsed = job.is_lapsed and not is_owner

    @rule(belief=beliefs, is_late=st.booleans(), status=st.sampled_from([JobStatus.COMPLETED, JobStatus.FAILED]))
    def finalise(self, belief: Belief, is_late: bool, status: JobStatus) -> None:
        job, last = self.current(belief), len(self.jobs[belief.job_id].chunks) - is_late
        ending = Finalisation(
            belief.job_id, belief.attempt, max(0, last), status, result(1) if status is JobStatus.COMPLETED else None
        )
        is_ours = job is not None and max(0, last) == len(job.chunks)
        for _ in range(2):  # the answer to the first was lost
            with self.sessions.begin() as session:
                ended = jobs.finalise(session, [ending])
            assert not is_ours or ended == [belief.job_id]
        if job and is_ours:
            job.has_result = ending.result is not None
            job.end(status)

    @rule(belief=beliefs)
    def release(self, belief: Belief) -> None:
        job = self.jobs[belief.job_id]
        is_owner = job.status is JobStatus.IN_PROGRESS and job.owner == belief.owner
        with self.sessions.begin() as session:
            assert bool(jobs.release(session, [belief.job_id], owner=belief.owner)) == is_owner
        if is_owner and job.is_cancel_requested:
            job.end(JobStatus.CANCELLED)
        elif is_owner:
            job.give_back()

    @rule(belief=consumes(beliefs), weight=st.integers(0, 2))
    def crash(self, belief: Belief, weight: int) -> None:
        job = self.jobs[belief.job_id]
        is_owner = job.status is JobStatus.IN_PROGRESS and job.owner == belief.owner
        is_poison = job.lane is Lane.ISOLATED and weight > 0
        with self.sessions.begin() as session:
            returned = jobs.report_crash(session, {belief.job_id: weight}, owner=belief.owner)
            session.execute(update(Job).values(available_at=PAST))
        if is_owner:
            job.num_suspicions += weight
            job.lose(is_poison=is_poison)
        assert [(r.job_id, r.status) for r in returned] == ([(belief.job_id, job.status)] if is_owner else [])

    @rule(job_id=submitted)
    def let_lease_lapse(self, job_id: UUID) -> None:
        job = self.jobs[job_id]
        with self.sessions.begin() as session:
            lapsing = update(Job).where(Job.id == job_id, Job.status == JobStatus.IN_PROGRESS)
            session.execute(lapsing.values(lease_expires_at=PAST))
        job.is_lapsed = job.status is JobStatus.IN_PROGRESS

    @rule()
    def rescue(self) -> None:
        lapsed = {job_id for job_id, job in self.jobs.items() if job.is_lapsed}
        with self.sessions.begin() as session:
            returned = jobs.rescue(session, grace_seconds=1, quiet_seconds=0)
            session.execute(update(Job).values(available_at=PAST))
        for job_id in lapsed:
            self.jobs[job_id].lose()
        assert {r.job_id: r.status for r in returned} == {job_id: self.jobs[job_id].status for job_id in lapsed}

    @rule(job_id=submitted)
    def cancel(self, job_id: UUID) -> None:
        job = self.jobs[job_id]
        with self.sessions.begin() as session:
            status = jobs.cancel(session, job_id, DEFAULT_TENANT_ID)
        job.is_cancel_requested = job.is_cancel_requested or not job.status.is_terminal
        if job.status is JobStatus.QUEUED:
            job.end(JobStatus.CANCELLED)
        assert status is job.status

    @rule()
    def dispatch(self) -> None:
        with self.sessions.begin() as session:
            dispatched = jobs.dispatch(session, MODEL, room=10)
            jobs.redispatch_all(session)
        due = {i for i, j in self.jobs.items() if j.status is JobStatus.QUEUED and j.lane is Lane.STANDARD}
        assert set(dispatched) == due

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        with self.sessions() as session:
            rows = {row.id: row for row in session.scalars(select(Job))}
            chunks: dict[UUID, list[TokenChunk]] = {}
            for stored in session.scalars(select(JobChunk).order_by(JobChunk.job_id, JobChunk.sequence_number)):
                chunks.setdefault(stored.job_id, []).append(stored.chunk)
            results = set(session.scalars(select(JobResult.job_id)))
            load = session.get_one(TenantLoad, DEFAULT_TENANT_ID)
        assert set(rows) == set(self.jobs)
        for job_id, job in self.jobs.items():
            row = rows[job_id]
            assert (row.status, row.attempt, row.lease_owner) == (job.status, job.attempt, job.owner)
            assert (row.num_failures, row.lane) == (job.num_failures, job.lane)
            assert chunks.get(job_id, []) == job.chunks
            assert row.committed_sequence_number == row.num_committed_tokens == len(job.chunks)
            assert (job_id in results) == job.has_result
            assert row.finish_reason in (None, FinishReason.CANCELLED)
        statuses = [job.status for job in self.jobs.values()]
        assert load.num_queued == statuses.count(JobStatus.QUEUED)
        assert load.num_running == statuses.count(JobStatus.IN_PROGRESS)
        # Charged at the first claim, corrected at the end: what remains is the tokens taken and the costs under way.
        assert load.virtual_time == sum(
            0 if job.attempt == 0 else 3 + len(job.chunks) if job.status.is_terminal else 19
            for job in self.jobs.values()
        )


def test_any_sequence_of_calls_leaves_what_the_model_says(session_factory: sessionmaker[Session]) -> None:
    run_state_machine_as_test(
        lambda: Store(session_factory),  # type: ignore[arg-type]
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
