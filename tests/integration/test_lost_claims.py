"""A crash of PostgreSQL may lose a claim, which does not wait for the disk, but nothing that was committed after it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus
from gpu_worker.threads import RunnerEventKind
from local.servers import EmbeddedPostgres
from storage import job_accept, jobs
from storage.database import migrate, open_database
from storage.database import session_factory as make_sessions
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import Job, TenantLoad
from tests.integration.runner_harness import Rig
from tests.storage_samples import MODEL, chunk, new_job, result
from tests.waiting import wait_until


class CrashingPostgres:
    """A server whose log reaches the disk only with a commit that waits for it: its WAL writer is frozen."""

    def __init__(self, server: EmbeddedPostgres, sessions: sessionmaker[Session]) -> None:
        self._server = server
        self.sessions = sessions
        self._wal_writer = self._find_wal_writer()
        os.kill(self._wal_writer, signal.SIGSTOP)

    def _find_wal_writer(self) -> int:
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'"
            return int(connection.execute(query).fetchall()[0][0])

    def crash(self) -> None:
        """PostgreSQL ends all its processes when one was killed, and recovers from what is on the disk."""
        os.kill(self._wal_writer, signal.SIGKILL)
        wait_until(self._is_back, "PostgreSQL has recovered")

    def _is_back(self) -> bool:
        try:
            return self._find_wal_writer() != self._wal_writer
        except (psycopg.OperationalError, IndexError):
            return False


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[CrashingPostgres]:
    with EmbeddedPostgres(tmp_path / "postgres", settings={"autovacuum": "off"}) as server:
        migrate(server.url)
        database = open_database(server.url)
        yield CrashingPostgres(server, make_sessions(database))
        database.dispose()


def accept(postgres: CrashingPostgres) -> UUID:
    job = new_job()
    with postgres.sessions.begin() as session:
        job_accept.accept(session, [job], max_queued_jobs=10)
    return job.id


def claim(postgres: CrashingPostgres, owner: UUID) -> list[tuple[UUID, int]]:
    with postgres.sessions.begin() as session:
        claimed = jobs.claim(session, MODEL, limit=1, owner=owner, model_revision="main", lease_seconds=60)
    return [(job.id, job.attempt) for job in claimed]


def status(postgres: CrashingPostgres, job_id: UUID) -> tuple[JobStatus, int, int]:
    with postgres.sessions() as session:
        job = session.get_one(Job, job_id)
        return job.status, job.attempt, job.committed_sequence_number


def test_whoever_made_a_claim_that_was_lost_is_fenced_off(postgres: CrashingPostgres) -> None:
    job_id, first, second = accept(postgres), uuid4(), uuid4()
    assert claim(postgres, first) == [(job_id, 1)]
    postgres.crash()
    assert status(postgres, job_id) == (JobStatus.QUEUED, 0, 0), "it was accepted, and waits as before"
    commit, ending = ChunkCommit(job_id, 1, [chunk(1)]), Finalisation(job_id, 1, 0, JobStatus.COMPLETED, result(0))
    for _ in ("queued", "claimed by another worker, under the same attempt"):
        with postgres.sessions.begin() as session:
            assert jobs.commit_chunks(session, [commit], lease_seconds=60, owner=first) == []
            assert jobs.finalise(session, [ending], owner=first) == []
            assert jobs.renew(session, [job_id], owner=first, lease_seconds=60) == []
        claim(postgres, second)
    with postgres.sessions.begin() as session:
        assert jobs.commit_chunks(session, [commit], lease_seconds=60, owner=second)
        assert jobs.finalise(session, [Finalisation(job_id, 1, 1, JobStatus.COMPLETED, result(1))], owner=second)
    assert status(postgres, job_id) == (JobStatus.COMPLETED, 1, 1)


def test_a_chunk_that_was_committed_has_its_claim_on_the_disk(postgres: CrashingPostgres) -> None:
    job_id, owner = accept(postgres), uuid4()
    claim(postgres, owner)
    with postgres.sessions.begin() as session:
        jobs.commit_chunks(session, [ChunkCommit(job_id, 1, [chunk(1)])], lease_seconds=60, owner=owner)
    postgres.crash()
    assert status(postgres, job_id) == (JobStatus.IN_PROGRESS, 1, 1)
    with postgres.sessions.begin() as session:
        [held] = jobs.commit_chunks(session, [ChunkCommit(job_id, 1, [chunk(2)])], lease_seconds=60, owner=owner)
    assert held.job_id == job_id


def test_a_worker_that_claims_again_what_was_lost_gives_it_back_once(rig: Rig) -> None:
    """Otherwise its engine's output of the first claim would count as that of the second."""
    rig.write_catalog(step_seconds=0.3)
    job_id, worker = rig.add_job(max_tokens=6), rig.start()
    worker.offer([job_id])
    worker.wait_for(RunnerEventKind.CLAIMED, [job_id])
    with rig.sessions.begin() as session:  # as after a crash
        before = {"status": JobStatus.QUEUED, "attempt": 0, "lease_owner": None, "lease_expires_at": None}
        session.execute(update(Job).where(Job.id == job_id).values(**before, started_at=None))
        session.execute(update(TenantLoad).values(num_queued=1, num_running=0))
    worker.offer([uuid4()])
    worker.wait_for(RunnerEventKind.ENDED, [job_id])
    rig.assert_intact(job_id)
    assert rig.job(job_id).attempt == 2
