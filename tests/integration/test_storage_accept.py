"""Accepting groups of jobs: bounds, idempotency, and a fair start."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus
from domain.requests import GenerationRequest
from storage import job_accept
from storage.job_accept import AcceptOutcome, NewJob
from storage.tables import Job, JobPayload, TenantLoad
from tests.conftest import MakeTenant
from tests.storage_samples import MODEL, load_of, new_job

ACCEPTED, DUPLICATE = AcceptOutcome.ACCEPTED, AcceptOutcome.DUPLICATE
KEY_REUSED, TOO_MANY = AcceptOutcome.KEY_REUSED, AcceptOutcome.TOO_MANY_QUEUED
Sessions = sessionmaker[Session]


def accept(sessions: Sessions, *new_jobs: NewJob, bound: int = 1000) -> list[AcceptOutcome]:
    with sessions.begin() as session:
        return [accepted.outcome for accepted in job_accept.accept(session, new_jobs, max_queued_jobs=bound)]


class TestAccept:
    def test_a_job_is_stored_as_it_was_asked_for(self, session: Session, session_factory: Sessions) -> None:
        job = new_job(
            request=GenerationRequest(model=MODEL, prompt="nul \x00 and snow ☃"),
            metadata={"key": "a \x00 b"},
            start_timeout_seconds=30.0,
            priority=-3,
            idempotency_key="once",
        )
        assert accept(session_factory, job) == [ACCEPTED]
        row, payload = session.get_one(Job, job.id), session.get_one(JobPayload, job.id)
        assert (row.status, row.attempt, row.priority, row.cost) == (JobStatus.QUEUED, 0, -3, 19)
        assert row.start_deadline_at == row.created_at + timedelta(seconds=30)
        assert row.job_metadata == {"key": "a \x00 b"}
        assert (payload.request, payload.prompt_token_ids) == (job.request, [1, 2, 3])
        assert load_of(session).num_queued == 1

    def test_repeating_an_accept_answers_duplicate(self, session_factory: Sessions) -> None:
        job = new_job()
        assert accept(session_factory, job) == [ACCEPTED]
        assert accept(session_factory, job) == [DUPLICATE]
        assert accept(session_factory, job, new_job()) == [DUPLICATE, ACCEPTED]

    def test_an_idempotency_key_names_the_first_job(self, session: Session) -> None:
        first, second = new_job(idempotency_key="k"), new_job(idempotency_key="k")
        other = new_job(idempotency_key="k", request_hash=b"another")
        outcomes = job_accept.accept(session, [first, second, other], max_queued_jobs=10)
        assert [(o.job_id, o.outcome) for o in outcomes] == [
            (first.id, ACCEPTED),
            (first.id, DUPLICATE),
            (first.id, KEY_REUSED),
        ]
        assert load_of(session).num_queued == 1

    def test_a_refusal_waits_for_no_lock_and_writes_nothing(self, session_factory: Sessions) -> None:
        assert accept(session_factory, new_job(), bound=1) == [ACCEPTED]
        with session_factory.begin() as holding, session_factory.begin() as refusing:
            holding.execute(update(TenantLoad).values(num_queued=TenantLoad.num_queued))
            refusing.execute(text("SET LOCAL lock_timeout = '50ms'"))
            [refused] = job_accept.accept(refusing, [new_job()], max_queued_jobs=1)
            assert refused.outcome is TOO_MANY
            assert refusing.scalar(text("SELECT pg_current_xact_id_if_assigned()")) is None

    def test_keys_of_different_tenants_do_not_meet(self, session_factory: Sessions, make_tenant: MakeTenant) -> None:
        group = [new_job(idempotency_key="k", tenant_id=make_tenant().id, request_hash=bytes([n])) for n in range(3)]
        assert accept(session_factory, *group) == [ACCEPTED] * 3

    def test_the_id_of_another_tenants_job_is_no_duplicate(
        self, session_factory: Sessions, make_tenant: MakeTenant
    ) -> None:
        job = new_job()
        accept(session_factory, job)
        assert accept(session_factory, replace(job, tenant_id=make_tenant().id)) == [KEY_REUSED]

    def test_a_tenants_bound_holds_to_the_job(self, session_factory: Sessions, make_tenant: MakeTenant) -> None:
        bounded = make_tenant(max_queued=3)
        group = [new_job(tenant_id=bounded.id) for _ in range(5)] + [new_job() for _ in range(2)]
        assert accept(session_factory, *group) == [ACCEPTED] * 3 + [TOO_MANY] * 2 + [ACCEPTED] * 2
        assert accept(session_factory, new_job(tenant_id=bounded.id), group[0]) == [TOO_MANY, DUPLICATE]
        assert accept(session_factory, new_job(), new_job(), bound=3) == [ACCEPTED, TOO_MANY]

    def test_duplicates_take_no_room(self, session_factory: Sessions, make_tenant: MakeTenant) -> None:
        bounded = make_tenant(max_queued=2)
        twice = [new_job(tenant_id=bounded.id, idempotency_key="k") for _ in range(2)]
        assert accept(session_factory, *twice, new_job(tenant_id=bounded.id)) == [ACCEPTED, DUPLICATE, ACCEPTED]

    def test_concurrent_groups_never_pass_the_bound_nor_store_a_key_twice(
        self, session_factory: Sessions, make_tenant: MakeTenant
    ) -> None:
        tenants = [make_tenant(max_queued=20) for _ in range(3)]

        def submit(seed: int) -> list[AcceptOutcome]:
            chance = random.Random(seed)
            group = [
                new_job(tenant_id=tenant.id, idempotency_key=f"key-{chance.randrange(12)}")
                for tenant in chance.sample(tenants, 3)
                for _ in range(5)
            ]
            chance.shuffle(group)
            return accept(session_factory, *group)

        with ThreadPoolExecutor(8) as threads:
            outcomes = Counter(outcome for group in threads.map(submit, range(40)) for outcome in group)
        with session_factory() as session:
            for tenant in tenants:
                count = session.scalar(select(func.count()).where(Job.tenant_id == tenant.id))
                assert load_of(session, tenant.id).num_queued == count
                assert count is not None
                assert count <= 12
            assert outcomes[ACCEPTED] == session.scalar(select(func.count()).select_from(Job))
        assert outcomes[TOO_MANY] == outcomes[KEY_REUSED] == 0

    def test_an_empty_group_is_no_work(self, session: Session) -> None:
        assert job_accept.accept(session, [], max_queued_jobs=1) == []

    def test_a_tenant_back_from_idle_starts_level_with_the_active_ones(
        self, session: Session, make_tenant: MakeTenant
    ) -> None:
        busy, idle, credit = make_tenant(), make_tenant(), make_tenant()
        for tenant, virtual_time in ((busy, 500.0), (idle, 20.0), (credit, 900.0)):
            session.execute(
                update(TenantLoad).where(TenantLoad.tenant_id == tenant.id).values(virtual_time=virtual_time)
            )
        job_accept.accept(session, [new_job(tenant_id=busy.id)], max_queued_jobs=9)
        assert load_of(session, busy.id).virtual_time == 500
        job_accept.accept(session, [new_job(tenant_id=idle.id), new_job(tenant_id=credit.id)], max_queued_jobs=9)
        assert load_of(session, idle.id).virtual_time == 500
        assert load_of(session, credit.id).virtual_time == 900

    def test_a_tenant_back_from_idle_owes_little_whoever_waits_in_vain(
        self, session: Session, make_tenant: MakeTenant
    ) -> None:
        """Level are those who run jobs, else those who wait: not one that waits for a model without workers."""
        stuck, busy, rich = make_tenant(), make_tenant(), make_tenant(weight=2)
        for tenant, load in (
            (stuck, {"num_queued": 1}),
            (busy, {"num_running": 1, "virtual_time": 5e5}),
            (rich, {"virtual_time": 1e9}),
        ):
            session.execute(update(TenantLoad).where(TenantLoad.tenant_id == tenant.id).values(**load))
        job_accept.accept(session, [new_job(tenant_id=rich.id)], max_queued_jobs=9)
        assert load_of(session, rich.id).virtual_time == 5e5 + 10_000 / 2

    def test_a_tenant_that_waits_in_vain_is_owed_little(self, session: Session, make_tenant: MakeTenant) -> None:
        """One whose job waits for a model without workers, and who then turns to another model."""
        stuck, busy = make_tenant(weight=2), make_tenant()
        for tenant, load in ((stuck, {"num_queued": 1}), (busy, {"num_running": 1, "virtual_time": 5e5})):
            session.execute(update(TenantLoad).where(TenantLoad.tenant_id == tenant.id).values(**load))
        job_accept.accept(session, [new_job(tenant_id=stuck.id)], max_queued_jobs=9)
        assert load_of(session, stuck.id).virtual_time == 5e5 - 10_000 / 2
