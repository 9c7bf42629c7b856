"""PostgreSQL away in mid-run: the engine runs on, nothing is lost and nothing is written twice."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from gpu_worker.threads import RunnerEventKind
from local.servers import EmbeddedPostgres
from storage import database as storage_database
from storage import jobs
from storage.tables import Job
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def own_postgres(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    """A server that these tests may stop: the common one has other users."""
    with EmbeddedPostgres(server_folder / "runner-postgres", settings={"fsync": "off"}) as server:
        storage_database.migrate(server.url)
        yield server


@pytest.fixture
def database_url(own_postgres: EmbeddedPostgres) -> Iterator[str]:
    yield own_postgres.start()
    own_postgres.start()


def test_a_database_restart_costs_running_jobs_nothing(rig: Rig, own_postgres: EmbeddedPostgres) -> None:
    job_ids = rig.add_jobs(6, max_tokens=300)
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    own_postgres.stop()
    num_steps = worker.runner.stats().engine["num_steps"]
    wait_until(lambda: worker.runner.stats().engine["num_steps"] > num_steps + 20, "the engine runs on meanwhile")
    own_postgres.start()
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1


def test_jobs_offered_while_the_database_is_away_are_claimed_when_it_is_back(
    rig: Rig, own_postgres: EmbeddedPostgres
) -> None:
    job_ids = rig.add_jobs(4)
    worker = rig.start()
    own_postgres.stop()
    worker.offer(job_ids)
    wait_until(lambda: worker.runner._runner._storage_thread.is_away, "the worker has noticed")
    own_postgres.start()
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert worker.story(job_id) == [RunnerEventKind.CLAIMED, RunnerEventKind.ENDED]


def test_an_outage_beyond_the_lease_stops_the_jobs_here_and_releases_them_after_it(
    rig: Rig, own_postgres: EmbeddedPostgres
) -> None:
    job_ids = rig.add_jobs(4, max_tokens=400)
    worker = rig.start(lease_seconds=1.0)
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    own_postgres.stop()
    wait_until(lambda: worker.runner.stats().num_running == 0, "the worker fences itself off")
    wait_until(lambda: worker.runner.stats().engine["num_running"] == 0, "the engine rests")
    own_postgres.start()
    worker.wait_for(RunnerEventKind.RELEASED, job_ids)
    worker.offer(job_ids)
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).num_failures == 0


def test_jobs_that_end_in_an_outage_beyond_the_lease_are_ended_after_it(
    rig: Rig, own_postgres: EmbeddedPostgres
) -> None:
    """A flush of theirs was under way when it began; their ends come with a later one."""
    job_ids = rig.add_jobs(4, max_tokens=150)
    worker = rig.start(lease_seconds=8.0)
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    own_postgres.stop()
    running = worker.runner._runner._batch._jobs
    wait_until(lambda: all(job.is_ending for job in list(running.values())), "the lease has lapsed, and all are over")
    assert len(running) == 4
    own_postgres.start()
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert worker.story(job_id) == [RunnerEventKind.CLAIMED, RunnerEventKind.ENDED]


def test_a_worker_that_froze_in_mid_transaction_lost_its_locks_and_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_ids = rig.add_jobs(1, max_tokens=100)  # of several, each is tried once more by itself
    frozen, finalise = Event(), jobs.finalise

    def freeze_once(session: Session, endings: Sequence[jobs.Finalisation], *, owner: UUID) -> list[UUID]:
        if not frozen.is_set():
            frozen.set()
            assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "1s"
            wait_until(lambda: _can_lock(rig, job_ids), "the server has ended the transaction")
        return finalise(session, endings, owner=owner)

    worker = rig.start(lease_seconds=3.0)  # of which the server lets a transaction stand idle for a third
    monkeypatch.setattr(jobs, "finalise", freeze_once)
    worker.offer(job_ids)
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    assert frozen.is_set()
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1


def test_a_failover_to_a_server_that_is_still_a_standby_costs_running_jobs_nothing(
    rig: Rig, own_postgres: EmbeddedPostgres
) -> None:
    job_ids = rig.add_jobs(3, max_tokens=300)
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    _be_standby(own_postgres, "on")
    wait_until(lambda: worker.runner._runner._storage_thread.is_away, "the worker has noticed")
    _be_standby(own_postgres, "off")
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    for job_id in job_ids:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1


def test_a_worker_whose_reports_are_refused_says_why_in_its_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody else can: it is in no list of workers."""
    with rig.sessions.begin() as session:
        session.execute(text("ALTER TABLE workers ADD CONSTRAINT refused CHECK (false) NOT VALID"))
    worker = rig.start(wait=False)
    refusal = "the database refuses this worker's reports, so it seems not to exist"
    wait_until(lambda: refusal in caplog.text, "it says so")
    assert 'violates check constraint "refused"' in caplog.text
    with rig.sessions.begin() as session:
        session.execute(text("ALTER TABLE workers DROP CONSTRAINT refused"))
    job_id = rig.add_job()
    worker.offer([job_id])
    worker.wait_for(RunnerEventKind.ENDED, [job_id])
    assert caplog.text.count(refusal) == 1


def _be_standby(server: EmbeddedPostgres, on_or_off: str) -> None:
    """As far as a client sees: it may read, and every write is refused."""
    options = "-c default_transaction_read_only=off"
    with psycopg.connect(server.url_of("postgres"), autocommit=True, options=options) as connection:
        connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {on_or_off}")
        connection.execute("SELECT pg_reload_conf()")


def _can_lock(rig: Rig, job_ids: Sequence[UUID]) -> bool:
    """Nobody else holds the rows of these jobs."""
    statement = select(Job.id).where(Job.id.in_(job_ids)).with_for_update(skip_locked=True)
    with rig.sessions() as session:
        return len(session.scalars(statement).all()) == len(job_ids)
