"""Databases for tests: migrated, without a trace of earlier tests, each used by one test at a time.

Creating and dropping a database costs PostgreSQL many times more than emptying one. So a database is reused if nobody
is connected to it any more, only rows have changed in it, and it has not grown. Otherwise it is dropped.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import make_url

from local.servers import OWNER
from storage.database import migrate

TEMPLATE = "migrated_template"
LEAVING_SECONDS = 0.5  # how long a server process may take to end after its client has left
MAX_GROWTH_BYTES = 2**20  # deleted rows still take space, which affects query plans

#: The catalogs in which any change to more than rows, even ANALYZE, leaves a new row version.
CATALOGS = (
    "pg_attribute",
    "pg_class",
    "pg_constraint",
    "pg_namespace",
    "pg_proc",
    "pg_statistic",
    "pg_trigger",
    "pg_type",
    "pg_database WHERE datname = current_database()",
    "pg_db_role_setting WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())",
)
VERSIONS = " UNION ALL ".join(f"(SELECT xmin FROM {catalog})" for catalog in CATALOGS)
LOOK = f"SELECT count(*), max(xmin::text::bigint) FROM ({VERSIONS}) AS versions"
TABLES = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
SIZE = "SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relkind IN ('r', 'i', 't') AND oid >= 16384"

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class Database:
    """`connection` stays open for the work between two tests."""

    name: str
    url: str
    connection: Connection
    look: tuple[Any, ...]  # fingerprint of its catalogs when it was new
    num_bytes: int

    @property
    def is_left(self) -> bool:
        """Whether only we are connected to it."""
        others = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        until = time.monotonic() + LEAVING_SECONDS
        while self.connection.execute(others).fetchone() is not None:
            if time.monotonic() > until:
                return False
            time.sleep(0.002)
        return True


class Databases:
    """The databases on one server. `administrator` is a superuser's connection to it; tests connect as the role that
    owns the tables, for which row-level security is in force."""

    def __init__(self, url_of: Callable[[str], str], administrator: Connection) -> None:
        self._url_of = url_of
        self.administrator = administrator
        self._unused: list[Database] = []
        administrator.execute(f"CREATE DATABASE {TEMPLATE} OWNER {OWNER}")
        migrate(as_role(OWNER, url_of(TEMPLATE)))
        with psycopg.connect(url_of(TEMPLATE)) as connection:
            tables = [name for (name,) in connection.execute(TABLES)]
            rows = {name: _copy_out(connection, name) for name in tables}
            assert _row(connection, "SELECT count(*) FROM pg_sequences") == (0,), "sequences would have to be reset"
        self._rows = {name: copied for name, copied in rows.items() if copied}
        self._empty = "".join(f"DELETE FROM {name};" for name in tables)

    def take(self) -> Database:
        if self._unused:
            return self._unused.pop()
        name = f"test_{secrets.token_hex(6)}"
        self.administrator.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER {OWNER}")
        connection = psycopg.connect(self._url_of(name), autocommit=True, application_name="between tests")
        return Database(
            name, as_role(OWNER, self._url_of(name)), connection, _row(connection, LOOK), *_row(connection, SIZE)
        )

    def give_back(self, database: Database) -> None:
        try:
            is_as_new = self._is_as_new(database)
        except psycopg.OperationalError:  # a test terminated all connections
            is_as_new = False
        if is_as_new:
            self._unused.append(database)
        else:
            self._drop(database)

    def close(self) -> None:
        while self._unused:
            self._drop(self._unused.pop())

    def _drop(self, database: Database) -> None:
        database.connection.close()
        self.administrator.execute(f"DROP DATABASE {database.name} WITH (FORCE)")

    def _is_as_new(self, database: Database) -> bool:
        """Reset its rows. True if it is then like new."""
        connection = database.connection
        if not database.is_left or _row(connection, LOOK) != database.look:
            return False
        with connection.transaction():
            connection.execute("SET LOCAL session_replication_role = replica")  # without triggers and foreign keys
            connection.execute(self._empty)
            for table, rows in self._rows.items():
                with connection.cursor().copy(f"COPY {table} FROM STDIN") as copy:
                    copy.write(rows)
        return bool(_row(connection, SIZE)[0] <= database.num_bytes + MAX_GROWTH_BYTES)


def as_role(role: str, url: str) -> str:
    """The URL for another role."""
    return make_url(url).set(username=role).render_as_string(hide_password=False)


def _copy_out(connection: Connection, table: str) -> bytes:
    with connection.cursor().copy(f"COPY {table} TO STDOUT") as copy:
        return b"".join(map(bytes, copy))


def _row(connection: Connection, query: str) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(query).fetchone()
    assert row is not None
    return row
