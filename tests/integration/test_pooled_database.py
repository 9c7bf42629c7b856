"""PostgreSQL behind PgBouncer: in session mode as good as none; in transaction mode nothing outlasts a transaction."""

import asyncio
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from pydantic import ValidationError
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine

from domain.shares import NO_TENANT, current_tenant
from local.servers import EmbeddedPostgres
from settings import ROOT, Settings
from storage import database as storage_database
from storage import session_settings
from storage.archive import archive_lock
from storage.database import (
    MIGRATION_LOCK,
    MigrationRunning,
    SharedSessions,
    database_url,
    migrate,
    open_async_database,
    open_database,
    open_statement_database,
    refuse_shared_sessions,
)
from storage.row_security import wall_off
from storage.tables import Tenant
from tests.pooler import Pooler, needs_pgbouncer

pytestmark = pytest.mark.slow

GUARDS = {
    "statement_timeout": "30s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "2s",
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
    "random_page_cost": "1.1",
}


@pytest.fixture(params=["direct", *(pytest.param(mode, marks=needs_pgbouncer) for mode in ("session", "transaction"))])
def usable_url(request: pytest.FixtureRequest, database_url: str) -> Iterator[str]:
    if request.param == "direct":
        yield database_url
        return
    with Pooler(database_url, request.param) as pooler:
        yield pooler.url


@pytest.fixture
def one_session(database_url: str) -> Iterator[Pooler]:
    """A pooler that serves everybody by one session of PostgreSQL."""
    with Pooler(database_url, "transaction", num_servers=1) as pooler:
        yield pooler


def test_our_guards_hold_in_every_transaction(usable_url: str) -> None:
    database = open_database(usable_url, idle_seconds=2.0)
    for _ in range(3):
        with database.begin() as connection:
            assert {name: connection.scalar(text(f"SHOW {name}")) for name in GUARDS} == GUARDS
        with database.connect() as connection:
            connection.rollback()
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            assert {name: connection.scalar(text(f"SHOW {name}")) for name in GUARDS} == GUARDS
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
@pytest.mark.parametrize(
    ("mode", "remedy"), [("transaction", "pool_mode=transaction to the URL"), ("statement", "set pool_mode = session")]
)
def test_what_a_pooler_does_not_keep_is_refused(database_url: str, mode: str, remedy: str) -> None:
    with Pooler(database_url, mode) as pooler, pytest.raises(SharedSessions, match=remedy):
        migrate(pooler.bare_url)


@needs_pgbouncer
def test_no_pooler_in_statement_mode_passes_for_one_in_transaction_mode(database_url: str) -> None:
    with Pooler(database_url, "statement") as pooler, pytest.raises(SharedSessions, match="has no transactions"):
        migrate(f"{pooler.bare_url}?pool_mode=transaction")


@needs_pgbouncer
def test_the_look_needs_one_session_of_a_pooler(one_session: Pooler) -> None:
    """Processes that start together would wait for each other's second one."""
    refuse_shared_sessions(database_url(one_session.url))


@needs_pgbouncer
@pytest.mark.parametrize("command", ["migrate", "api", "worker", "maintenance"])
def test_no_process_starts_on_shared_sessions(database_url: str, tmp_path: Path, command: str) -> None:
    with Pooler(database_url, "transaction") as pooler:
        environment = os.environ | {"CELERIAC_DATABASE_URL": pooler.bare_url, "CELERIAC_DATA_DIR": str(tmp_path)}
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
    assert "?pool_mode=transaction" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_pool_mode_is_refused_with_the_words_there_are() -> None:
    with pytest.raises(ValidationError, match="pool_mode is 'statement'; give transaction, or leave it out"):
        Settings(database_url="postgresql://celeriac@db/celeriac?pool_mode=statement")


@needs_pgbouncer
def test_nothing_that_we_set_or_prepare_stays_in_a_shared_session(one_session: Pooler) -> None:
    """Whoever comes next may be another application."""
    database = open_database(one_session.url, idle_seconds=2.0)
    for _ in range(12):  # psycopg prepares what it has executed five times
        with database.begin() as connection:
            connection.execute(text("SELECT id FROM tenants WHERE name = :name"), {"name": "nobody"})
    with archive_lock(database) as is_taken:
        assert is_taken
    names = ", ".join(f"current_setting('{name}')" for name in GUARDS)
    with psycopg.connect(one_session.bare_url, autocommit=True, prepare_threshold=None) as other:
        assert other.execute(f"SELECT {names}").fetchone() not in (None, tuple(GUARDS.values()))
        for leftover in ("pg_prepared_statements", "pg_locks WHERE locktype = 'advisory'"):
            assert other.execute(f"SELECT count(*) FROM {leftover}").fetchone() == (0,), leftover
        assert other.execute("SHOW statement_timeout").fetchone() == ("0",)
    database.dispose()


@pytest.mark.anyio
async def test_nothing_is_sent_after_what_ends_a_transaction(database_url: str, tmp_path: Path) -> None:
    """A pooler would lend a session for it that it never gets back."""
    database = wall_off(open_statement_database(f"{database_url}&pool_mode=transaction"))
    async with database.connect() as connection:
        raw = await connection.get_raw_connection()
        pgconn = raw.driver_connection.pgconn  # type: ignore[union-attr]
        with (tmp_path / "trace").open("w") as trace:
            pgconn.trace(trace.fileno())
            await connection.execute(text("SELECT pg_sleep(0.1)"))
            pgconn.untrace()
    sent = [line.split("\t")[3] for line in (tmp_path / "trace").read_text().splitlines() if "\tF\t" in line]
    assert sent.count("Sync") == 1
    assert sent[-1] == "Sync"
    await database.dispose()


def test_a_psycopg_that_would_not_call_our_pipelines_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("psycopg._pipeline_base.BasePipeline._exit_gen")
    with pytest.raises(ImportError, match=r"has no Pipeline\._exit_gen; install the one in constraints\.txt"):
        runpy.run_path(session_settings.__file__)


@pytest.mark.anyio
async def test_a_connection_that_is_lost_in_a_pipeline_is_an_outage(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psycopg raises a bare DatabaseError if the server's last words are read there; clients saw a 500."""
    database = wall_off(open_statement_database(database_url))

    async def lose(*_: object, **__: object) -> None:
        raise psycopg.DatabaseError("server closed the connection unexpectedly")

    async with database.connect() as connection:
        await connection.execute(text("SELECT 1"))
        with monkeypatch.context() as patched:
            patched.setattr(psycopg.AsyncCursor, "execute", lose)
            with pytest.raises(OperationalError) as lost:
                await connection.execute(text("SELECT 1"))
    assert lost.value.connection_invalidated
    await database.dispose()


@needs_pgbouncer
@pytest.mark.parametrize("open_pool", [open_statement_database, open_async_database])
@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_two_tenants_and_the_installation_share_one_session(
    database_url: str, make_tenant: Callable[..., Tenant], open_pool: Callable[[str], AsyncEngine], mode: str
) -> None:
    """Each sees its own rows, whoever was in that session before: by turns, after commits, rollbacks and errors."""
    both = {make_tenant().id, make_tenant().id}
    names = select(Tenant.id).where(Tenant.id.in_(both))

    async def seen(database: AsyncEngine, end: str) -> set[UUID]:
        async with database.connect() as connection:
            found = set(await connection.scalars(names))
            if end == "error":
                with pytest.raises(ProgrammingError):
                    await connection.execute(text("SELECT nothing"))
            elif end == "commit":
                await connection.commit()
            return found

    async def look(url: str) -> None:
        for end in ("commit", "rollback", "error"):
            for tenant_id in (*both, NO_TENANT):
                walled, system = wall_off(open_pool(url)), open_async_database(url)
                current_tenant.set(tenant_id)
                for _ in range(3):
                    assert await seen(walled, end) == {tenant_id} & both
                    if mode == "session":
                        await walled.dispose()  # the next one needs its session
                    assert await seen(system, end) == both
                    if mode == "session":
                        await system.dispose()
                await walled.dispose()
                await system.dispose()

    with Pooler(database_url, mode, num_servers=1) as pooler:
        asyncio.run(look(pooler.url))


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
