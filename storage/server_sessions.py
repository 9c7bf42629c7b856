"""What we rely on in a session of PostgreSQL: its time limits and planner settings, and that it is ours alone.

The settings are made after connecting, since a pooler (PgBouncer) refuses or drops those that come with the connection.
They and prepared statements belong to a session; behind a pooler in transaction or statement mode, each transaction
may run in another one. PgBouncer, "Features", has the list: https://www.pgbouncer.org/features.html
"""

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError

CONNECT_TIMEOUT_SECONDS = 3
STATEMENT_TIMEOUT_SECONDS = 30
LOCK_TIMEOUT_SECONDS = 10
NUM_LOOKS = 8  # at a busy pooler one look may miss that two connections share a session

# A plan cached while a table was empty would read the whole table for minutes after it filled; and the rows of a
# queue are in memory, so looking one up by its id costs little more than reading the next one.
PLANNER = {"plan_cache_mode": "force_custom_plan", "jit": "off", "random_page_cost": "1.1"}


SHARED = (
    "CELERIAC_DATABASE_URL leads to a pooler in transaction or statement mode: two of our connections share a session "
    "of PostgreSQL, so that time limits, locks and prepared statements would be lost; "
    "set pool_mode = session there, or name PostgreSQL itself"
)
STATEMENT_MODE = "in statement pooling mode"  # what PgBouncer refuses a BEGIN with


class SharedSessions(Exception):
    """The database is behind a pooler that gives us no session of our own."""


def guard_sessions(database: Engine, idle_seconds: float) -> None:
    """Every connection of this engine gets our settings before its first use."""
    timeouts = {
        "statement_timeout": STATEMENT_TIMEOUT_SECONDS,
        "lock_timeout": LOCK_TIMEOUT_SECONDS,
        "idle_in_transaction_session_timeout": idle_seconds,
    }
    settings = PLANNER | {name: f"{round(1000 * seconds)}ms" for name, seconds in timeouts.items()}
    statement = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in settings.items())

    @event.listens_for(database, "connect")
    def set_up(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # a rollback would take the settings back


def refuse_shared_sessions(url: URL) -> None:
    """Raise SharedSessions where two connections are served by one session of PostgreSQL, or one connection by two.
    Raises OperationalError where the server does not answer."""
    options = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "prepare_threshold": None}
    database = create_engine(url, isolation_level="AUTOCOMMIT", pool_size=2, connect_args=options)
    try:
        with database.connect() as first, database.connect() as second:
            looks = [(_session_of(first), _session_of(second)) for _ in range(NUM_LOOKS)]
    except DBAPIError as exc:
        if STATEMENT_MODE not in str(exc.orig):
            raise
        raise SharedSessions(SHARED) from exc
    finally:
        database.dispose()
    firsts, seconds = map(set, zip(*looks, strict=True))
    if len(firsts) > 1 or len(seconds) > 1 or firsts & seconds:
        raise SharedSessions(SHARED)


def _session_of(connection: Connection) -> int:
    return int(connection.scalar(select(func.pg_backend_pid())) or 0)
