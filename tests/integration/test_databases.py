"""What lies between two tests: a database is given out again as it was, or not at all."""

from collections.abc import Callable

import psycopg
import pytest

from local.servers import SUPERUSER
from storage.tables import DEFAULT_TENANT_ID
from tests.databases import Database, Databases, as_role

TRIGGER = (
    "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
    "CREATE TRIGGER refuse BEFORE INSERT ON jobs EXECUTE FUNCTION refuse()"
)
MANY_TENANTS = "INSERT INTO tenants (id, name) SELECT gen_random_uuid(), 'tenant ' || n FROM generate_series(1, {}) n"


def execute(database: Database, statement: str) -> None:
    """As the superuser, who may do all that could be found between two tests."""
    with psycopg.connect(as_role(SUPERUSER, database.url), autocommit=True) as connection:
        connection.execute(statement)


def test_rows_are_set_back(databases: Databases) -> None:
    database = databases.take()
    execute(database, MANY_TENANTS.format(3) + "; DELETE FROM tenant_load; UPDATE tenants SET weight = 2")
    databases.give_back(database)
    again = databases.take()
    assert again is database
    with psycopg.connect(again.url) as connection:
        assert connection.execute("SELECT id, weight FROM tenants").fetchall() == [(DEFAULT_TENANT_ID, 1)]
        assert connection.execute("SELECT tenant_id FROM tenant_load").fetchall() == [(DEFAULT_TENANT_ID,)]
    databases.give_back(again)


@pytest.mark.parametrize(
    "change",
    [
        lambda database: execute(database, TRIGGER),
        lambda database: execute(database, "ALTER TABLE jobs DISABLE TRIGGER ALL"),
        lambda database: execute(database, f"ALTER DATABASE {database.name} SET statement_timeout = 1"),
        lambda database: execute(database, MANY_TENANTS.format(10) + "; ANALYZE tenants"),
        lambda database: execute(database, MANY_TENANTS.format(20_000)),
        lambda database: execute(
            database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'between tests'"
        ),
    ],
    ids=["trigger", "table", "setting", "statistics", "size", "terminated"],
)
def test_what_cannot_be_set_back_is_dropped(databases: Databases, change: Callable[[Database], None]) -> None:
    database = databases.take()
    change(database)
    databases.give_back(database)
    assert exists(databases, database) is False


def test_one_that_somebody_is_still_connected_to_is_dropped(databases: Databases) -> None:
    database = databases.take()
    with psycopg.connect(database.url) as left_open:
        databases.give_back(database)
        with pytest.raises(psycopg.OperationalError):
            left_open.execute("SELECT 1")
    assert exists(databases, database) is False


def exists(databases: Databases, database: Database) -> bool:
    found = databases.administrator.execute("SELECT FROM pg_database WHERE datname = %s", [database.name])
    return found.fetchone() is not None
