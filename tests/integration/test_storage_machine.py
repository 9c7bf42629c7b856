"""Any sequence of protocol calls, zombies and repeated calls among them, leaves the store as a small model says."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID, uuid4

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus, Lane
from domain.requests import TokenChunk
from storage import job_accept, jobs, running_sums, workers
from storage.job_accept import AcceptOutcome
from storage.job_statements import COUNTED_AHEAD, PROVEN_TOKENS
from storage.jobs import ChunkCommit, Finalisation
from storage.partial_results import REASON_BY_STATUS
from storage.running_sums import Corrected
from storage.tables import DEFAULT_TENANT_ID, Job, JobChunk, JobResult, TenantLoad
from storage.workers import WorkerReport
from tests.storage_samples import MODEL, PAST, chunk, claim, new_job, result

pytestmark = pytest.mark.slow

WORKERS = [uuid4() for _ in range(3)]
MAX_FAILURES = 1
MAX_QUEUED = 2
RUNNING = JobStatus.IN_PROGRESS
PROMPT_TOKENS, MAX_TOKENS = 3, 260  # a few of which a running job does not count for
COST = PROMPT_TOKENS + MAX_TOKENS


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
    chunks: list[TokenChunk] = field(default_factory=list)  # of one token each
    reset_number: int = 0  # of the chunk that made those before it void
    num_chunks_at_claim: int = 0
    has_result: bool = False

    @property
    def last_number(self) -> int:
        return self.reset_number + len(self.chunks)

    @property
    def log(self) -> list[TokenChunk]:
        resets = [TokenChunk(sequence_number=self.reset_number, is_reset=True)] if self.reset_number else []
        return resets + self.chunks

    @property
    def lane(self) -> Lane:
        return Lane.ISOLATED if self.num_suspicions >= 2 else Lane.STANDARD

    @property
    def num_unused(self) -> int:
        return MAX_TOKENS - len(self.chunks)

    @property
    def num_excess(self) -> int:
        return max(0, self.num_unused - COUNTED_AHEAD)

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
    """Jobs that ended leave the draw, so that most steps meet a job under way; the transition table has the others."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        super().__init__()
        self.sessions = sessions
        self.jobs: dict[UUID, ModelJob] = {}
        self.beliefs: list[Belief] = []
        self.late: Counter[str] = Counter()  # by how much the sums of what runs are more than that
        with self.sessions.begin() as session:
            session.execute(text("TRUNCATE jobs CASCADE"))
            nothing = {column: 0 for column in TenantLoad.__table__.columns.keys() if column != "tenant_id"}  # noqa: SIM118
            session.execute(update(TenantLoad).values(nothing))

    def live(self, *statuses: JobStatus) -> list[UUID]:
        return [job_id for job_id, job in self.jobs.items() if job.status in statuses]

    def live_beliefs(self) -> list[Belief]:
        return [belief for belief in self.beliefs if not self.jobs[belief.job_id].status.is_terminal]

    def some_belief(self, data: st.DataObject) -> Belief:
        """Of a job that has not ended; where there is none, one is started, so that no step is idle."""
        if not self.live_beliefs():
            if not self.live(JobStatus.QUEUED):
                self.accept(f"fresh-{len(self.jobs)}")
            self.claim_as(self.live(JobStatus.QUEUED)[0], WORKERS[0])
        return data.draw(st.sampled_from(self.live_beliefs()))

    def is_true(self, belief: Belief) -> bool:
        job = self.jobs[belief.job_id]
        return job.status is RUNNING and (job.attempt, job.owner) == (belief.attempt, belief.owner)

    def is_owner(self, belief: Belief) -> bool:
        job = self.jobs[belief.job_id]
        return job.status is RUNNING and job.owner == belief.owner

    def accept(self, key: str) -> None:
        job = new_job(idempotency_key=key, max_failures=MAX_FAILURES, max_tokens=MAX_TOKENS)
        with self.sessions.begin() as session:
            [accepted] = job_accept.accept(session, [job], max_queued_jobs=MAX_QUEUED)
        by_key = {known.key: job_id for job_id, known in self.jobs.items()}
        if key in by_key:
            assert (accepted.outcome, accepted.job_id) == (AcceptOutcome.DUPLICATE, by_key[key])
        elif len(self.live(JobStatus.QUEUED)) >= MAX_QUEUED:
            assert accepted.outcome is AcceptOutcome.TOO_MANY_QUEUED
        else:
            assert accepted.outcome is AcceptOutcome.ACCEPTED
            self.jobs[job.id] = ModelJob(key)

    @rule(key=st.sampled_from("abcdef"))
    def submit(self, key: str) -> None:
        self.accept(key)

    @rule(data=st.data(), owner=st.sampled_from(WORKERS), is_other_lane=st.sampled_from([False, False, False, True]))
    def claim(self, data: st.DataObject, owner: UUID, is_other_lane: bool) -> None:
        job_ids = self.live(JobStatus.QUEUED) or [self.some_belief(data).job_id]
        self.claim_as(data.draw(st.sampled_from(job_ids)), owner, is_other_lane=is_other_lane)

    def claim_as(self, job_id: UUID, owner: UUID, *, is_other_lane: bool = False) -> None:
        job = self.jobs[job_id]
        is_isolated = (job.lane is Lane.ISOLATED) != is_other_lane
        with self.sessions.begin() as session:
            claimed = claim(session, job_id, owner=owner, lane=Lane.ISOLATED if is_isolated else Lane.STANDARD)
        if job.status is not JobStatus.QUEUED or is_other_lane:
            assert claimed == []
            return
        job.status, job.owner, job.attempt = RUNNING, owner, job.attempt + 1
        job.num_chunks_at_claim = len(job.chunks)
        assert [(c.attempt, c.committed_chunks) for c in claimed] == [(job.attempt, job.log)]
        self.beliefs.append(Belief(job_id, job.attempt, owner))

    @rule(data=st.data(), owner=st.sampled_from(WORKERS))
    def hand_over(self, data: st.DataObject, owner: UUID) -> None:
        """The job moves to another worker, or to the same one again; the first still believes."""
        belief = self.some_belief(data)
        self.release_as(belief)
        self.claim_as(belief.job_id, owner)

    @rule(data=st.data(), count=st.integers(1, 3), start=st.sampled_from([0, 0, 0, -1, 1]), is_repeated=st.booleans())
    def flush(self, data: st.DataObject, count: int, start: int, is_repeated: bool) -> None:
        """`start` 0 is the next chunk; -1 repeats one, 1 leaves a gap."""
        belief = self.some_belief(data)
        job = self.jobs[belief.job_id]
        first = max(1, job.last_number + 1 + start)
        chunks = [chunk(number) for number in range(first, first + count)]
        is_next = first == job.last_number + 1
        was_applied = chunks[-1].sequence_number == job.last_number  # an ambiguous commit, repeated
        is_held = self.is_true(belief) and (is_next or was_applied)
        for _ in range(1 + is_repeated):
            with self.sessions.begin() as session:
                commit = ChunkCommit(belief.job_id, belief.attempt, chunks)
                held = jobs.commit_chunks(session, [commit], lease_seconds=60)
            assert [(h.job_id, h.is_cancel_requested) for h in held] == (
                [(belief.job_id, job.is_cancel_requested)] if is_held else []
            )
        unused, excess = job.num_unused, job.num_excess
        job.chunks += chunks if is_held and is_next else []
        self.late += Counter(unused=unused - job.num_unused, excess=excess - job.num_excess)
        job.is_lapsed = job.is_lapsed and not is_held
        if len(job.chunks) - job.num_chunks_at_claim >= PROVEN_TOKENS:
            job.num_suspicions = 0

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        belief = self.some_belief(data)
        job, is_owner = self.jobs[belief.job_id], self.is_owner(belief)
        with self.sessions.begin() as session:
            held = jobs.renew(session, [belief.job_id], owner=belief.owner, lease_seconds=60)
        assert [h.attempt for h in held] == ([job.attempt] if is_owner else [])
        job.is_lapsed = job.is_lapsed and not is_owner

    @rule(data=st.data(), is_late=st.booleans(), is_failed=st.booleans())
    def finalise(self, data: st.DataObject, is_late: bool, is_failed: bool) -> None:
        belief = self.some_belief(data)
        job = self.jobs[belief.job_id]
        last = max(0, job.last_number - is_late)
        status = JobStatus.FAILED if is_failed else JobStatus.COMPLETED
        ending = Finalisation(belief.job_id, belief.attempt, last, status, None if is_failed else result(1))
        is_ours = self.is_true(belief) and last == job.last_number
        for _ in range(2):  # the answer to the first was lost
            with self.sessions.begin() as session:
                assert jobs.finalise(session, [ending]) == ([belief.job_id] if is_ours else [])
        if is_ours:
            job.has_result = not is_failed
            job.end(status)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.release_as(self.some_belief(data))

    def release_as(self, belief: Belief) -> None:
        job, is_owner = self.jobs[belief.job_id], self.is_owner(belief)
        with self.sessions.begin() as session:
            assert bool(jobs.release(session, [belief.job_id], owner=belief.owner)) == is_owner
        if is_owner and job.is_cancel_requested:
            job.end(JobStatus.CANCELLED)
        elif is_owner:
            job.give_back()

    @rule(data=st.data(), weight=st.integers(0, 2))
    def crash(self, data: st.DataObject, weight: int) -> None:
        belief = self.some_belief(data)
        job, is_owner = self.jobs[belief.job_id], self.is_owner(belief)
        is_poison = job.lane is Lane.ISOLATED and weight > 0
        with self.sessions.begin() as session:
            returned = jobs.report_crash(session, {belief.job_id: weight}, owner=belief.owner)
            session.execute(update(Job).values(available_at=PAST))
        if is_owner:
            job.num_suspicions += weight
            job.lose(is_poison=is_poison)
        assert [(r.job_id, r.status) for r in returned] == ([(belief.job_id, job.status)] if is_owner else [])

    @rule(data=st.data())
    def let_lease_lapse(self, data: st.DataObject) -> None:
        job_id = self.some_belief(data).job_id
        with self.sessions.begin() as session:
            lapsing = update(Job).where(Job.id == job_id, Job.status == RUNNING)
            session.execute(lapsing.values(lease_expires_at=PAST))
        self.jobs[job_id].is_lapsed = self.jobs[job_id].status is RUNNING

    @rule(data=st.data(), is_lost=st.booleans())
    def rescue(self, data: st.DataObject, is_lost: bool) -> None:
        if is_lost:
            self.let_lease_lapse(data)
        lapsed = {job_id: job for job_id, job in self.jobs.items() if job.is_lapsed}
        with self.sessions.begin() as session:
            returned = jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=1, quiet_seconds=0)
            session.execute(update(Job).values(available_at=PAST))
        for job in lapsed.values():
            job.lose()
        assert {r.job_id: r.status for r in returned} == {job_id: job.status for job_id, job in lapsed.items()}

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = self.some_belief(data).job_id
        job = self.jobs[job_id]
        with self.sessions.begin() as session:
            cancelled = jobs.cancel(session, job_id, DEFAULT_TENANT_ID)
        job.is_cancel_requested = True
        if job.status is JobStatus.QUEUED:
            job.end(JobStatus.CANCELLED)
        assert cancelled is not None
        assert cancelled.status is job.status

    @rule()
    def restart(self) -> None:
        """Workers of another revision are all there are."""
        worker = uuid4()
        begun = {job_id: job for job_id, job in self.jobs.items() if job.status is JobStatus.QUEUED and job.chunks}
        with self.sessions.begin() as session:
            workers.heartbeat(session, WorkerReport(worker, "gpu@here", MODEL, 8, 0, 0.0, model_revision="other"))
            restarted = jobs.restart(session, MODEL, "main", live_seconds=60)
            workers.forget(session, worker)
        assert {job.job_id: job.num_tokens for job in restarted} == {id_: len(job.chunks) for id_, job in begun.items()}
        for job in begun.values():
            job.reset_number, job.chunks, job.num_chunks_at_claim = job.last_number + 1, [], 0

    @rule()
    def correct_sums(self) -> None:
        with self.sessions.begin() as session:
            assert running_sums.correct(session, max_off_tokens=0) == Corrected(1 if self.late else 0, 0)
        self.late.clear()

    @rule()
    def look_for_missing_messages(self) -> None:
        with self.sessions() as session:
            found = jobs.claimable_soon(session, MODEL, model_revisions=["main"], limit=100)
        queued = {job_id for job_id in self.live(JobStatus.QUEUED) if self.jobs[job_id].lane is Lane.STANDARD}
        assert set(found) == queued

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
            assert chunks.get(job_id, []) == job.log
            assert (row.committed_sequence_number, row.num_committed_tokens) == (job.last_number, len(job.chunks))
            assert (job_id in results) == job.has_result
            assert row.finish_reason is (REASON_BY_STATUS.get(job.status) if job.has_result else None)
        statuses = [job.status for job in self.jobs.values()]
        assert load.num_queued == statuses.count(JobStatus.QUEUED)
        assert load.num_running == statuses.count(JobStatus.IN_PROGRESS)
        # Charged at a claim, corrected at the end of the attempt: the tokens taken, and the costs of those that run.
        taken = (PROMPT_TOKENS + len(job.chunks) if job.attempt else 0 for job in self.jobs.values())
        running = [job for job in self.jobs.values() if job.status is RUNNING]
        assert load.virtual_time == sum(taken) + sum(job.num_unused for job in running)
        # The same statements keep these; what running jobs took is known at the next correction.
        assert load.num_queued_tokens == COST * load.num_queued
        assert load.num_unused_tokens == sum(job.num_unused for job in running) + self.late["unused"]
        assert load.num_excess_tokens == sum(job.num_excess for job in running) + self.late["excess"]


def test_any_sequence_of_calls_leaves_what_the_model_says(session_factory: sessionmaker[Session]) -> None:
    run_state_machine_as_test(
        lambda: Store(session_factory),  # type: ignore[arg-type]
        settings=settings(
            max_examples=30,
            stateful_step_count=30,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
