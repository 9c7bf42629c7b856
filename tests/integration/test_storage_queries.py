"""Reading jobs, positions and figures; keys, tenants and workers."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from domain.jobs import JobStatus, WorkerState
from storage import job_queries, job_queues, jobs, tenant_queues, tenants, workers
from storage.job_metadata import MetadataEntry
from storage.job_queries import StreamState
from storage.job_queues import QueuePosition
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import DEFAULT_TENANT_ID, ApiKey, Tenant, Worker
from storage.workers import WorkerReport
from tests.conftest import MakeJob, MakeTenant
from tests.storage_samples import MODEL, PAST, chunk, claim, result


class TestJobs:
    def test_get_brings_what_is_asked_for_in_one_query(self, session: Session, make_job: MakeJob) -> None:
        job = make_job()
        claim(session, job.id)
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, [chunk(1)])], lease_seconds=60)
        jobs.finalise(session, [Finalisation(job.id, 1, 1, JobStatus.COMPLETED, result(1))])
        record = job_queries.get(session, job.id, DEFAULT_TENANT_ID, with_request=True)
        assert record is not None
        assert record.job.status is JobStatus.COMPLETED
        assert record.request is not None
        assert record.result == result(1)
        bare = job_queries.get(session, job.id, DEFAULT_TENANT_ID, with_result=False)
        assert bare is not None
        assert (bare.request, bare.result) == (None, None)

    def test_a_job_without_a_result_is_found_too(self, session: Session, make_job: MakeJob) -> None:
        record = job_queries.get(session, make_job().id, DEFAULT_TENANT_ID)
        assert record is not None
        assert record.result is None

    def test_another_tenants_job_is_not_there(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        job, stranger = make_job(), make_tenant()
        assert job_queries.get(session, job.id, stranger.id) is None
        assert job_queries.list_jobs(session, stranger.id) == []

    def test_pages_join_without_gap_or_overlap(self, session: Session, make_job: MakeJob) -> None:
        ids = [make_job().id for _ in range(7)]
        for order, expected in (("asc", sorted(ids)), ("desc", sorted(ids, reverse=True))):
            seen: list[UUID] = []
            while page := job_queries.list_jobs(
                session,
                DEFAULT_TENANT_ID,
                after=seen[-1] if seen else None,
                limit=3,
                order=order,  # type: ignore[arg-type]
            ):
                seen += [job.id for job in page]
            assert seen == expected

    def test_filters_narrow_the_list(self, session: Session, make_job: MakeJob) -> None:
        done = make_job(status=JobStatus.COMPLETED, model="a", job_metadata={"team": "red", "n": "1"})
        make_job(model="a", job_metadata={"team": "blue"})
        make_job(model="b", job_metadata={"team": "nul \x00"}, created_at=PAST)

        def found(**filters: object) -> int:
            return len(job_queries.list_jobs(session, DEFAULT_TENANT_ID, **filters))  # type: ignore[arg-type]

        assert found(status=JobStatus.COMPLETED) == 1
        assert found(model="a") == 2
        assert found(created_after=datetime.now(UTC) - timedelta(minutes=5)) == 2
        assert found(metadata={"team": "red", "n": "1"}) == 1
        assert found(metadata={"team": "red", "n": "2"}) == 0
        assert found(metadata={"it's": "%"}) == 0
        [job] = job_queries.list_jobs(session, DEFAULT_TENANT_ID, metadata={"team": "red"})
        assert job.id == done.id

    def test_a_job_is_found_by_the_metadata_that_it_has_now(self, session: Session, make_job: MakeJob) -> None:
        first = make_job(job_metadata={"team": "red", "n": "1"}, is_stored=True)
        second = make_job(job_metadata={"team": "red", "é:": "\N{PENGUIN} ' %"})

        def found(metadata: dict[str, str], **options: Any) -> list[UUID]:
            return [job.id for job in job_queries.list_jobs(session, DEFAULT_TENANT_ID, metadata=metadata, **options)]

        assert found({"team": "red"}) == [second.id, first.id]
        assert found({"team": "red"}, after=second.id) == found({"n": "1", "team": "red"}) == [first.id]
        assert found({"team": "red"}, after=first.id, order="asc") == found({"é:": "\N{PENGUIN} ' %"}) == [second.id]
        job_queries.set_metadata(session, first.id, DEFAULT_TENANT_ID, {"team": "blue"})
        assert found({"team": "blue"}) == [first.id]
        assert found({"team": "red"}) == [second.id]
        jobs.delete(session, first.id, DEFAULT_TENANT_ID)
        jobs.delete(session, second.id, DEFAULT_TENANT_ID)
        assert session.scalars(select(MetadataEntry)).all() == []

    def test_a_job_is_found_by_its_key_and_by_its_batch(self, session: Session, make_job: MakeJob) -> None:
        lines = [make_job(idempotency_key=f"batch_1 {number}", priority=-20).id for number in (1, 2)]
        make_job(idempotency_key="batch_10", priority=-20)
        make_job(idempotency_key="batch_1 3")  # whose key a client has chosen
        other = make_job(idempotency_key="batchX1 3", priority=-20).id

        def found(**filters: str) -> list[UUID]:
            return [job.id for job in job_queries.list_jobs(session, DEFAULT_TENANT_ID, **filters)]  # type: ignore[arg-type]

        assert found(idempotency_key="batchX1 3") == [other]
        assert found(idempotency_key="batch") == []
        assert found(batch="batch_1") == lines[::-1]

    def test_chunks_are_read_in_order_from_a_position(self, session: Session, make_job: MakeJob) -> None:
        job = make_job()
        claim(session, job.id)
        chunks = [chunk(number) for number in range(1, 6)]
        jobs.commit_chunks(session, [ChunkCommit(job.id, 1, chunks)], lease_seconds=60)
        assert job_queries.read_chunks(session, job.id, after=1, limit=3) == chunks[1:4]
        assert job_queries.stream_states(session, [job.id, uuid4()]) == {
            job.id: StreamState(JobStatus.IN_PROGRESS, 1, 5)
        }


class TestQueue:
    def test_positions_are_the_order_of_claims(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant
    ) -> None:
        light, heavy = make_tenant(weight=1), make_tenant(weight=2.5, max_priority=1)
        for number in range(30):
            tenant = (light, heavy)[number % 2]
            make_job(tenant_id=tenant.id, priority=number % 3 - 1, cost=10 + number)
        make_job(model="another")
        ids = [job.id for tenant in (light, heavy) for job in job_queries.list_jobs(session, tenant.id, limit=100)]
        positions = job_queues.positions(session, ids)
        claimed = jobs.claim(session, MODEL, limit=100, owner=uuid4(), model_revision="main", lease_seconds=60)
        order = [job.id for job in claimed]
        assert sorted(ids, key=lambda job_id: positions[job_id].num_ahead) == order
        assert [positions[job_id].num_ahead for job_id in order] == list(range(30))

    def test_a_position_counts_the_tokens_ahead(self, session: Session, make_job: MakeJob) -> None:
        first, second = make_job(cost=100), make_job(cost=7)
        running = make_job(status=JobStatus.IN_PROGRESS)
        assert job_queues.position(session, first.id) == QueuePosition(0, 0, num_tokens=97, turn=(first.tenant_id, 0.0))
        assert job_queues.position(session, second.id) == QueuePosition(
            1, 100, tokens_ahead=97, num_tokens=4, turn=(second.tenant_id, 100.0)
        )
        assert job_queues.position(session, running.id) is None

    def test_figures_add_up_by_model(self, session: Session, make_job: MakeJob) -> None:
        make_job(cost=10, created_at=datetime.now(UTC) - timedelta(seconds=90))
        make_job(cost=5)
        make_job(status=JobStatus.IN_PROGRESS, cost=50, num_committed_tokens=7)
        make_job(status=JobStatus.COMPLETED)
        make_job(status=JobStatus.IN_PROGRESS, model="another")
        figures = job_queues.queue_figures(session)
        assert set(figures) == {MODEL, "another"}
        here = figures[MODEL]
        assert (here.num_queued, here.num_running, here.queued_cost, here.running_cost) == (2, 1, 15, 40)
        assert 89 < here.oldest_queued_seconds < 120
        assert figures["another"].oldest_queued_seconds == 0

    def test_figures_of_long_queues_are_taken_from_their_ends(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of_one, of_two = make_tenant(), make_tenant()
        for number in range(60):
            make_job(tenant_id=of_one.id, cost=10, created_at=PAST if number == 0 else datetime.now(UTC))
            make_job(tenant_id=of_two.id, cost=20, model=MODEL if number % 3 else "another")
        make_job(tenant_id=of_one.id, cost=30, model="another")
        lines = [make_job(cost=40, priority=-20) for _ in range(3)]
        exact = job_queues.queue_figures(session)
        monkeypatch.setattr(job_queues, "MAX_READ", 30)
        estimated = job_queues.queue_figures(session)
        assert set(estimated) == set(exact)
        for model, figures in exact.items():
            assert len(estimated[model].waiting) == len(figures.waiting)
            assert estimated[model].num_queued == figures.num_queued
            assert estimated[model].loads == figures.loads
            assert estimated[model].oldest_queued_seconds == pytest.approx(figures.oldest_queued_seconds, abs=1)
        assert sum(group.num_jobs for group in estimated[MODEL].waiting if group.job.is_held_line) == len(lines)

    def test_jobs_between_the_ends_are_not_like_the_exceptions_at_an_end(
        self, session: Session, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(4):
            make_job(attempt=1, paused_at=PAST, available_at=PAST, committed_sequence_number=1, cost=100)
            make_job(priority=-20, cost=30)
            make_job(available_at=datetime.now(UTC) + timedelta(hours=1), cost=50)
        for _ in range(60):
            make_job(cost=10)
        exact = job_queues.queue_figures(session)
        monkeypatch.setattr(job_queues, "MAX_READ", 20)
        estimated = job_queues.queue_figures(session)
        assert {group.job: (group.num_jobs, group.cost) for group in estimated[MODEL].waiting} == {
            group.job: (group.num_jobs, group.cost) for group in exact[MODEL].waiting
        }
        assert estimated[MODEL].loads == exact[MODEL].loads

    def test_lines_in_the_middle_of_a_long_queue_are_counted(
        self, session: Session, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = datetime.now(UTC)
        for _ in range(20):
            make_job(available_at=now - timedelta(hours=8))
            make_job(available_at=now - timedelta(hours=6), priority=-20)
            make_job(available_at=now)
        monkeypatch.setattr(job_queues, "MAX_READ", 20)
        waiting = job_queues.queue_figures(session)[MODEL].waiting
        assert {group.job.is_held_line: group.num_jobs for group in waiting} == {True: 20, False: 40}

    def test_many_short_queues_are_read_as_a_whole(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for tenant in (make_tenant(), make_tenant()):
            for number in range(12):
                make_job(tenant_id=tenant.id, model=f"model-{number % 4}", cost=number)
        exact = job_queues.queue_figures(session)
        monkeypatch.setattr(job_queues, "MAX_READ", 6)
        monkeypatch.setattr(job_queues, "LONG_WAITING_GROUPS", None)
        assert {model: figures.loads for model, figures in job_queues.queue_figures(session).items()} == {
            model: figures.loads for model, figures in exact.items()
        }

    @pytest.mark.parametrize(
        ("lengths", "num_ends"), [([1] * 999 + [10**6], 9_500), ([1_000] * 1_000, 10), ([10] * 10**5, 1)]
    )
    def test_about_as_many_jobs_are_read_of_many_queues_as_of_one(self, lengths: list[float], num_ends: int) -> None:
        assert job_queues.num_ends(lengths) == num_ends

    def test_the_queue_of_a_tenant_that_is_deleted_meanwhile_is_left_out(
        self, session: Session, make_job: MakeJob, make_tenant: MakeTenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_job()
        deleted = make_tenant()
        make_job(tenant_id=deleted.id)
        rows = job_queues.waiting_rows(session)
        session.execute(delete(Tenant).where(Tenant.id == deleted.id))
        monkeypatch.setattr(tenant_queues, "waiting_rows", lambda _: rows)
        assert [queue.tenant_id for queue in tenant_queues.tenant_queues(session, limit=10)] == [DEFAULT_TENANT_ID]


class TestKeys:
    def test_a_key_names_its_tenant_and_only_its_hash_is_stored(self, session: Session) -> None:
        key = tenants.create_key(session, DEFAULT_TENANT_ID, name="laptop")
        row = tenants.resolve_key(session, key)
        assert row is not None
        assert (row.tenant_id, row.name) == (DEFAULT_TENANT_ID, "laptop")
        prefix, key_id, secret = key.split("_", 2)
        assert (prefix, key_id) == ("sk", row.id)
        assert len(secret) >= 43
        assert secret.encode() not in row.secret_sha256

    def test_what_is_not_a_live_key_is_refused(self, session: Session) -> None:
        key = tenants.create_key(session, DEFAULT_TENANT_ID)
        expired = tenants.create_key(session, DEFAULT_TENANT_ID, expires_at=PAST)
        other = tenants.create_key(session, DEFAULT_TENANT_ID)
        mixed = "_".join([*key.split("_", 2)[:2], other.split("_", 2)[2]])
        for wrong in (expired, mixed, key[:-1], key + "x", "", "sk", "sk__", "sk_' OR 1=1_x", "sk_\x00_x", "x" * 10**6):
            assert tenants.resolve_key(session, wrong) is None, wrong[:50]
        assert tenants.resolve_key(session, key) is not None

    def test_a_revoked_key_is_dead_and_stays_listed(self, session: Session, make_tenant: MakeTenant) -> None:
        key = tenants.create_key(session, DEFAULT_TENANT_ID)
        key_id = key.split("_")[1]
        assert not tenants.revoke_key(session, key_id, make_tenant().id)
        assert tenants.revoke_key(session, key_id, DEFAULT_TENANT_ID)
        assert not tenants.revoke_key(session, key_id, DEFAULT_TENANT_ID)
        assert tenants.resolve_key(session, key) is None
        [row] = tenants.list_keys(session, DEFAULT_TENANT_ID)
        assert row.revoked_at is not None

    def test_a_bootstrap_key_may_be_ensured_again_and_again(self, session: Session) -> None:
        key = "sk_bootstrap_" + "s" * 32
        for _ in range(2):
            tenants.ensure_key(session, key, DEFAULT_TENANT_ID, name="bootstrap")
        assert tenants.resolve_key(session, key) is not None
        assert session.scalar(select(func.count()).select_from(ApiKey)) == 1

    @pytest.mark.parametrize("key", ["", "password", "sk_boot_short", "pk_boot_" + "s" * 32])
    def test_a_weak_or_malformed_bootstrap_key_is_refused_without_being_shown(self, session: Session, key: str) -> None:
        with pytest.raises(tenants.MalformedKey) as refused:
            tenants.ensure_key(session, key, DEFAULT_TENANT_ID)
        assert not key or key not in str(refused.value)


class TestTenantsAndWorkers:
    def test_a_tenant_is_created_with_its_load(self, session: Session) -> None:
        tenant = tenants.create_tenant(session, "acme", max_queued=5, weight=2)
        assert tenants.get_tenant(session, tenant.id) is tenant
        assert tenants.get_tenant_by_name(session, "acme") is tenant
        assert tenants.get_tenant_by_name(session, "nobody") is None
        with pytest.raises(IntegrityError):
            tenants.create_tenant(session, "acme")

    def test_a_worker_lives_as_long_as_it_is_heard(self, session: Session) -> None:
        report = WorkerReport(uuid4(), "gpu@here", MODEL, max_num_seqs=8, num_running=1, tokens_per_second=2.5)
        workers.heartbeat(session, report)
        workers.heartbeat(session, WorkerReport(report.id, "gpu@here", MODEL, 8, 3, 99.0, state=WorkerState.DRAINING))
        [worker] = workers.list_live(session)
        assert (worker.num_running, worker.tokens_per_second, worker.state) == (3, 99.0, WorkerState.DRAINING)
        assert workers.list_live(session, model="another") == []
        session.execute(update(Worker).values(seen_at=datetime.now(UTC) - timedelta(seconds=20)))
        assert workers.list_live(session) == []
        workers.heartbeat(session, report)
        assert len(workers.list_live(session)) == 1
        workers.forget(session, report.id)
        assert workers.list_live(session) == []

    def test_workers_long_silent_are_forgotten(self, session: Session) -> None:
        workers.heartbeat(session, WorkerReport(uuid4(), "old", MODEL, 8, 0, 0.0))
        session.execute(update(Worker).values(seen_at=datetime.now(UTC) - timedelta(hours=2)))
        workers.heartbeat(session, WorkerReport(uuid4(), "new", MODEL, 8, 0, 0.0))
        assert session.scalars(select(Worker.hostname)).all() == ["new"]
