"""Dispatching and claiming: the order is fair, and each job goes to one worker."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus, Lane
from domain.requests import GenerationRequest
from storage import jobs
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import Job, TenantLoad
from tests.conftest import MakeJob, MakeTenant
from tests.storage_samples import MODEL, PAST, chunk, claim, load_of, result

Sessions = sessionmaker[Session]


class TestDispatch:
    def test_the_order_is_priority_then_age(self, session: Session, make_job: MakeJob) -> None:
        old = make_job(available_at=datetime.now(UTC) - timedelta(minutes=30))
        middle, urgent = make_job(), make_job(priority=8)
        assert jobs.dispatch(session, MODEL, room=2) == [urgent.id, old.id]
        assert jobs.dispatch(session, MODEL, room=2) == [middle.id]
        assert jobs.dispatch(session, MODEL, room=2) == []

    def test_a_job_nobody_claims_comes_due_again_later_and_later(self, session: Session, make_job: MakeJob) -> None:
        job = make_job()
        delays = []
        for _ in range(5):
            assert jobs.dispatch(session, MODEL, room=1) == [job.id]
            row = session.get_one(Job, job.id, populate_existing=True)
            now = session.execute(select(func.statement_timestamp())).scalar_one()
            delays.append((row.dispatch_at - now).total_seconds())
            session.execute(update(Job).where(Job.id == job.id).values(dispatch_at=func.statement_timestamp()))
        for delay, expected in zip(delays, [15, 30, 60, 120, 120], strict=True):
            assert expected * 0.79 <= delay <= expected * 1.21

    def test_its_commit_waits_for_no_disk_and_no_other_commit_is_spared(
        self, session_factory: Sessions, make_job: MakeJob
    ) -> None:
        job = make_job()
        setting = text("SHOW synchronous_commit")
        with session_factory.begin() as session:
            assert jobs.dispatch(session, MODEL, room=1) == [job.id]
            assert session.scalar(setting) == "off"
        with session_factory.begin() as session:
            assert claim(session, job.id)
            assert session.scalar(setting) == "on"

    def test_isolated_jobs_and_other_models_get_no_message(self, session: Session, make_job: MakeJob) -> None:
        make_job(lane=Lane.ISOLATED)
        make_job(model="another")
        assert jobs.dispatch(session, MODEL, room=8) == []

    def test_a_quiet_tenant_is_not_behind_a_noisy_one(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        noisy, quiet = make_tenant(), make_tenant()
        for _ in range(100):
            make_job(tenant_id=noisy.id)
        job = make_job(tenant_id=quiet.id)
        assert job.id in jobs.dispatch(session, MODEL, room=2)

    def test_tenants_are_served_by_weight(self, session: Session, make_job: MakeJob, make_tenant: MakeTenant) -> None:
        light, heavy = make_tenant(weight=1), make_tenant(weight=3)
        tenant_by_job = {make_job(tenant_id=tenant.id).id: tenant for _ in range(40) for tenant in (light, heavy)}
        served: Counter[UUID] = Counter()
        while sum(served.values()) < 40:
            dispatched = jobs.dispatch(session, MODEL, room=4)
            claimed = claim(session, *dispatched)
            served.update(tenant_by_job[job.id].id for job in claimed)
        assert 28 <= served[heavy.id] <= 32

    def test_many_waiting_tenants_do_not_hide_those_of_another_model(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        for _ in range(70):
            make_job(tenant_id=make_tenant().id, model="unserved")
        late = make_tenant()
        session.execute(update(TenantLoad).where(TenantLoad.tenant_id == late.id).values(virtual_time=1e6))
        session.commit()
        job = make_job(tenant_id=late.id)
        assert jobs.dispatch(session, MODEL, room=1) == [job.id]

    def test_concurrent_dispatchers_never_pick_the_same_job(self, session_factory: Sessions, make_job: MakeJob) -> None:
        ids = [make_job().id for _ in range(60)]

        def pick(_: int) -> list[UUID]:
            with session_factory.begin() as session:
                return jobs.dispatch(session, MODEL, room=7)

        with ThreadPoolExecutor(6) as threads:
            picked = [job_id for group in threads.map(pick, range(20)) for job_id in group]
        while rest := pick(0):  # what one skipped because another held it
            picked += rest
        assert sorted(picked) == sorted(ids)


class TestClaim:
    def test_a_redelivered_job_is_claimed_once(self, session: Session, make_job: MakeJob) -> None:
        job = make_job()
        [claimed] = claim(session, job.id)
        assert (claimed.id, claimed.attempt, claimed.prompt_token_ids) == (job.id, 1, [1, 2, 3])
        assert claimed.request == GenerationRequest(model=MODEL, prompt="Once upon a time")
        assert claimed.committed_chunks == []
        assert claim(session, job.id) == []

    def test_the_answer_keeps_the_order_of_the_messages(self, session: Session, make_job: MakeJob) -> None:
        ids = [make_job().id for _ in range(12)]
        random.Random(1).shuffle(ids)
        assert [job.id for job in claim(session, *ids, uuid4())] == ids

    def test_concurrent_claims_give_each_job_to_one_worker(self, session_factory: Sessions, make_job: MakeJob) -> None:
        ids = [make_job().id for _ in range(60)]

        def take(seed: int) -> list[UUID]:
            mine = random.Random(seed).sample(ids, 30)
            with session_factory.begin() as session:
                claimed = claim(session, *mine)
                claimed += jobs.claim_next(
                    session, MODEL, limit=2, owner=uuid4(), model_revision="main", lease_seconds=60
                )
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

    def test_the_isolated_lane_is_served_by_claim_next_alone(self, session: Session, make_job: MakeJob) -> None:
        job = make_job(lane=Lane.ISOLATED)
        options = {"owner": uuid4(), "model_revision": "main", "lease_seconds": 60.0}
        assert claim(session, job.id) == []
        assert jobs.claim_next(session, MODEL, limit=1, **options) == []  # type: ignore[arg-type]
        [claimed] = jobs.claim_next(session, MODEL, limit=1, lane=Lane.ISOLATED, **options)  # type: ignore[arg-type]
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
