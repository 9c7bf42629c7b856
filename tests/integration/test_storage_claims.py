"""Claiming: the order is fair, and each job goes to one worker."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import BATCH_PRIORITY, JobStatus, Lane
from domain.requests import GenerationRequest
from storage import administration, job_accept, jobs, running_sums, tenants
from storage.administration import KeyChanges
from storage.jobs import ChunkCommit, Finalisation
from storage.running_sums import Corrected
from storage.tables import Job, JobPayload, TenantLoad
from tests.conftest import MakeJob, MakeTenant
from tests.storage_samples import MODEL, PAST, chunk, claim, load_of, new_job, result

Sessions = sessionmaker[Session]


def next_jobs(session: Session, limit: int, **arguments: object) -> list[UUID]:
    """Claims them, and commits that; in order."""
    options = {"owner": uuid4(), "model_revision": "main", "lease_seconds": 60.0, **arguments}
    claimed = jobs.claim(session, MODEL, limit=limit, **options)  # type: ignore[arg-type]
    session.commit()
    return [job.id for job in claimed]


class TestOrder:
    def test_the_order_of_one_tenant_is_priority_then_age(self, session: Session, make_job: MakeJob) -> None:
        old = make_job(available_at=datetime.now(UTC) - timedelta(minutes=30))
        middle, urgent = make_job(), make_job(priority=8)
        assert next_jobs(session, 2) == [urgent.id, old.id]
        assert next_jobs(session, 2) == [middle.id]
        assert next_jobs(session, 2) == []

    def test_an_urgent_job_starts_before_all_that_are_not_claimed(self, session: Session, make_job: MakeJob) -> None:
        for _ in range(14):
            make_job(priority=-5)
        assert len(next_jobs(session, 2)) == 2
        urgent = make_job(priority=5)
        assert next_jobs(session, 1) == [urgent.id]

    def test_each_sequence_takes_a_slot(self, session: Session, make_job: MakeJob) -> None:
        """A job of which only a part finds room is the last."""
        ids = [make_job(max_tokens=10, num_prompt_tokens=5, cost=5 + 10 * number).id for number in (4, 3, 1, 1)]
        assert next_jobs(session, 8, num_slots=6) == ids[:2]
        assert next_jobs(session, 8, num_slots=1) == ids[2:3]
        assert next_jobs(session, 8) == ids[3:]

    def test_isolated_jobs_and_other_models_are_left(self, session: Session, make_job: MakeJob) -> None:
        make_job(lane=Lane.ISOLATED)
        make_job(model="another")
        assert next_jobs(session, 8) == []

    def test_a_new_tenant_is_next_whatever_waits_before_it(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        """Also when the first one's jobs have used little of what they were charged, as those that stop early."""
        noisy, quiet = make_tenant(), make_tenant()
        for _ in range(20):
            make_job(tenant_id=noisy.id, cost=1000)
        running = next_jobs(session, 2)
        [accepted] = job_accept.accept(session, [new_job(tenant_id=quiet.id)], max_queued_jobs=10)
        session.commit()
        ending = Finalisation(running[0], 1, 0, JobStatus.COMPLETED, result(1))
        assert jobs.finalise(session, [ending]) == running[:1]
        assert next_jobs(session, 1) == [accepted.job_id]

    def test_priority_does_not_count_among_tenants_without_leave(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        loud, quiet = make_tenant(), make_tenant()
        tenant_by_job = {
            make_job(tenant_id=tenant.id, priority=priority).id: tenant.id
            for _ in range(10)
            for tenant, priority in ((loud, 10), (quiet, -10))
        }
        served = Counter(tenant_by_job[job_id] for _ in range(10) for job_id in next_jobs(session, 1))
        assert served == {loud.id: 5, quiet.id: 5}

    def test_a_tenant_with_leave_is_first_and_pays_for_it(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        """Two steps are a lead of 2,000 tokens. After that, the shares are as without."""
        urgent, other = make_tenant(max_priority=2), make_tenant()
        tenant_by_job = {
            make_job(tenant_id=tenant.id, priority=10, cost=250).id: tenant.id
            for _ in range(20)
            for tenant in (urgent, other)
        }
        order = [tenant_by_job[job_id] for _ in range(24) for job_id in next_jobs(session, 1)]
        assert order[:8] == [urgent.id] * 8
        assert 7 <= Counter(order[8:])[other.id] <= 9

    def test_a_key_has_no_more_leave_than_it_was_given(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        """Leads of 4,000 tokens, of 2,000 and of none, in jobs of 250."""
        whole, little, none, gone = (make_tenant(max_priority=4) for _ in range(4))
        tenant_by_job = {}
        for tenant, most in ((whole, 10), (little, 2), (none, 0), (gone, 10)):
            key_id = tenants.create_key(session, tenant.id).split("_")[1]
            administration.change_key(session, key_id, KeyChanges(max_priority=most), actor="test")
            for _ in range(30):
                tenant_by_job[make_job(tenant_id=tenant.id, key_id=key_id, priority=10, cost=250).id] = tenant.id
        administration.delete_key(session, key_id, actor="test")
        order = [tenant_by_job[job_id] for _ in range(32) for job_id in next_jobs(session, 1)]
        assert order[:8] == [whole.id] * 8
        assert 7 <= order.index(little.id) <= 9
        assert 22 <= order.index(none.id) <= 26
        assert 22 <= order.index(gone.id) <= 27

    def test_a_lead_does_not_put_a_new_job_before_an_old_one_of_its_tenant(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        tenant = make_tenant(max_priority=10)
        for _ in range(5):
            make_job(tenant_id=tenant.id, priority=10, cost=200)
        old = make_job(tenant_id=tenant.id, available_at=datetime.now(UTC) - timedelta(hours=10))
        assert next_jobs(session, 1) == [old.id]

    @pytest.mark.parametrize("weights", [(1,) * 10, (1, 2, 4)])
    def test_tenants_get_tokens_by_weight(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant, weights: tuple[int, ...]
    ) -> None:
        """Four slots, claimed one at a time; jobs that cost the more or the less, and use all or a part of it."""
        chooser = random.Random(5)
        tenants = {make_tenant(weight=weight).id: weight for weight in weights}
        cost_by_job = {}
        for tenant_id in tenants:
            for _ in range(20 + 100 * tenants[tenant_id] // sum(weights)):
                cost = chooser.choice([20, 50, 200])
                job = make_job(tenant_id=tenant_id, cost=cost, num_prompt_tokens=chooser.randrange(10, cost))
                cost_by_job[job.id] = tenant_id, job.num_prompt_tokens
        running: list[UUID] = next_jobs(session, 4)
        received: Counter[UUID] = Counter()
        for _ in range(100):
            ended = running.pop(chooser.randrange(4))
            tenant_id, num_tokens = cost_by_job[ended]
            received[tenant_id] += num_tokens
            jobs.finalise(session, [Finalisation(ended, 1, 0, JobStatus.COMPLETED, result(1))])
            running += next_jobs(session, 1)
        shares = [received[tenant_id] / weight for tenant_id, weight in tenants.items()]
        assert sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) >= 0.95  # Jain's index

    @pytest.mark.parametrize("are_kept", [False, True])
    def test_a_long_job_that_runs_does_not_put_its_tenant_behind_all_others(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant, are_kept: bool
    ) -> None:
        """What it may still take counts when it takes it. So does what an ended one has not taken. Kept sums know
        claims at once, and what is taken when they are corrected."""
        if are_kept:
            assert running_sums.correct(session) == Corrected(0, 0)
            session.commit()
        patient, brisk = make_tenant(), make_tenant()
        long = [make_job(tenant_id=patient.id, max_tokens=100_000, cost=100_003).id for _ in range(3)]
        [first] = next_jobs(session, 1)
        assert first == long[0]
        short = [make_job(tenant_id=brisk.id, max_tokens=97, cost=100).id for _ in range(20)]
        assert next_jobs(session, 1) == short[:1]
        ahead = [*next_jobs(session, 1), *next_jobs(session, 1)]
        assert ahead == short[1:3], "the long one counts for a little more than the next short ones"
        assert next_jobs(session, 1) == long[1:2]
        session.execute(update(Job).where(Job.id == first).values(num_committed_tokens=1000))
        session.commit()
        if are_kept:
            assert running_sums.correct(session) == Corrected(1, 0)
            session.commit()
        assert next_jobs(session, 6) == short[3:9], "by now it has taken more"

    def test_batch_lines_run_when_no_other_job_waits(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        lines = [make_job(priority=BATCH_PRIORITY).id for _ in range(3)]
        assert next_jobs(session, 3) == [], "none is let in"
        assert jobs.let_lines_in(session, MODEL, limit=2) == lines[:2]
        live = make_job(tenant_id=make_tenant().id)
        assert next_jobs(session, 3) == [live.id]
        assert next_jobs(session, 3) == lines[:2]

    def test_a_line_that_has_waited_for_hours_is_as_good_as_others(self, session: Session, make_job: MakeJob) -> None:
        old = make_job(priority=BATCH_PRIORITY, num_dispatches=1, available_at=PAST - timedelta(hours=3))
        live = make_job()
        assert next_jobs(session, 2) == [old.id, live.id]

    def test_many_waiting_tenants_do_not_hide_those_of_another_model(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        for _ in range(70):
            make_job(tenant_id=make_tenant().id, model="unserved")
        late = make_tenant()
        session.execute(update(TenantLoad).where(TenantLoad.tenant_id == late.id).values(virtual_time=1e6))
        session.commit()
        job = make_job(tenant_id=late.id)
        assert next_jobs(session, 1) == [job.id]

    def test_letting_lines_in_and_claims_wait_for_no_disk_and_no_other_commit_is_spared(
        self, session_factory: Sessions, make_job: MakeJob
    ) -> None:
        job = make_job(priority=BATCH_PRIORITY)
        setting = text("SHOW synchronous_commit")
        with session_factory.begin() as session:
            assert jobs.let_lines_in(session, MODEL, limit=1) == [job.id]
            assert session.scalar(setting) == "off"
        with session_factory.begin() as session:
            assert jobs.claim(session, MODEL, limit=1, owner=uuid4(), model_revision="main", lease_seconds=60)
            assert session.scalar(setting) == "off"
        with session_factory.begin() as session:
            commit = ChunkCommit(job.id, 1, [chunk(1)])
            assert jobs.commit_chunks(session, [commit], lease_seconds=60)
            assert jobs.finalise(session, [Finalisation(job.id, 1, 1, JobStatus.COMPLETED, result(1))]) == [job.id]
            assert session.scalar(setting) == "on"


class TestClaim:
    def test_a_redelivered_job_is_claimed_once(self, session: Session, make_job: MakeJob) -> None:
        job = make_job()
        [claimed] = claim(session, job.id)
        assert (claimed.id, claimed.attempt, claimed.prompt_token_ids) == (job.id, 1, [1, 2, 3])
        assert claimed.request == GenerationRequest(model=MODEL, prompt="Once upon a time")
        assert claimed.committed_chunks == []
        assert claim(session, job.id) == []

    def test_a_job_that_cannot_be_read_holds_up_no_other(self, session: Session, make_job: MakeJob) -> None:
        broken, other = make_job(priority=5), make_job()
        session.execute(update(JobPayload).where(JobPayload.job_id == broken.id).values(request=text("'{}'::json")))
        assert next_jobs(session, 2) == [other.id]
        row = session.get_one(Job, broken.id, populate_existing=True)
        assert (row.status, row.num_failures) == (JobStatus.QUEUED, 0), "a newer worker may be able to read it"
        assert row.available_at > datetime.now(UTC) + timedelta(seconds=10), "and others need not read it again at once"

    def test_concurrent_claims_give_each_job_to_one_worker(self, session_factory: Sessions, make_job: MakeJob) -> None:
        ids = [make_job().id for _ in range(60)]

        def take(seed: int) -> list[UUID]:
            mine = random.Random(seed).sample(ids, 30)
            with session_factory.begin() as session:
                claimed = claim(session, *mine)
                claimed += jobs.claim(session, MODEL, limit=2, owner=uuid4(), model_revision="main", lease_seconds=60)
                return [job.id for job in claimed]

        with ThreadPoolExecutor(8) as threads:
            taken = [job_id for group in threads.map(take, range(24)) for job_id in group]
        assert sorted(taken) == sorted(ids)
        with session_factory() as session:
            load = load_of(session)
            assert (load.num_queued, load.num_running, load.virtual_time) == (0, 60, 60 * 19)

    def test_a_continued_job_brings_its_chunks_and_keeps_its_revision(
        self, session: Session, make_job: MakeJob
    ) -> None:
        job, owner = make_job(), uuid4()
        [first] = claim(session, job.id, owner=owner)
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1), chunk(2)])], lease_seconds=60)
        jobs.release(session, [job.id], owner=owner)
        assert claim(session, job.id, model_revision="another") == []
        [second] = claim(session, job.id)
        assert (first.attempt, second.attempt) == (1, 2)
        assert second.committed_chunks == [chunk(1), chunk(2)]

    def test_the_first_claim_narrows_the_deadline_to_the_run_timeout(self, session: Session, make_job: MakeJob) -> None:
        far = datetime.now(UTC) + timedelta(hours=2)
        job, owner = make_job(run_timeout_seconds=600.0, deadline_at=far), uuid4()
        claim(session, job.id, owner=owner)
        row = session.get_one(Job, job.id, populate_existing=True)
        assert row.started_at is not None
        assert row.deadline_at is not None
        assert abs(row.deadline_at - row.started_at - timedelta(seconds=600)) < timedelta(seconds=1)
        jobs.release(session, [job.id], owner=owner)
        session.execute(update(Job).where(Job.id == job.id).values(deadline_at=far))
        claim(session, job.id)
        assert session.get_one(Job, job.id, populate_existing=True).deadline_at == far

    def test_lapsed_deadlines_are_not_claimed(self, session: Session, make_job: MakeJob) -> None:
        late, late_start = make_job(deadline_at=PAST), make_job(start_deadline_at=PAST)
        begun = make_job(start_deadline_at=PAST, attempt=1)  # its start was in time
        assert [job.id for job in claim(session, late.id, late_start.id, begun.id)] == [begun.id]

    def test_the_isolated_lane_is_claimed_by_name(self, session: Session, make_job: MakeJob) -> None:
        make_job(lane=Lane.ISOLATED)
        options = {"owner": uuid4(), "model_revision": "main", "lease_seconds": 60.0}
        assert jobs.claim(session, MODEL, limit=1, **options) == []  # type: ignore[arg-type]
        [claimed] = jobs.claim(session, MODEL, limit=1, lane=Lane.ISOLATED, **options)  # type: ignore[arg-type]
        assert claimed.lane is Lane.ISOLATED

    def test_fairness_charges_the_cost_first_and_the_tokens_in_the_end(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        tenant = make_tenant(weight=2)
        job = make_job(tenant_id=tenant.id, cost=100, num_prompt_tokens=3)
        claim(session, job.id)
        assert load_of(session, tenant.id).virtual_time == 50
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        jobs.finalise(session, [Finalisation(job.id, 1, 1, JobStatus.COMPLETED, result(1))])
        assert load_of(session, tenant.id).virtual_time == 2  # (3 + 1) / 2
