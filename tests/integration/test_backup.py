"""A dump of a running system, restored elsewhere: its jobs go on there from the chunks that had been committed."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus
from local.servers import postgres_programs
from storage import job_accept, jobs
from storage.database import migrate, open_database
from storage.database import session_factory as make_sessions
from storage.jobs import ChunkCommit, Finalisation
from storage.tables import Job
from tests.storage_samples import chunk, claim_these, new_job, result

PROGRAMS = postgres_programs()
pytestmark = pytest.mark.skipif(not (PROGRAMS / "pg_dump").exists(), reason="the embedded PostgreSQL has no pg_dump")


@pytest.fixture
def running(session_factory: sessionmaker[Session]) -> UUID:
    """A job of which two chunks are committed; its lease is about to expire."""
    job = new_job()
    with session_factory.begin() as session:
        job_accept.accept(session, [job], max_queued_jobs=10)
        [claimed] = claim_these(session, [job.id], owner=uuid4(), model_revision="main", lease_seconds=0)
        jobs.commit_chunks(session, [ChunkCommit(job.id, claimed.attempt, [chunk(1), chunk(2)])], lease_seconds=0)
    return job.id


def copy(database_url: str, target_url: str, folder: Path) -> None:
    """As docs/operations.md tells."""
    dump = str(folder / "celeriac.dump")
    options = ["--enable-row-security", "--format=custom", "--file", dump]
    subprocess.run([str(PROGRAMS / "pg_dump"), *options, database_url], check=True)
    restore = [str(PROGRAMS / "pg_restore"), "--no-owner", "--exit-on-error", "--dbname", target_url, dump]
    subprocess.run(restore, check=True)


def test_a_restored_dump_continues_the_jobs_that_were_running(
    running: UUID, database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    copy(database_url, empty_database_url, tmp_path)
    migrate(empty_database_url)  # finds nothing to do
    restored = open_database(empty_database_url)
    with make_sessions(restored).begin() as session:
        soon = datetime.now(UTC) + timedelta(minutes=1)
        [rescued] = jobs.rescue(session, as_of=soon, grace_seconds=0, quiet_seconds=0)
        assert (rescued.job_id, rescued.status) == (running, JobStatus.QUEUED)
        [claimed] = claim_these(session, [running], owner=uuid4(), model_revision="main", lease_seconds=60)
        assert [piece.text for piece in claimed.committed_chunks] == ["1 ", "2 "]
        jobs.commit_chunks(session, [ChunkCommit(running, claimed.attempt, [chunk(3)])], lease_seconds=60)
        assert jobs.finalise(session, [Finalisation(running, claimed.attempt, 3, JobStatus.COMPLETED, result(3))])
        assert session.get_one(Job, running).status is JobStatus.COMPLETED
        job_accept.accept(session, [new_job()], max_queued_jobs=10)
    restored.dispose()
