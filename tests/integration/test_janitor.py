"""The janitor's rules on a real database and a real broker, each for itself and all of them together."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from sqlalchemy import event, select, text, update
from sqlalchemy.orm import Session, sessionmaker
from ulid import ULID

from domain.access import Limits
from domain.catalog import Catalog, ModelSpec
from domain.jobs import JobStatus, Lane, external_id
from local.servers import EmbeddedRedis
from maintenance.janitor import Janitor
from settings import Settings
from storage import batches, job_queries, jobs, limits, maintenance, running_sums, usage_hours, workers
from storage.files import BatchLine
from storage.running_sums import Corrected
from storage.stream_channels import channel_of
from storage.tables import DEFAULT_TENANT_ID, Job, RunningSums, Tenant, TenantLoad
from storage.usage_hours import UsageClosing
from storage.workers import WorkerReport
from tasks.dispatch import count_waiting
from tasks.messages import priority_keys
from tests.conftest import MakeTenant
from tests.integration.consumer_harness import events
from tests.waiting import SECONDS, wait_until

__all__ = ["events"]

MakeJob = Callable[..., Job]
SPECS = [ModelSpec(id=name, path="none", backend="fake", max_model_len=64) for name in ("test-model", "other-model")]
AN_HOUR_AGO = datetime.now(UTC) - timedelta(hours=1)
IN_AN_HOUR = datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=2) as client:
        yield client


@pytest.fixture
def janitor(session_factory: sessionmaker[Session], client: redis.Redis) -> Janitor:
    janitor = Janitor(session_factory, client, Catalog(SPECS), Settings())
    janitor.quiet_seconds = 0  # the test's database server has just started
    return janitor


def status_of(session_factory: sessionmaker[Session], job: Job) -> JobStatus:
    with session_factory() as session:
        return session.get_one(Job, job.id).status


def sent_jobs(client: redis.Redis, spec: ModelSpec) -> list[str]:
    messages: list[Any] = client.lrange(spec.queue, 0, -1)
    return [json.loads(message)["headers"]["id"] for message in reversed(messages)]


def is_sent(client: redis.Redis, job: Job) -> bool:
    return external_id(job.id) in sent_jobs(client, SPECS[0])


def test_an_idle_tick_moves_nothing(janitor: Janitor) -> None:
    assert janitor.tick() == {}


def test_an_idle_tick_asks_the_database_one_question(
    janitor: Janitor, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    asked: list[str] = []
    database = session_factory.kw["bind"]
    janitor.tick()  # the first one also does what is done every few seconds

    def note(*context: Any) -> None:
        asked.append(context[2])

    event.listen(database, "before_cursor_execute", note)
    try:
        janitor.tick()
    finally:
        event.remove(database, "before_cursor_execute", note)
    assert len(asked) == 1
    make_job()
    assert janitor.tick() == {"dispatched test-model": 1}


def test_due_jobs_of_every_model_are_sent(janitor: Janitor, client: redis.Redis, make_job: MakeJob) -> None:
    first, second = make_job(), make_job(model="other-model")
    assert janitor.tick() == {"dispatched test-model": 1, "dispatched other-model": 1}
    assert sent_jobs(client, SPECS[0]) == [external_id(first.id)]
    assert sent_jobs(client, SPECS[1]) == [external_id(second.id)]


def test_a_job_of_a_lost_worker_is_rescued_announced_and_sent(
    janitor: Janitor, client: redis.Redis, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    lost = make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=AN_HOUR_AGO)
    held = make_job(status=JobStatus.IN_PROGRESS)
    pubsub: Any = client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
    pubsub.subscribe(channel_of(lost.id))
    pubsub.get_message(timeout=1)
    counts = janitor.tick()
    assert counts["rescued"] == 1
    assert status_of(session_factory, lost) is JobStatus.QUEUED
    assert status_of(session_factory, held) is JobStatus.IN_PROGRESS
    assert json.loads(pubsub.get_message(timeout=SECONDS)["data"]) == {"status": "queued"}
    pubsub.close()
    wait_until(lambda: janitor.tick() or sent_jobs(client, SPECS[0]) == [external_id(lost.id)], "it is sent")


def test_jobs_past_their_deadline_are_expired(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    late, late_to_start, timely = (
        make_job(deadline_at=AN_HOUR_AGO),
        make_job(start_deadline_at=AN_HOUR_AGO),
        make_job(deadline_at=IN_AN_HOUR),
    )
    assert janitor.tick()["expired"] == 2
    assert status_of(session_factory, late) is JobStatus.EXPIRED
    assert status_of(session_factory, late_to_start) is JobStatus.EXPIRED
    assert status_of(session_factory, timely) is JobStatus.QUEUED


def test_a_tick_expires_more_than_one_transaction_does(
    janitor: Janitor, session: Session, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they have, each claim reads all that are late."""
    late = [make_job(deadline_at=AN_HOUR_AGO) for _ in range(5)]
    monkeypatch.setattr(jobs, "expire", partial(jobs.expire, limit=2))
    monkeypatch.setattr("maintenance.janitor.EXPIRE_SECONDS", SECONDS)
    assert janitor.tick()["expired"] == len(late)


def test_what_an_emptied_broker_held_is_sent_again(janitor: Janitor, client: redis.Redis, make_job: MakeJob) -> None:
    job = make_job()
    janitor.tick()
    assert janitor.tick() == {}
    client.flushall()
    assert janitor.tick() == {"dispatched test-model": 1}
    assert sent_jobs(client, SPECS[0]) == [external_id(job.id)]
    assert janitor.tick() == {}


def test_what_a_restarted_broker_may_have_lost_is_sent_again(
    janitor: Janitor, client: redis.Redis, redis_server: EmbeddedRedis, make_job: MakeJob
) -> None:
    make_job()
    janitor.tick()
    redis_server.stop()
    assert janitor.tick() == {}
    redis_server.start()
    client.delete(SPECS[0].queue)  # the last second of its file
    assert janitor.tick() == {"dispatched test-model": 1}


def test_a_janitor_that_starts_repeats_nothing(
    janitor: Janitor, client: redis.Redis, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    make_job()
    janitor.tick()
    assert Janitor(session_factory, client, Catalog(SPECS), Settings()).tick() == {}
    assert count_waiting(client, SPECS[0].queue) == 1


def test_sql_rules_go_on_without_a_broker(
    janitor: Janitor, redis_server: EmbeddedRedis, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    lost = make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=AN_HOUR_AGO)
    make_job(deadline_at=AN_HOUR_AGO)
    redis_server.stop()
    counts = janitor.tick()
    redis_server.start()
    assert (counts["rescued"], counts["expired"]) == (1, 1)
    assert status_of(session_factory, lost) is JobStatus.QUEUED


def test_finished_jobs_are_pruned_when_their_time_is_over(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    make_job(status=JobStatus.COMPLETED, finished_at=AN_HOUR_AGO, prune_at=AN_HOUR_AGO)
    kept = make_job(status=JobStatus.COMPLETED)
    assert janitor.tick()["pruned"] == 1
    assert status_of(session_factory, kept) is JobStatus.COMPLETED


def test_a_tenants_retention_bounds_how_long_its_jobs_are_kept(
    janitor: Janitor, session_factory: sessionmaker[Session], make_job: MakeJob, make_tenant: MakeTenant
) -> None:
    brief = make_tenant(retention_seconds=1800)

    def make(minutes: int, tenant_id: UUID) -> UUID:
        at = datetime.now(UTC) - timedelta(minutes=minutes)
        ended = {"status": JobStatus.COMPLETED, "finished_at": at, "prune_at": IN_AN_HOUR}
        return make_job(id=UUID(bytes=ULID.from_datetime(at).bytes), tenant_id=tenant_id, **ended).id

    old, young, of_others, line = make(60, brief.id), make(1, brief.id), make(60, DEFAULT_TENANT_ID), make(60, brief.id)
    with session_factory.begin() as session:
        batch = batches.create_with_file(
            session, brief.id, b"{}", file_name="f", max_bytes=100, endpoint="/v1/completions", completion_window="24h",
            window_seconds=60, metadata={}, ttl_seconds=60,
        )  # fmt: skip
        place = {"custom_id": "1", "first_byte": 0, "num_bytes": 2, "prefix_hash": 0}
        session.add(BatchLine(batch_id=batch.id, line=1, job_id=line, **place))
    assert janitor.tick()["pruned"] == 1
    with session_factory() as session:
        assert session.get(Job, old) is None
        assert all(session.get(Job, id_) for id_ in (young, of_others, line)), (
            "a line stays until its result is written"
        )


def test_a_backlog_of_due_jobs_is_pruned_within_a_few_ticks(
    janitor: Janitor, session_factory: sessionmaker[Session], make_job: MakeJob
) -> None:
    due = make_job(status=JobStatus.COMPLETED, finished_at=AN_HOUR_AGO, prune_at=AN_HOUR_AGO)
    columns = ", ".join(column.name for column in Job.__table__.columns if column.name != "id")
    copies = f"INSERT INTO jobs (id, {columns}) SELECT gen_random_uuid(), {columns} FROM jobs, generate_series(2, 700)"
    with session_factory.begin() as session:
        session.execute(text(f"{copies} WHERE id = :id"), {"id": due.id})
    counts = [janitor.tick().get("pruned", 0) for _ in range(5)]  # each has time for at least one transaction
    assert sum(counts) == 700


def test_a_step_of_the_database_clock_rescues_nobody(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the janitor it looks as if its own clock stood still while the database's went on."""
    janitor.tick()
    held = [make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=AN_HOUR_AGO) for _ in range(3)]
    now = monotonic()
    monkeypatch.setattr("maintenance.janitor.monotonic", lambda: now - 60)
    assert "rescued" not in janitor.tick()
    assert [status_of(session_factory, job) for job in held] == [JobStatus.IN_PROGRESS] * 3


def test_a_server_that_froze_behind_its_answer_rescues_nobody(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the time, stands still until the leases have lapsed, and only then gets to the rescue."""
    held = make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=IN_AN_HOUR, progressed_at=datetime.now(UTC))
    rescue = jobs.rescue

    def rescue_late(session: Session, *, as_of: datetime, **options: Any) -> list[jobs.Returned]:
        session.execute(update(Job).values(lease_expires_at=as_of + timedelta(milliseconds=1)))
        session.execute(text("SELECT pg_sleep(0.1)"))
        return rescue(session, as_of=as_of, **options | {"grace_seconds": 0})

    monkeypatch.setattr(jobs, "rescue", rescue_late)
    assert "rescued" not in janitor.tick()
    assert status_of(session_factory, held) is JobStatus.IN_PROGRESS


def test_redis_away_holds_a_tick_up_once(
    session_factory: sessionmaker[Session], make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    lapsed = make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=AN_HOUR_AGO)
    with redis.Redis(port=1) as nobody:
        janitor = Janitor(session_factory, nobody, Catalog(SPECS), Settings())
        janitor.quiet_seconds = 0
        assert janitor.tick()["rescued"] == 1
    assert status_of(session_factory, lapsed) is JobStatus.QUEUED
    assert "'reached Redis' failed" in caplog.text
    assert "'dispatched" not in caplog.text


def test_a_redis_that_is_away_is_told_until_it_is_back(
    janitor: Janitor, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant in ("PING_SECONDS", "AWAY_SECONDS"):
        monkeypatch.setattr(f"maintenance.janitor.{constant}", 0.0)
    janitor.tick()
    assert janitor.redis_trouble is None
    with redis.Redis(port=1) as nobody, monkeypatch.context() as away:
        away.setattr(janitor, "_client", nobody)
        janitor.tick()  # also with nothing to send
        assert str(janitor.redis_trouble).startswith("Redis has not answered it: ConnectionError")
    janitor.tick()
    assert janitor.redis_trouble is None


def test_a_job_without_progress_under_a_living_lease_is_taken_away(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    minutes = {name: datetime.now(UTC) - timedelta(minutes=n) for name, n in {"two": 2, "eleven": 11}.items()}
    running: dict[str, Any] = {"status": JobStatus.IN_PROGRESS, "lease_expires_at": IN_AN_HOUR}
    stalled = make_job(**running, progressed_at=minutes["two"], num_committed_tokens=5)
    prefilling = make_job(**running, progressed_at=minutes["two"], num_committed_tokens=5, num_tokens_at_claim=5)
    forgotten = make_job(**running, progressed_at=minutes["eleven"])
    lively = make_job(**running, progressed_at=datetime.now(UTC), num_committed_tokens=5)
    assert janitor.tick()["stalled"] == 2
    statuses = [status_of(session_factory, job) for job in (stalled, prefilling, forgotten, lively)]
    queued, running_ = JobStatus.QUEUED, JobStatus.IN_PROGRESS
    assert statuses == [queued, running_, queued, running_]
    with session_factory() as session:
        assert session.get_one(Job, stalled.id).num_failures == 1
        assert [one.outcome for one in job_queries.attempts_of(session, [stalled.id])[stalled.id]] == ["stalled"]
        assert maintenance.figures(session)["stalled_jobs", ""] == 2


def test_wrong_counters_are_found_and_put_right(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    make_job()
    with session_factory.begin() as session:
        session.execute(update(TenantLoad).values(num_queued=4, num_running=2))
    assert janitor.tick()["checked"] == 5
    with session_factory() as session:
        load = session.get_one(TenantLoad, DEFAULT_TENANT_ID)
        assert (load.num_queued, load.num_running) == (1, 0)
        assert maintenance.figures(session)["load_drift", ""] == 5
        assert maintenance.reconcile_load(session) == 0


def test_sums_of_what_runs_are_corrected_where_there_is_much(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    for _ in range(running_sums.MANY_RUNNING - 1):
        make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=IN_AN_HOUR)
    with session_factory.begin() as session:
        right = session.get_one(TenantLoad, DEFAULT_TENANT_ID).num_unused_tokens
        session.execute(update(TenantLoad).values(num_unused_tokens=10_000_000))
    janitor.tick()
    with session_factory() as session:
        assert session.get(RunningSums, 1) is None, "few are read by who needs them"
    make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=IN_AN_HOUR, max_tokens=0, cost=0, num_prompt_tokens=0)
    janitor.tick()
    with session_factory() as session:
        assert session.get_one(TenantLoad, DEFAULT_TENANT_ID).num_unused_tokens == right
        assert session.get_one(RunningSums, 1).num_corrected == 1


def test_counters_of_one_tenant_that_are_locked_keep_no_others_from_being_corrected(
    janitor: Janitor, make_tenant: MakeTenant, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    """Nor do they keep their locks meanwhile. Sums of what runs, and tokens that wait."""
    held, free = sorted((make_tenant().id, make_tenant().id), reverse=True)
    for tenant_id in (held, free):
        make_job(tenant_id=tenant_id)
    num_tokens = make_job(tenant_id=free).cost * 2
    wrong = update(TenantLoad).values(num_unused_tokens=7, num_queued_tokens=7)
    with session_factory.begin() as session:
        for tenant_id in (held, free):
            limits.change_tenant_limits(session, session.get_one(Tenant, tenant_id), Limits(queued_tokens=50))
        session.execute(wrong.where(TenantLoad.tenant_id.in_((held, free))))
    with session_factory.begin() as stalled:
        stalled.get_one(TenantLoad, held, with_for_update=True)
        with session_factory.begin() as session:
            assert running_sums.correct(session) == Corrected(1, 1)
        with session_factory.begin() as session:
            running_sums.correct_one(session)
        with session_factory.begin() as session:
            assert not limits.count_queued_tokens(session)
    with session_factory() as session:
        loads = {id_: session.get_one(TenantLoad, id_) for id_ in (held, free)}
        assert (loads[held].num_unused_tokens, loads[held].num_queued_tokens) == (7, 7)
        assert (loads[free].num_unused_tokens, loads[free].num_queued_tokens) == (0, num_tokens)
    janitor.tick()
    with session_factory.begin() as session:
        running_sums.correct_one(session)
    with session_factory() as session:
        load = session.get_one(TenantLoad, held)
        assert (load.num_unused_tokens, load.num_queued_tokens) == (0, num_tokens // 2)


def test_hours_of_the_ledger_are_closed_at_a_later_look(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maintenance.janitor.CLOSE_EVERY_SECONDS", 0.0)
    began_at = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=30)
    closing = select(UsageClosing.closed_until)
    with session_factory.begin() as session:
        session.execute(update(UsageClosing).values(closed_from=began_at, closed_until=began_at))
    janitor.tick()
    with session_factory() as session:
        assert session.scalar(closing) == began_at, "what began before the first look may not have ended"

    def are_closed() -> bool:
        janitor.tick()
        with session_factory() as session:
            return session.scalars(closing).one() >= began_at + timedelta(hours=28)

    wait_until(are_closed, "the hours are closed")


def test_hours_are_closed_after_a_restore_into_a_database_that_has_had_fewer_transactions(
    janitor: Janitor, session_factory: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maintenance.janitor.CLOSE_EVERY_SECONDS", 0.0)
    began_at = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)
    with session_factory.begin() as session:
        session.execute(update(UsageClosing).values(closed_from=began_at, closed_until=began_at))
        now = usage_hours.horizon(session)
    janitor._horizon = replace(now, own_id=now.own_id + 1_000_000_000, oldest_id=now.oldest_id + 1_000_000_000)

    def are_closed() -> bool:
        janitor.tick()
        with session_factory() as session:
            return session.scalars(select(UsageClosing.closed_until)).one() > began_at

    wait_until(are_closed, "the hours are closed")


def test_jobs_that_nobody_serves_and_rows_that_break_the_rules_are_told(
    janitor: Janitor, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    make_job(available_at=AN_HOUR_AGO, lane=Lane.ISOLATED)
    make_job()  # too young to be complained about
    make_job(status=JobStatus.COMPLETED)  # without a result
    assert janitor.tick()["checked"] == 2
    with session_factory.begin() as session:
        found = maintenance.figures(session)
        assert (found["unserved_jobs", "test-model/isolated"], found["orphans", ""]) == (1, 1)
        workers.heartbeat(session, WorkerReport(uuid4(), "gpu@test", "test-model", 1, 0, 0.0))
    janitor._check_at = 0.0
    janitor.tick()
    with session_factory() as session:
        assert ("unserved_jobs", "test-model/isolated") not in maintenance.figures(session)


def test_a_low_priority_is_served_under_a_stream_of_high_ones(
    session_factory: sessionmaker[Session], make_job: MakeJob, make_tenant: MakeTenant
) -> None:
    """What waits an hour catches up with six steps of priority of its own tenant's jobs, and no more. Those of another
    tenant count as well as its own."""
    low = make_job(priority=-3, available_at=AN_HOUR_AGO)
    lowest = make_job(priority=-10, available_at=AN_HOUR_AGO)
    other = make_tenant()
    for tenant_id in (DEFAULT_TENANT_ID, other.id):
        for _ in range(20):
            make_job(priority=2, tenant_id=tenant_id)
    with session_factory.begin() as session:
        options = {"owner": uuid4(), "model_revision": "main", "lease_seconds": 60.0}
        claimed = jobs.claim(session, "test-model", limit=99, **options)  # type: ignore[arg-type]
    order = [job.id for job in claimed]
    assert low.id in order[:2], "beside the other tenant's, which has got as little"
    assert lowest.id in order[-2:]


def test_what_an_earlier_release_left_in_redis_is_cleared_away(janitor: Janitor, client: redis.Redis) -> None:
    for key in priority_keys("celeriac-maintenance"):
        client.lpush(key, "a tick")
    client.sadd("_kombu.binding.celeriac-maintenance", "its queue")
    client.lpush("celeriac-maintenance-of-others", "not ours")
    janitor.tick()
    assert [key for key in client.keys("*celeriac-maintenance*")] == [b"celeriac-maintenance-of-others"]
