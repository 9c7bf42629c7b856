"""SQLAlchemy engines and sessions on PostgreSQL, with the settings that we rely on, and the migration of the schema.

Time limits, planner settings and prepared statements belong to a session, and a pooler in transaction mode may run each
transaction in a different one; storage/session_settings.py says what we do there. Settings are made after connecting,
since PgBouncer refuses or drops those that come with the connection; it lists this under "Features":
https://www.pgbouncer.org/features.html
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
from psycopg.errors import IdleInTransactionSessionTimeout, ReadOnlySqlTransaction
from sqlalchemy import URL, Connection, Engine, ExceptionContext, event, func, make_url, select, text
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from domain.errors import ExpectedError
from storage.session_settings import is_pooled, keeps_sessions, make_async_database, make_database, set_for_connections

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 3

STATEMENT_TIMEOUT_SECONDS = 30

LOCK_TIMEOUT_SECONDS = 10

NUM_LOOKS = 8  # with a busy pooler, one check may miss that two connections share a session

# A plan cached while a table was empty would keep reading the whole table for minutes after it has filled. A queue's
# rows are in memory, so finding one by id costs little more than reading the next one.
PLANNER = {"plan_cache_mode": "force_custom_plan", "jit": "off", "random_page_cost": "1.1"}

SHARED = (
    "CELERIAC_DATABASE_URL leads to a pooler in transaction mode: two of our connections share a session; "
    "append ?pool_mode=transaction to the URL (&pool_mode=transaction if it has a ? already), so that no setting, lock "
    "or prepared statement outlasts its transaction; or set pool_mode = session in the pooler"
)

NO_TRANSACTIONS = (
    "CELERIAC_DATABASE_URL leads to a pooler in statement mode, which has no transactions; "
    "set pool_mode = session in the pooler, or use the URL of PostgreSQL itself"
)

STATEMENT_MODE = "in statement pooling mode"  # part of PgBouncer's error message when it refuses a BEGIN


class SharedSessions(ExpectedError):
    """The database is behind a pooler that does not give our connections sessions of their own."""


def guard_sessions(database: Engine, idle_seconds: float) -> None:
    """Give every connection of this engine our settings before its first use."""
    timeouts = {
        "statement_timeout": STATEMENT_TIMEOUT_SECONDS,
        "lock_timeout": LOCK_TIMEOUT_SECONDS,
        "idle_in_transaction_session_timeout": idle_seconds,
    }
    milliseconds = {name: f"{round(1000 * seconds)}ms" for name, seconds in timeouts.items()}
    set_for_connections(database, PLANNER | milliseconds)


def refuse_shared_sessions(url: URL) -> None:
    """Raise SharedSessions if one session of PostgreSQL serves two connections, or two sessions serve one connection;
    or, if the URL says that this is so, if a connection cannot keep its session for a transaction. Raises
    OperationalError if the server does not answer."""
    options = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "prepare_threshold": None}
    database = make_database(url, isolation_level="AUTOCOMMIT", pool_size=2, connect_args=options)
    try:
        is_shared = _changes_in_a_transaction(database) if is_pooled(url) else _is_shared(database)
    except DBAPIError as exc:
        if STATEMENT_MODE not in str(exc.orig):
            raise
        raise SharedSessions(NO_TRANSACTIONS) from exc
    finally:
        database.dispose()
    if is_shared:
        raise SharedSessions(SHARED)


def _changes_in_a_transaction(database: Engine) -> bool:
    """One connection at a time: processes that start together, and each keep one of a pooler's sessions while they wait
    for another, could wait for each other."""
    with database.connect() as connection:
        connection.exec_driver_sql("BEGIN")
        sessions = {_session_of(connection) for _ in range(2)}
        connection.exec_driver_sql("ROLLBACK")
    return len(sessions) > 1


def _is_shared(database: Engine) -> bool:
    with database.connect() as first, database.connect() as second:
        looks = [(_session_of(first), _session_of(second)) for _ in range(NUM_LOOKS)]
    firsts, seconds = map(set, zip(*looks, strict=True))
    return len(firsts) > 1 or len(seconds) > 1 or bool(firsts & seconds)


def _session_of(connection: Connection) -> int:
    return int(connection.scalar(select(func.pg_backend_pid())) or 0)


MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"

MIGRATION_LOCK = 0x63656C6572696163  # "celeriac": the advisory lock for migrations

P = ParamSpec("P")

T = TypeVar("T")

MIGRATION_WAIT_SECONDS = 60.0

MIGRATION_LOOK_SECONDS = 0.1

POOL_TIMEOUT_SECONDS = 2.0  # a route that does not get a connection within this time answers 503

IDLE_SECONDS = 5.0  # a third of the default lease; see Settings.idle_transaction_seconds

CONNECT_ARGS = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    # Notice within seconds, not after the kernel's two hours, if the peer has silently vanished.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

OUTAGES = (OperationalError, InterfaceError, PoolTimeout)  # the database is down or asks for a retry

# Also outages, but psycopg raises them as InternalError. The second comes from a server that has become a standby.
OTHER_OUTAGES = (IdleInTransactionSessionTimeout, ReadOnlySqlTransaction)


def database_url(url: str) -> URL:
    """Convert `postgresql://…` or `postgres://…` for SQLAlchemy with psycopg 3, which supports both sync and async."""
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "postgresql+psycopg":
        raise ValueError(f"the database URL begins with {parsed.drivername}://; give postgresql://user@host:port/name")
    return parsed


def open_database(
    url: str,
    *,
    pool_size: int = 4,
    max_overflow: int = 4,
    idle_seconds: float = IDLE_SECONDS,
    repeats_calls: bool = False,
) -> Engine:
    """A pool of sync connections, for workers and maintenance. Connects on first use. The server ends transactions that
    are idle for `idle_seconds`. For a caller that repeats its calls after an outage, connections are not asked whether
    they still work each time, which is a round trip: one that was lost while idle raises one of OUTAGES."""
    database = make_database(
        database_url(url),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        pool_pre_ping=not repeats_calls,
        connect_args=CONNECT_ARGS,
    )
    guard_sessions(database, idle_seconds)
    _tell_outages(database)
    return database


def open_async_database(
    url: str, *, pool_size: int = 10, max_overflow: int = 10, idle_seconds: float = IDLE_SECONDS
) -> AsyncEngine:
    """A pool of async connections, for the API; otherwise like `open_database`."""
    database = make_async_database(
        database_url(url),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        pool_pre_ping=True,
        connect_args=CONNECT_ARGS,
    )
    guard_sessions(database.sync_engine, idle_seconds)
    _tell_outages(database.sync_engine)
    return database


def open_statement_database(url: str, *, pool_size: int = 10, max_overflow: int = 10) -> AsyncEngine:
    """Like `open_async_database`, but for single statements that may be repeated. They autocommit, in one round trip
    instead of four, and a connection lost while idle is noticed only when it is used; see `repeatable`."""
    database = make_async_database(
        database_url(url),
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=POOL_TIMEOUT_SECONDS,
        pool_use_lifo=True,  # so that few connections do most of the work and can reuse their prepared statements
        isolation_level="AUTOCOMMIT",
        connect_args=CONNECT_ARGS,
    )
    guard_sessions(database.sync_engine, IDLE_SECONDS)
    _tell_outages(database.sync_engine)
    return database


PLAN_SECONDS = 1.0  # in which no table grows so much that its plan could matter


def keep_plans(database: Engine, *, seconds: float | None = None) -> None:
    """Have connections plan a statement once in `seconds` (PLAN_SECONDS), not each time. For statements that are long
    and executed often, and whose plan depends on no parameter: planning them costs more than running them. So does
    planning the checks of foreign keys, which PostgreSQL does for every inserted row otherwise. A pooler's sessions
    keep no plans."""
    if not keeps_sessions(database):
        return

    @event.listens_for(database, "connect")
    def set_up(connection: Any, record: Any) -> None:
        _execute(connection, "SET plan_cache_mode = force_generic_plan")
        connection.commit()
        record.info[_PLANNED_AT] = monotonic()

    @event.listens_for(database, "checkout")
    def discard_old(connection: Any, record: Any, fairy: object) -> None:
        if monotonic() - record.info[_PLANNED_AT] < (PLAN_SECONDS if seconds is None else seconds):
            return
        try:
            _execute(connection, "DISCARD PLANS")
            connection.commit()  # in a transaction, a session could not turn to autocommit
        except psycopg.Error as exc:
            raise DisconnectionError from exc  # the pool connects again
        record.info[_PLANNED_AT] = monotonic()


def discard_plans(session: Session) -> bool:
    """For a quiet moment: discard the plans of this session's connection if they are older than PLAN_SECONDS. Returns
    whether it did."""
    connection = session.connection()
    planned_at = connection.info.get(_PLANNED_AT)
    if planned_at is None or monotonic() - planned_at < PLAN_SECONDS:
        return False
    connection.exec_driver_sql("DISCARD PLANS")
    connection.info[_PLANNED_AT] = monotonic()
    return True


def plan_anew(session: Session) -> None:
    """Call first in a transaction on a connection that keeps plans, if the plan of a statement depends on a
    parameter."""
    session.execute(text("SET LOCAL plan_cache_mode = force_custom_plan"))


_PLANNED_AT = "planned_at"


def _execute(connection: Any, statement: str) -> None:
    cursor = connection.cursor()
    cursor.execute(statement)
    cursor.close()


async def repeatable(
    sessions: async_sessionmaker[AsyncSession],
    function: Callable[Concatenate[Session, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Call a storage function, and call it again on a new connection if the first one was lost. It must be safe to call
    twice."""
    try:
        async with sessions() as session:
            return await session.run_sync(function, *args, **kwargs)
    except DBAPIError as exc:
        if not exc.connection_invalidated:
            raise
    async with sessions() as session:
        return await session.run_sync(function, *args, **kwargs)


async def within(seconds: float, reading: Coroutine[Any, Any, T]) -> T:
    """The result of `reading`. Raises TimeoutError if it takes longer than `seconds`. It then continues in the
    background, because cancelling a connection whose server is gone would block the caller for ten more seconds."""
    task = asyncio.create_task(reading)
    try:
        await asyncio.wait((task,), timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError(f"the database did not answer within {seconds:g} s")
    finally:
        if not task.done():
            task.cancel()
            _given_up.add(task)
            task.add_done_callback(_forget)


_given_up: set["asyncio.Task[Any]"] = set()  # the event loop keeps only weak references


def _forget(task: "asyncio.Task[Any]") -> None:
    _given_up.discard(task)
    if not task.cancelled():
        task.exception()  # retrieve it, since nobody awaits the task any more


def session_factory(database: Engine) -> sessionmaker[Session]:
    """Sessions whose rows stay readable after the commit, so that functions can return them."""
    return sessionmaker(database, expire_on_commit=False)


def statement_factory(sessions: sessionmaker[Session]) -> sessionmaker[Session]:
    """Sessions on the same connections whose statements autocommit: one round trip instead of three, and no ROLLBACK,
    at which psycopg discards the connection's prepared statements."""
    return sessionmaker(sessions.kw["bind"].execution_options(isolation_level="AUTOCOMMIT"), expire_on_commit=False)


def async_session_factory(database: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """Like `session_factory`. Storage functions run on these sessions through `AsyncSession.run_sync`."""
    return async_sessionmaker(database, expire_on_commit=False)


class MigrationRunning(ExpectedError):
    """Another process has been migrating the schema for longer than we are prepared to wait."""


def migrate(url: str, say: Callable[[str], None] = log.warning) -> None:
    """Bring the schema up to date. May be called from many processes at once: one migrates, the others wait for it.

    A schema that is newer than this release is left alone, so that one can go back to the previous release, whose
    processes run on it (docs/upgrades.md). The lock belongs to a transaction, which ends with the client even behind a
    pooler. `say` is called with the reason for waiting or for leaving the schema alone. Raises MigrationRunning after
    MIGRATION_WAIT_SECONDS, and SharedSessions.
    """
    parsed = database_url(url)
    refuse_shared_sessions(parsed)
    connect_args = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, "prepare_threshold": None}
    database = make_database(parsed, connect_args=connect_args)
    try:
        with database.begin() as locking, database.connect() as connection:
            _take_migration_lock(locking, say)
            _upgrade(connection, say)
    finally:
        database.dispose()


def _take_migration_lock(connection: Connection, say: Callable[[str], None]) -> None:
    """Take the lock until the end of the transaction. Nobody who waits or holds it may keep a snapshot meanwhile, since
    CREATE INDEX CONCURRENTLY waits for all of them: so waiting is asking again and again, and all statements are sent
    without parameters, whose portals would live on."""
    # No idle timeout, since a migration may take a long time.
    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
    if _try_migration_lock(connection):
        return
    other = f"another migration is running ({_lock_holder(connection)})"
    say(f"{other}; waiting up to {MIGRATION_WAIT_SECONDS:g} s for it")
    ends_at = monotonic() + MIGRATION_WAIT_SECONDS
    while not _try_migration_lock(connection):
        if monotonic() > ends_at:
            raise MigrationRunning(
                f"{other} and did not end within {MIGRATION_WAIT_SECONDS:g} s; wait for it, or end it in PostgreSQL "
                "with SELECT pg_terminate_backend(pid)"
            )
        sleep(MIGRATION_LOOK_SECONDS)


def _try_migration_lock(connection: Connection) -> bool:
    return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({MIGRATION_LOCK})").scalar())


def _lock_holder(connection: Connection) -> str:
    """The pid of the session that holds the lock. PostgreSQL shows a lock's key in two halves."""
    statement = text(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"
        " AND classid = :high AND objid = :low AND database = (SELECT oid FROM pg_database"
        " WHERE datname = current_database())"
    )
    halves = {"high": MIGRATION_LOCK >> 32, "low": MIGRATION_LOCK & 0xFFFFFFFF}
    return f"pid {connection.scalar(statement, halves) or 'already gone'} of PostgreSQL"


def _upgrade(connection: Connection, say: Callable[[str], None]) -> None:
    # Imported here: they take a fifth of a worker's start, and only this function needs them.
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()  # each migration has a transaction of its own
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        say(f"the schema is at {found}, newer than this release, which knows {scripts.get_current_head()}; left alone")
        return
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    connection.commit()


def _tell_outages(database: Engine) -> None:
    """Raise OTHER_OUTAGES as OperationalError, and drop connections that had one. A bare DatabaseError without a code
    is what psycopg makes of a connection that is lost in a pipeline."""

    @event.listens_for(database, "handle_error")
    def tell(context: ExceptionContext) -> OperationalError | None:
        original = context.original_exception
        is_lost = type(original) is psycopg.DatabaseError and not original.sqlstate
        if not (is_lost or isinstance(original, OTHER_OUTAGES)):
            return None
        context.is_disconnect = True
        return OperationalError(None, None, context.original_exception, connection_invalidated=True)
