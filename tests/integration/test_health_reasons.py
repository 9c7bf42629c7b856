"""/health and its metric name what is wrong while everything still answers: full, locked, used up, silent."""

import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api.reasons import ReasonCode
from gpu_worker.reporting import failure_of
from local.servers import SUPERUSER
from storage import processes, troubles, workers
from storage.database import open_database
from storage.processes import ProcessKind, ProcessReport
from storage.workers import WorkerReport
from tests.databases import as_role
from tests.integration.api_harness import body
from tests.waiting import wait_until


@pytest.fixture
def told(http: httpx.Client) -> Callable[[str, ReasonCode], None]:
    """Waits until /health has a reason with these words, and /metrics its code."""

    def wait(words: str, code: ReasonCode) -> None:
        wait_until(lambda: any(words in reason for reason in http.get("/health").json()["reasons"]), words)
        line = f'celeriac_health_reasons{{reason="{code.value}"}} 1.0'
        wait_until(lambda: line in http.get("/metrics").text, line)

    return wait


def test_a_full_redis_is_named_and_jobs_are_accepted(
    http: httpx.Client, told: Callable[[str, ReasonCode], None], redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", 1)
        try:
            told("Redis has no memory left", ReasonCode.REDIS_FULL)
            assert http.get("/health").json()["redis"] == "unavailable"
            assert http.post("/v1/jobs", json=body()).status_code == 202
        finally:
            client.config_set("maxmemory", 0)
    wait_until(lambda: http.get("/health").json()["redis"] == "ok")


def test_a_redis_that_may_drop_what_it_holds_is_named(told: Callable[[str, ReasonCode], None], redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory", 10**9)
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            told("its maxmemory-policy is allkeys-lru", ReasonCode.REDIS_EVICTS)
        finally:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 0)


def test_what_keeps_postgresql_from_clearing_up_is_named(
    session_factory: sessionmaker[Session], database_url: str, postgres_administrator: psycopg.Connection[Any]
) -> None:
    with (
        session_factory() as session,
        psycopg.connect(f"{database_url}&application_name=pg_dump") as backup,
        psycopg.connect(f"{database_url}&application_name=somebody") as somebody,
    ):
        assert troubles.neglects(session) == []
        session.rollback()  # or it sees what ran when it first looked
        for connection in (backup, somebody):
            connection.execute("SELECT 1")
        pid = somebody.info.backend_pid
        found = troubles.neglects(session, open_seconds=0)
        public = [one.public for one in found]
        seen = [one.seen for one in found]
        assert f"a transaction of PostgreSQL's process {pid} (somebody) has been open for 0 minutes" in seen
        session.execute(text("ALTER TABLE api_keys SET (autovacuum_enabled = off)"))
        postgres_administrator.execute("SELECT pg_create_physical_replication_slot('gone', true)")
        try:
            found = troubles.neglects(session, kept_bytes=-1)
            public += [one.public for one in found]
            seen = [one.seen for one in found]
        finally:
            postgres_administrator.execute("SELECT pg_drop_replication_slot('gone')")
            session.rollback()
        assert "PostgreSQL does not vacuum api_keys by itself" in seen
        assert "PostgreSQL keeps 0.0 GiB of its log for the slot gone, whose replica is away" in seen
        assert any("replica that is away" in one for one in public)
        assert not [one for one in public if "somebody" in one or "gone" in one], "anybody may read /health"


def test_who_holds_a_lock_is_named(
    http: httpx.Client, told: Callable[[str, ReasonCode], None], database_url: str
) -> None:
    with (
        psycopg.connect(f"{database_url}&application_name=somebody") as holding,
        psycopg.connect(database_url) as waiting,
        ThreadPoolExecutor(1) as pool,
    ):
        holding.execute("LOCK TABLE workers IN ACCESS EXCLUSIVE MODE")
        asked = pool.submit(waiting.execute, "SELECT count(*) FROM workers")
        told(f"process {holding.info.backend_pid}, which celeriac doctor names: end it", ReasonCode.DATABASE_LOCKED)
        assert "somebody" not in http.get("/health").text, "anybody may read it"
        assert http.get("/health").status_code == 200
        holding.rollback()
        asked.result()


def beat(session_factory: sessionmaker[Session], hostname: str, **told: Any) -> WorkerReport:
    report = WorkerReport(
        id=uuid4(), hostname=hostname, model="fake", max_num_seqs=1, num_running=0, tokens_per_second=0.0, **told
    )
    with session_factory.begin() as session:
        workers.heartbeat(session, report)
    return report


def test_a_worker_that_falls_silent_is_named_until_it_is_replaced(session_factory: sessionmaker[Session]) -> None:
    def silent() -> list[str]:
        with session_factory() as session:
            return [worker.hostname for worker in troubles.silent_workers(session)]

    beat(session_factory, "gpu-1")
    assert silent() == []
    with session_factory.begin() as session:
        session.execute(
            text("UPDATE workers SET seen_at = now() - interval '11 s', started_at = now() - interval '1 h'")
        )
    assert silent() == ["gpu-1"]
    beat(session_factory, "gpu-2")  # of the same model, started since then
    assert silent() == []


def test_what_a_worker_tells_of_itself_is_a_reason_and_the_words_are_the_operators(
    http: httpx.Client, told: Callable[[str, ReasonCode], None], session_factory: sessionmaker[Session]
) -> None:
    beat(session_factory, "gpu-1@here", troubles={"process_redis": "secret words", "of_the_next_release": "?"})
    told("a worker of fake cannot reach Redis: see the network", ReasonCode.PROCESS_REDIS)
    beat(session_factory, "gpu-2@here", troubles={"process_database": "the database takes 2.0 s for its report"})
    told("a worker of fake waits long for the database", ReasonCode.PROCESS_DATABASE)
    assert "secret words" not in http.get("/health").text
    [model] = [model for model in http.get("/v1/admin/models").json()["data"] if model["workers"]]
    assert model["workers"][0]["troubles"]["process_redis"] == "secret words"
    with session_factory() as session:
        assert "secret words" in [one.words for one in troubles.told_troubles(session)]


def test_why_a_worker_could_not_serve_its_model_is_told_after_its_end(session_factory: sessionmaker[Session]) -> None:
    def failed() -> list[str]:
        with session_factory() as session:
            return [one.words for one in troubles.told_troubles(session)]

    for words in ("first", "second"):  # it is started again and again
        with session_factory.begin() as session:
            workers.fail(session, failure_of(uuid4(), "gpu@here", "fake", words))
    beat(session_factory, "gpu@elsewhere")
    assert failed() == ["second"]
    with session_factory() as session:
        assert [worker.hostname for worker in workers.list_live(session)] == ["gpu@elsewhere"]
        assert troubles.silent_workers(session) == []
    beat(session_factory, "gpu@here")
    assert failed() == [], "its machine serves the model"


AGED = """
UPDATE processes SET seen_at = now() - interval '11 s', started_at = now() - interval '1 h' WHERE kind = 'maintenance'
"""


def test_a_process_that_falls_silent_is_named_unless_it_stopped(session_factory: sessionmaker[Session]) -> None:
    killed, stopped = (ProcessReport(uuid4(), ProcessKind.MAINTENANCE, name, "1") for name in ("killed", "stopped"))
    with session_factory.begin() as session:
        processes.beat(session, killed, {})
        processes.beat(session, stopped, {})
        session.execute(text(AGED))
        processes.forget(session, stopped.id)
    with session_factory() as session:
        assert [process.name for process in troubles.silent_processes(session)] == ["killed"]
    with session_factory.begin() as session:
        processes.beat(session, ProcessReport(uuid4(), ProcessKind.MAINTENANCE, "next", "1"), {})
        assert troubles.silent_processes(session) == []


def test_a_schema_that_is_too_old_is_named(
    told: Callable[[str, ReasonCode], None], session_factory: sessionmaker[Session]
) -> None:
    with session_factory.begin() as session:
        newest = session.scalar(text("SELECT version_num FROM alembic_version"))
        session.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    try:
        told(f"the schema of the database is 0003, and this release needs {newest}", ReasonCode.DATABASE_SCHEMA)
    finally:
        with session_factory.begin() as session:
            session.execute(text("UPDATE alembic_version SET version_num = :newest"), {"newest": newest})


def test_connections_that_run_out_are_counted(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        state = troubles.server_state(session)
    assert 1 <= state.num_connections < state.max_connections
    assert not state.is_short_of_connections


@contextmanager
def full_tablespace(folder: Path, database_url: str) -> Iterator[Session]:
    """A session whose temporary tables are on a disk of 1 MB, which is full."""
    database = open_database(as_role(SUPERUSER, database_url))
    owner = pwd.getpwnam("nobody").pw_uid  # who runs PostgreSQL where we are root
    mount = ["mount", "-t", "tmpfs", "-o", f"size=1m,mode=0700,uid={owner}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with Session(database) as session:
            connection = session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            connection.execute(text(f"CREATE TABLESPACE small LOCATION '{folder}'"))
            try:
                connection.execute(text("SET temp_tablespaces = small"))
                subprocess.run(["dd", "if=/dev/zero", f"of={folder}/filler", "bs=4k"], capture_output=True, check=False)
                yield session
            finally:
                connection.execute(text("DISCARD TEMP"))
                connection.execute(text("DROP TABLESPACE small"))
    finally:
        database.dispose()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_noticed_by_trying(server_folder: Path, database_url: str) -> None:
    folder = server_folder / "small"
    folder.mkdir()
    with full_tablespace(folder, database_url) as session:
        with pytest.raises(OperationalError, match="No space left on device") as raised:
            troubles.try_to_write(session)
        assert getattr(raised.value.orig, "sqlstate", None) == troubles.DISK_FULL
        (folder / "filler").unlink()
        for _ in range(3):
            troubles.try_to_write(session)
