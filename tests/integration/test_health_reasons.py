"""/health and its metric name what is wrong while everything still answers: full, locked, used up, silent."""

import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from api.reasons import ReasonCode
from storage import troubles, workers
from storage.workers import WorkerReport
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
        told(f"process {holding.info.backend_pid} (somebody)", ReasonCode.DATABASE_LOCKED)
        assert http.get("/health").status_code == 200
        holding.rollback()
        asked.result()


def test_a_worker_that_falls_silent_is_named_until_it_is_replaced(session_factory: sessionmaker[Session]) -> None:
    def beat(hostname: str) -> None:
        report = WorkerReport(
            id=uuid4(), hostname=hostname, model="fake", max_num_seqs=1, num_running=0, tokens_per_second=0.0
        )
        with session_factory.begin() as session:
            workers.heartbeat(session, report)

    def silent() -> list[str]:
        with session_factory() as session:
            return [worker.hostname for worker in troubles.silent_workers(session)]

    beat("gpu-1")
    assert silent() == []
    with session_factory.begin() as session:
        session.execute(
            text("UPDATE workers SET seen_at = now() - interval '11 s', started_at = now() - interval '1 h'")
        )
    assert silent() == ["gpu-1"]
    beat("gpu-2")  # of the same model, started since then
    assert silent() == []


def test_connections_that_run_out_are_counted(session_factory: sessionmaker[Session]) -> None:
    with session_factory() as session:
        state = troubles.server_state(session)
    assert 1 <= state.num_connections < state.max_connections
    assert not state.is_short_of_connections


@contextmanager
def full_tablespace(folder: Path, session_factory: sessionmaker[Session]) -> Iterator[Session]:
    """A session whose temporary tables are on a disk of 1 MB, which is full."""
    owner = pwd.getpwnam("nobody").pw_uid  # who runs PostgreSQL where we are root
    mount = ["mount", "-t", "tmpfs", "-o", f"size=1m,mode=0700,uid={owner}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with session_factory() as session:
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
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_noticed_by_trying(server_folder: Path, session_factory: sessionmaker[Session]) -> None:
    folder = server_folder / "small"
    folder.mkdir()
    with full_tablespace(folder, session_factory) as session:
        with pytest.raises(OperationalError, match="No space left on device") as raised:
            troubles.try_to_write(session)
        assert getattr(raised.value.orig, "sqlstate", None) == troubles.DISK_FULL
        (folder / "filler").unlink()
        for _ in range(3):
            troubles.try_to_write(session)
