"""The migrated schema is the one the row classes describe, and migrating is safe to repeat and to race."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, select, text, update
from sqlalchemy.orm import Session, sessionmaker

from storage import job_queries
from storage.database import MIGRATIONS, OUTAGES, migrate, open_database, session_factory
from storage.database import database_url as normalised
from storage.tables import DEFAULT_TENANT_ID, Row, Tenant, TenantLoad
from tests.conftest import MakeJob

CATALOG = {
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype <> 'n'""",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "storage parameters": """
        SELECT relname, reloptions FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'""",
    "columns": """
        SELECT table_name, column_name, data_type, is_nullable,
               replace(regexp_replace(column_default, '::[a-z ]+', ''), '''', '')
        FROM information_schema.columns WHERE table_schema = 'public'""",
}


def catalog(database: Engine) -> dict[str, set[str]]:
    with database.connect() as connection:
        return {
            name: {str(row) for row in connection.execute(text(query)) if "alembic_version" not in str(row)}
            for name, query in CATALOG.items()
        }


def test_the_migrated_schema_is_the_one_of_the_row_classes(database: Engine, empty_database_url: str) -> None:
    described = create_engine(normalised(empty_database_url))
    Row.metadata.create_all(described)
    expected, migrated = catalog(described), catalog(database)
    described.dispose()
    for name in CATALOG:
        assert migrated[name] == expected[name], name


def test_alembic_finds_nothing_to_change(database: Engine) -> None:
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": False})
        assert compare_metadata(context, Row.metadata) == []


def test_the_guards_of_the_job_protocol_exist(database: Engine) -> None:
    found = catalog(database)
    text_of = {name: "\n".join(rows) for name, rows in found.items()}
    assert "fillfactor=70" in text_of["storage parameters"]
    assert "jobs_lease_owner_check" in text_of["constraints"]
    assert "jobs_finished_at_check" in text_of["constraints"]
    assert "lease_expires_at" not in text_of["indexes"], "an index on it would end heap-only renewals"


def test_many_processes_may_migrate_at_once(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(migrate, [empty_database_url] * 4))
    database = create_engine(normalised(empty_database_url))
    with database.connect() as connection:
        [newest] = ScriptDirectory(str(MIGRATIONS)).get_heads()
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == [newest]
    database.dispose()


def test_a_schema_of_a_newer_release_is_left_alone(database: Engine, database_url: str) -> None:
    said: list[str] = []
    with database.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    migrate(database_url, said.append)
    with database.begin() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["9999"]
    [line] = said
    assert "the schema is at 9999, newer than this release, which knows " in line


def test_the_default_tenant_is_there(session: Session) -> None:
    tenant = session.get_one(Tenant, DEFAULT_TENANT_ID)
    assert tenant.name == "default"
    assert session.get_one(TenantLoad, DEFAULT_TENANT_ID).num_queued == 0


def test_a_url_of_another_database_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sqlite"):
        normalised("sqlite:///jobs.db")


@pytest.fixture
def impatient_sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    """One connection, whose server waits for a second only."""
    database = open_database(database_url, pool_size=1, max_overflow=0, idle_seconds=1)
    yield session_factory(database)
    database.dispose()


def test_a_transaction_that_stands_idle_is_ended_as_an_outage(impatient_sessions: sessionmaker[Session]) -> None:
    with impatient_sessions() as session:
        session.execute(select(Tenant).with_for_update())
        sleep(1.2)
        with pytest.raises(OUTAGES):
            session.commit()


def test_a_server_that_became_a_standby_is_an_outage_and_its_connection_is_left(
    impatient_sessions: sessionmaker[Session],
) -> None:
    backend = text("SELECT pg_backend_pid()")
    with impatient_sessions() as session:
        left = session.scalar(backend)
        session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(OUTAGES):
            session.execute(update(Tenant).values(name="another"))
    with impatient_sessions() as session:
        assert session.scalar(backend) != left


def test_jobs_of_the_last_release_are_found_by_their_metadata(
    session: Session, make_job: MakeJob, database_url: str
) -> None:
    older = [make_job(job_metadata=metadata) for metadata in ({"team": "red"}, {}, {"team": "nul \x00"})]
    session.commit()
    ids = [job.id for job in older]
    session.execute(text("TRUNCATE metadata_entries"))
    session.execute(text("UPDATE alembic_version SET version_num = '0040'"))
    session.commit()
    migrate(database_url)
    found = job_queries.list_jobs(session, DEFAULT_TENANT_ID, metadata={"team": "red"})
    assert [job.id for job in found] == ids[:1]
