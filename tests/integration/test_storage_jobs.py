"""Running and ending jobs: fences, rescues, and no committed output lost."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import FinishReason, JobStatus, Lane, Usage
from domain.requests import GenerationResult, TokenChunk
from storage import jobs
from storage.job_statements import PROVEN_TOKENS
from storage.jobs import ChunkCommit, ClaimedJob, Finalisation
from storage.tables import DEFAULT_TENANT_ID, Job, JobChunk, JobResult
from tests.conftest import MakeJob
from tests.storage_samples import MODEL, PAST, chunk, claim, load_of, result

Sessions = sessionmaker[Session]


@pytest.fixture
def running(session: Session, make_job: MakeJob) -> Callable[..., ClaimedJob]:
    """A claimed job; `owner` is readable from its row."""

    def make(**columns: object) -> ClaimedJob:
        job = make_job(**columns)
        [claimed] = claim(session, job.id)
        session.commit()
        return claimed

    return make


def status_after_cancel(session: Session, job_id: UUID) -> JobStatus:
    cancelled = jobs.cancel(session, job_id, DEFAULT_TENANT_ID)
    assert cancelled is not None
    return cancelled.status


def generated(session: Session, job_id: UUID) -> GenerationResult:
    result = session.get_one(JobResult, job_id).result
    assert isinstance(result, GenerationResult)
    return result


class TestChunks:
    def test_a_gap_is_fenced_and_the_rest_of_the_batch_is_not(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        good, gap, stale = running(), running(), running()
        commits = [
            ChunkCommit(good.id, 1, [chunk(1), chunk(2)]),
            ChunkCommit(gap.id, 1, [chunk(2)]),
            ChunkCommit(stale.id, 0, [chunk(1)]),
        ]
        held = jobs.commit_chunks(session, commits, lease_seconds=60)
        assert [job.job_id for job in held] == [good.id]
        assert session.scalars(select(JobChunk.job_id).distinct()).all() == [good.id]
        row = session.get_one(Job, good.id, populate_existing=True)
        assert (row.committed_sequence_number, row.num_committed_tokens) == (2, 2)

    def test_a_repeated_commit_is_held_and_counted_once(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        for _ in range(2):
            [held] = jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1), chunk(2)])], lease_seconds=60)
            assert held.job_id == job.id
        row = session.get_one(Job, job.id, populate_existing=True)
        assert (row.committed_sequence_number, row.num_committed_tokens) == (2, 2)
        assert session.scalar(select(func.count()).select_from(JobChunk)) == 2

    def test_the_answer_brings_cancel_and_deadline(self, session: Session, running: Callable[..., ClaimedJob]) -> None:
        cancelled, late, untouched = running(), running(), running()
        jobs.cancel(session, cancelled.id, DEFAULT_TENANT_ID)
        session.execute(update(Job).where(Job.id == late.id).values(deadline_at=PAST))
        commits = [ChunkCommit(job.id, 1, [chunk(1)]) for job in (cancelled, late, untouched)]
        held = {job.job_id: job for job in jobs.commit_chunks(session, commits, lease_seconds=60)}
        assert [held[j.id].is_cancel_requested for j in (cancelled, late, untouched)] == [True, False, False]
        assert [held[j.id].is_past_deadline for j in (cancelled, late, untouched)] == [False, True, False]

    def test_a_commit_renews_the_lease(self, session: Session, running: Callable[..., ClaimedJob]) -> None:
        job = running()
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=PAST))
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        assert jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=0, quiet_seconds=0) == []


class TestFinalise:
    def test_a_group_ends_with_its_results(self, session: Session, running: Callable[..., ClaimedJob]) -> None:
        done, stale = running(), running()
        endings = [
            Finalisation(done.id, 1, 0, JobStatus.COMPLETED, result(5), FinishReason.STOP),
            Finalisation(stale.id, 2, 0, JobStatus.COMPLETED, result(5), FinishReason.STOP),
        ]
        assert jobs.finalise(session, endings) == [done.id]
        assert session.get_one(JobResult, done.id).result == result(5)
        assert session.get(JobResult, stale.id) is None
        assert session.get_one(Job, done.id, populate_existing=True).finish_reason is FinishReason.STOP

    def test_the_sequence_number_is_a_second_fence(self, session: Session, running: Callable[..., ClaimedJob]) -> None:
        job = running()
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        assert jobs.finalise(session, [Finalisation(job.id, 1, 0, JobStatus.COMPLETED, result(0))]) == []

    def test_a_repeated_finalise_is_ours_and_changes_nothing(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        ending = Finalisation(job.id, 1, 0, JobStatus.COMPLETED, result(5), FinishReason.STOP)
        assert jobs.finalise(session, [ending]) == jobs.finalise(session, [ending]) == [job.id]
        assert load_of(session).num_running == 0


class TestReturning:
    """What becomes of jobs whose worker is gone."""

    def owner_of(self, session: Session, job: ClaimedJob) -> UUID:
        owner = session.get_one(Job, job.id, populate_existing=True).lease_owner
        assert owner is not None
        return owner

    def test_a_release_is_not_charged_and_keeps_the_place(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running(available_at=PAST)
        [released] = jobs.release(session, [job.id], owner=self.owner_of(session, job))
        assert released.job_id == job.id
        row = session.get_one(Job, job.id, populate_existing=True)
        assert (row.num_failures, row.available_at, row.lane) == (0, PAST, Lane.STANDARD)
        [again] = jobs.claim(session, MODEL, limit=1, owner=uuid4(), model_revision="main", lease_seconds=60)
        assert again.id == job.id

    def test_rescue_waits_until_the_database_has_been_up_a_while(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=PAST))
        assert jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=2, quiet_seconds=10**6) == []
        [returned] = jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=2, quiet_seconds=0)
        assert (returned.job_id, returned.status, returned.attempt) == (job.id, JobStatus.QUEUED, 1)

    def test_rescue_leaves_a_lease_that_lapsed_after_the_moment_of_the_look(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=PAST))
        assert jobs.rescue(session, as_of=PAST, grace_seconds=0, quiet_seconds=-(10**6)) == []
        after = PAST + timedelta(seconds=1)
        assert len(jobs.rescue(session, as_of=after, grace_seconds=0, quiet_seconds=-(10**6))) == 1

    def test_a_renewal_during_the_rescue_wins(
        self, session_factory: Sessions, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        owner = self.owner_of(session, job)
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=PAST))
        session.commit()
        with session_factory() as renewing:
            assert jobs.renew(renewing, [job.id], owner=owner, lease_seconds=60)
            rescued_under_lock = jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=2, quiet_seconds=0)
            assert rescued_under_lock == []
            renewing.commit()
        assert jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=2, quiet_seconds=0) == []  # renewed
        session.commit()

    def test_retries_are_first_at_once_and_then_ever_later(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job, delays = running(max_failures=9), []
        for _ in range(4):
            jobs.report_crash(session, {job.id: 0}, owner=self.owner_of(session, job))
            row = session.get_one(Job, job.id, populate_existing=True)
            now = session.execute(select(func.statement_timestamp())).scalar_one()
            delays.append((row.available_at - now).total_seconds())
            session.execute(update(Job).where(Job.id == job.id).values(available_at=PAST))
            assert claim(session, job.id)
        assert delays[0] <= 0
        for delay, longest in zip(delays[1:], [2, 4, 8], strict=True):
            assert longest * 0.49 <= delay <= longest

    def test_the_last_failure_is_final_and_keeps_the_output(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running(max_failures=0)
        jobs.commit_chunks(
            session,
            [ChunkCommit(job.id, 1, [chunk(1), chunk(2, index=1, reason=FinishReason.STOP), chunk(3)])],
            lease_seconds=60,
        )
        [returned] = jobs.report_crash(session, {job.id: 1}, owner=self.owner_of(session, job))
        assert returned.status is JobStatus.FAILED
        row = session.get_one(Job, job.id, populate_existing=True)
        assert row.error is not None
        assert (row.error.code, row.error.retryable) == ("worker_lost", True)
        stored = generated(session, job.id)
        assert [(c.index, c.text, c.finish_reason) for c in stored.choices] == [
            (0, "1 3 ", FinishReason.ERROR),
            (1, "2 ", FinishReason.STOP),
        ]
        assert stored.usage == Usage(prompt_tokens=3, completion_tokens=3)

    def test_suspicion_isolates_and_a_crash_alone_is_final(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        suspect, bystander = running(), running()
        for job, weight in ((suspect, 2), (bystander, 0)):
            jobs.report_crash(session, {job.id: weight}, owner=self.owner_of(session, job))
        assert session.get_one(Job, bystander.id, populate_existing=True).lane is Lane.STANDARD
        [alone] = jobs.claim(
            session, MODEL, limit=1, owner=uuid4(), model_revision="main", lease_seconds=60, lane=Lane.ISOLATED
        )
        assert alone.id == suspect.id
        [returned] = jobs.report_crash(session, {suspect.id: 1}, owner=self.owner_of(session, suspect))
        assert returned.status is JobStatus.FAILED
        error = session.get_one(Job, suspect.id, populate_existing=True).error
        assert error is not None
        assert error.code == "poison_job"

    @pytest.mark.parametrize(("num_suspicions", "lane"), [(2, Lane.STANDARD), (0, Lane.ISOLATED)])
    def test_enough_tokens_alone_clear_a_suspect_and_nobody_else(
        self, session: Session, make_job: MakeJob, num_suspicions: int, lane: Lane
    ) -> None:
        """A tenant's past, or the retry of a job that failed, isolates without suspicion, and to the end."""
        job = make_job(lane=Lane.ISOLATED, num_suspicions=num_suspicions)
        options = {"owner": uuid4(), "model_revision": "main", "lease_seconds": 60}
        assert jobs.claim(session, MODEL, limit=1, lane=Lane.ISOLATED, min_suspicions=3, **options) == []  # type: ignore[arg-type]
        assert len(jobs.claim(session, MODEL, limit=1, lane=Lane.ISOLATED, **options)) == 1  # type: ignore[arg-type]
        for number, num_tokens in ((1, PROVEN_TOKENS - 1), (2, 1)):
            assert session.get_one(Job, job.id, populate_existing=True).lane is Lane.ISOLATED
            piece = TokenChunk(sequence_number=number, index=0, text="", token_ids=(7,) * num_tokens)
            assert jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [piece])], lease_seconds=60)
        row = session.get_one(Job, job.id, populate_existing=True)
        assert (row.num_suspicions, row.lane) == (0, lane)

    @pytest.mark.parametrize(
        ("columns", "status", "reason"),
        [
            ({"cancel_requested_at": PAST}, JobStatus.CANCELLED, FinishReason.CANCELLED),
            ({"deadline_at": PAST}, JobStatus.EXPIRED, FinishReason.DEADLINE),
        ],
    )
    def test_a_rescued_job_that_is_to_end_keeps_its_output(
        self,
        session: Session,
        running: Callable[..., ClaimedJob],
        columns: dict[str, object],
        status: JobStatus,
        reason: FinishReason,
    ) -> None:
        job = running()
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        session.execute(update(Job).where(Job.id == job.id).values(lease_expires_at=PAST, **columns))
        [returned] = jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=2, quiet_seconds=0)
        assert returned.status is status
        assert generated(session, job.id).choices[0].finish_reason is reason
        assert session.get_one(Job, job.id, populate_existing=True).finish_reason is reason


class TestEnding:
    def test_cancel_is_idempotent_and_tells_the_status(self, session: Session, make_job: MakeJob) -> None:
        queued, done = make_job(), make_job(status=JobStatus.COMPLETED)
        assert status_after_cancel(session, queued.id) is JobStatus.CANCELLED
        assert status_after_cancel(session, queued.id) is JobStatus.CANCELLED
        assert status_after_cancel(session, done.id) is JobStatus.COMPLETED
        assert jobs.cancel(session, uuid4(), DEFAULT_TENANT_ID) is None
        assert jobs.cancel(session, done.id, uuid4()) is None

    def test_a_queued_job_cancelled_between_attempts_keeps_its_output(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        owner = session.get_one(Job, job.id, populate_existing=True).lease_owner
        assert owner is not None
        jobs.release(session, [job.id], owner=owner)
        assert [asked.job_id for asked in jobs.request_cancel(session, [job.id])] == [job.id]
        assert generated(session, job.id).choices[0].text == "1 "

    def test_a_job_that_was_to_cancel_is_not_left_queued_by_a_release(
        self, session: Session, running: Callable[..., ClaimedJob]
    ) -> None:
        job = running()
        assert status_after_cancel(session, job.id) is JobStatus.IN_PROGRESS
        owner = session.get_one(Job, job.id, populate_existing=True).lease_owner
        assert owner is not None
        jobs.release(session, [job.id], owner=owner)
        assert session.get_one(Job, job.id, populate_existing=True).status is JobStatus.CANCELLED

    def test_pruning_takes_what_is_over_its_time_and_all_that_hangs_on_it(
        self, session: Session, make_job: MakeJob
    ) -> None:
        old, kept = make_job(status=JobStatus.COMPLETED, prune_at=PAST), make_job(status=JobStatus.COMPLETED)
        session.add(JobChunk(job_id=old.id, sequence_number=1, attempt=1, chunk=chunk(1)))
        session.commit()
        assert jobs.prune(session) == 1
        assert session.scalars(select(Job.id)).all() == [kept.id]
        assert session.scalar(select(func.count()).select_from(JobChunk)) == 0

    def test_deleting_fences_off_the_owner(self, session: Session, running: Callable[..., ClaimedJob]) -> None:
        job = running()
        assert not jobs.delete(session, job.id, uuid4())
        assert jobs.delete(session, job.id, DEFAULT_TENANT_ID)
        assert jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60) == []
        assert load_of(session).num_running == 0
        assert load_of(session).virtual_time == 3  # the prompt was read, nothing else
