"""PostgreSQL behind PgBouncer: session mode is as good as none, the other modes are refused with the reason."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from local.processes import free_port
from local.servers import EmbeddedPostgres
from settings import ROOT
from storage import database as storage_database
from storage.database import (
    MIGRATION_LOCK,
    MigrationRunning,
    SharedSessions,
    database_url,
    migrate,
    open_async_database,
    open_database,
    refuse_shared_sessions,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
GUARDS = {
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "2s",
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
    "random_page_cost": "1.1",
}

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="needs a pgbouncer on PATH")


@contextmanager
def pooler(direct_url: str, mode: str) -> Iterator[str]:
    """The URL of the same database behind a PgBouncer with default settings, all but the mode."""
    assert PGBOUNCER is not None
    url = make_url(direct_url)
    folder, port = Path(tempfile.mkdtemp(prefix="celeriac-pooler-")), free_port("127.0.0.1", 0)
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n{url.database} = host={url.query['host']} user={url.username}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\n"
    )
    folder.chmod(0o755)
    command = [PGBOUNCER, *(["-u", "nobody"] if os.geteuid() == 0 else []), str(folder / "pgbouncer.ini")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    pooled = f"postgresql://{url.username}@127.0.0.1:{port}/{url.database}"
    try:
        wait_until(lambda: _answers(pooled), f"pgbouncer answers: {(folder / 'log').read_text()}")
        yield pooled
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, autocommit=True, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.fixture(params=["direct", pytest.param("session", marks=needs_pgbouncer)])
def usable_url(request: pytest.FixtureRequest, database_url: str) -> Iterator[str]:
    if request.param == "direct":
        yield database_url
        return
    with pooler(database_url, "session") as url:
        yield url


def test_our_guards_hold_in_every_transaction(usable_url: str) -> None:
    database = open_database(usable_url, idle_seconds=2.0)
    for _ in range(3):
        with database.begin() as connection:
            assert {name: connection.scalar(text(f"SHOW {name}")) for name in GUARDS} == GUARDS
        with database.connect() as connection:
            connection.rollback()
    database.dispose()


@pytest.mark.anyio
async def test_our_guards_hold_on_async_connections(usable_url: str) -> None:
    database = open_async_database(usable_url, idle_seconds=2.0)
    async with database.connect() as connection:
        await connection.rollback()
        assert {name: await connection.scalar(text(f"SHOW {name}")) for name in GUARDS} == GUARDS
    await database.dispose()


def test_a_session_of_our_own_is_accepted(usable_url: str) -> None:
    refuse_shared_sessions(database_url(usable_url))
    migrate(usable_url)
    migrate(usable_url)


@needs_pgbouncer
@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_shared_sessions_are_refused(database_url: str, mode: str) -> None:
    with pooler(database_url, mode) as url, pytest.raises(SharedSessions, match="set pool_mode = session"):
        migrate(url)


@needs_pgbouncer
@pytest.mark.parametrize("command", ["migrate", "api", "worker", "maintenance"])
def test_no_process_starts_on_shared_sessions(database_url: str, tmp_path: Path, command: str) -> None:
    with pooler(database_url, "transaction") as url:
        environment = os.environ | {"CELERIAC_DATABASE_URL": url, "CELERIAC_DATA_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "celeriac", command],
            cwd=ROOT,
            env=environment | {"CELERIAC_REDIS_URL": "redis://127.0.0.1:1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode != 0
    assert "pool_mode = session" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_migration_says_for_whom_it_waits_and_ends(
    postgres_server: EmbeddedPostgres, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_database, "MIGRATION_WAIT_SECONDS", 0.5)
    said: list[str] = []
    with psycopg.connect(database_url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [MIGRATION_LOCK])
        holder = f"another migration is running (pid {other.info.backend_pid} of PostgreSQL)"
        with pytest.raises(MigrationRunning, match=re.escape(holder)):
            migrate(database_url, said.append)
    assert [line.partition(";")[0] for line in said] == [holder]
    migrate(database_url)


def test_a_second_migration_goes_on_when_the_first_has_ended(database_url: str) -> None:
    waits = threading.Event()
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [MIGRATION_LOCK])
        second = threading.Thread(target=migrate, args=(database_url, lambda _: waits.set()))
        second.start()
        assert waits.wait(300)
        other.commit()
        second.join(300)
        assert not second.is_alive()


def test_a_migration_leaves_no_lock_behind(usable_url: str, database_url: str) -> None:
    migrate(usable_url)
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_locks JOIN pg_database ON database = pg_database.oid"
            " WHERE locktype = 'advisory' AND datname = current_database()"
        ).fetchone()
        assert row == (0,)
