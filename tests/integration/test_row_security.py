"""PostgreSQL hides other tenants' rows from the API's connections, whatever a statement asks for."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import ARRAY, JSON, Table, delete, func, insert, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, sessionmaker

from domain.shares import NO_TENANT, current_tenant
from local.servers import EmbeddedPostgres
from settings import Settings
from storage import job_queries, tenants
from storage.database import open_async_database, open_statement_database
from storage.row_security import GAP, wall_off, warn_of_gap
from storage.tables import Job, Row, Tenant
from tests.conftest import MakeJob
from tests.integration.api_harness import ApiServer

OF_THE_INSTALLATION = {
    "workers",
    "worker_drains",
    "model_states",
    "maintenance_figures",
    "maintenance_ticks",
    "running_sums",
    "usage_closing",
    "model_pulls",
    "processes",
}

OF_ADMINISTRATORS = {"audit_log"}  # which requests of tenants never see at all

TABLES = [table for table in Row.metadata.sorted_tables if table.name not in OF_THE_INSTALLATION]

#: What CHECK constraints ask for beyond the types.
VALUES: dict[str, dict[str, Any]] = {
    "job_attempts": {"outcome": "completed"},
    "files": {"purpose": "batch", "status": "live"},
    "batches": {"status": "in_progress"},
    "webhook_deliveries": {"status": "pending"},
    "erasures": {"step": "jobs"},
}


def a_value(table: Table, name: str, tenant_id: UUID, parents: dict[str, dict[str, Any]]) -> Any:
    column = table.c[name]
    if name == "tenant_id" or (table.name, name) == ("tenants", "id"):
        return tenant_id
    if name in VALUES.get(table.name, {}):
        return VALUES[table.name][name]
    for foreign in column.foreign_keys:
        return parents[foreign.column.table.name][foreign.column.name]
    kind = column.type
    if isinstance(kind, JSON) or "JSON" in type(kind).__name__:
        return "{}"
    if isinstance(kind, ARRAY):
        return []
    return {UUID: uuid4(), datetime: datetime.now(UTC), str: uuid4().hex, bytes: uuid4().bytes, bool: False}.get(
        python_type(kind), 1
    )


def python_type(kind: Any) -> type:
    return getattr(kind, "impl", kind).python_type  # type: ignore[no-any-return]


@pytest.fixture
def two(session_factory: sessionmaker[Session]) -> tuple[UUID, UUID]:
    """Two tenants with a row in every table of tenants' data."""
    both = uuid4(), uuid4()
    with session_factory.begin() as session:
        for tenant_id in both:
            made: dict[str, dict[str, Any]] = {}
            for table in TABLES:
                names = [c.name for c in table.c if c.primary_key or not (c.nullable or c.server_default is not None)]
                row = {name: a_value(table, name, tenant_id, made) for name in names}
                marks = ", ".join(
                    f"CAST(:{name} AS {table.c[name].type.compile(session.get_bind().dialect)})" for name in names
                )
                columns = ", ".join(f'"{name}"' for name in names)
                session.execute(text(f"INSERT INTO {table.name} ({columns}) VALUES ({marks})"), row)
                made[table.name] = row
    return both


def run(database: AsyncEngine, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        try:
            await work()
        finally:
            await database.dispose()

    asyncio.run(whole())


@pytest.mark.parametrize("open_pool", [open_statement_database, open_async_database])
def test_a_query_that_names_no_tenant_finds_only_rows_of_its_own(
    database_url: str, two: tuple[UUID, UUID], open_pool: Callable[[str], AsyncEngine]
) -> None:
    """On every table: one that is new and has no policy fails here."""
    database = wall_off(open_pool(database_url))
    owner_by_table = {
        table.name: table.c.id if table is Tenant.__table__ else table.c.tenant_id
        for table in TABLES
        if table is Tenant.__table__ or "tenant_id" in table.c
    }

    async def count(table: Table, tenant_id: UUID) -> int:
        current_tenant.set(tenant_id)
        async with database.connect() as connection:
            return int(await connection.scalar(select(func.count()).select_from(table)) or 0)

    async def look() -> None:
        for table in TABLES:
            wanted = 0 if table.name in OF_ADMINISTRATORS else 1
            assert [await count(table, tenant_id) for tenant_id in (*two, NO_TENANT)] == [wanted, wanted, 0], table.name
        for name, owner in owner_by_table.items():
            current_tenant.set(two[1])
            async with database.connect() as connection:
                assert list(await connection.scalars(select(owner))) == [two[1]], name

    run(database, look)


def test_an_empty_tenant_is_none(database_url: str, two: tuple[UUID, UUID]) -> None:
    """As a session shows it that served a request before, on every table."""
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT set_config('celeriac.tenant_id', '', false)")
        for table in TABLES:
            [number] = connection.execute(f"SELECT count(*) FROM {table.name}".encode()).fetchone() or []
            assert number >= len(two), table.name


def test_nothing_of_another_tenant_can_be_changed_deleted_or_made(database_url: str, two: tuple[UUID, UUID]) -> None:
    database = wall_off(open_async_database(database_url))

    async def try_everything() -> None:
        current_tenant.set(two[0])
        for table in reversed(TABLES):
            async with database.connect() as connection:
                key = next(iter(table.primary_key.columns)).name
                changed = await connection.execute(text(f'UPDATE {table.name} SET "{key}" = "{key}"'))
                assert changed.rowcount == (table.name not in OF_ADMINISTRATORS), table.name
                await connection.rollback()
                deleted = await connection.execute(delete(table))
                assert deleted.rowcount == (table.name not in OF_ADMINISTRATORS), table.name
                await connection.rollback()
        async with database.connect() as connection:
            forged = insert(Tenant.__table__).values(id=uuid4(), name="forged")  # type: ignore[arg-type]
            with pytest.raises(ProgrammingError) as refused:
                await connection.execute(forged)
            assert isinstance(refused.value.orig, InsufficientPrivilege)

    run(database, try_everything)


def test_the_tenant_is_that_of_each_transaction_alone(database_url: str, two: tuple[UUID, UUID]) -> None:
    """Over one connection, with commits, rollbacks and errors between them."""
    database = wall_off(open_async_database(database_url, pool_size=1, max_overflow=0))

    async def look() -> None:
        seen = text("SELECT id FROM tenants")
        for end in ("commit", "rollback", "error"):
            for tenant_id in (*two, NO_TENANT, *two):
                current_tenant.set(tenant_id)
                async with database.connect() as connection:
                    own = [] if tenant_id == NO_TENANT else [tenant_id]
                    assert list(await connection.scalars(seen)) == own
                    assert list(await connection.scalars(seen)) == own
                    if end == "error":
                        with pytest.raises(ProgrammingError):
                            await connection.execute(text("SELECT nothing"))
                    elif end == "commit":
                        await connection.commit()

    run(database, look)


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, auth="api_key")


def test_a_route_that_forgets_its_tenant_shows_nothing_of_another(
    api: ApiServer,
    session_factory: sessionmaker[Session],
    make_tenant: Callable[..., Tenant],
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owners = make_tenant(), make_tenant()
    ids = [make_job(tenant_id=owner.id).id for owner in owners]
    with session_factory.begin() as session:
        key = tenants.create_key(session, owners[1].id)
        assert set(session.scalars(select(Job.id))) == set(ids), "without the setting, a session sees both"

    def list_all(session: Session, *_: object, **__: object) -> list[Job]:
        return list(session.scalars(select(Job)))

    monkeypatch.setattr(job_queries, "list_jobs", list_all)
    with api.client(key) as client:
        listed: httpx.Response = client.get("/v1/jobs")
    assert listed.status_code == 200, listed.text
    assert len(listed.json()["data"]) == 1, "only its own"


def test_a_superuser_is_told_that_nothing_is_in_force(
    database_url: str,
    databases: Any,
    postgres_server: EmbeddedPostgres,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with psycopg.connect(database_url) as connection:
        assert connection.execute(GAP).fetchone() == (None,)
        connection.execute("ALTER TABLE jobs NO FORCE ROW LEVEL SECURITY")
        assert connection.execute(GAP).fetchone() == ("it is switched off for jobs",)
        connection.rollback()
        name = connection.info.dbname
    database = open_statement_database(postgres_server.url_of(name))
    warn_of_gap(database)

    async def connect() -> None:
        for _ in range(2):
            async with database.connect() as one, database.connect() as other:
                await one.execute(select(1))
                await other.execute(select(1))

    run(database, connect)
    assert [
        (record.levelname, record.__dict__["reason"]) for record in caplog.records if "row-level" in record.message
    ] == [("WARNING", "postgres is a superuser")]
