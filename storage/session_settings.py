"""Settings of PostgreSQL's sessions: for as long as a connection lives, or by the transaction, behind a pooler.

Time limits, the planner's settings and the tenant whose rows a request sees are settings of a session. Behind a pooler
in transaction mode, each transaction may run in another session, and whoever comes next in it would find what we had
set. So with `pool_mode=transaction` in CELERIAC_DATABASE_URL nothing is set for a session: the settings travel with the
first statement of each transaction, by psycopg's pipeline mode, and end with it. docs/adr/0076 says what that costs.

Statements are not prepared there: poolers lose their names, or must be told to keep them.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Self, cast

import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncPipeline, Connection, Cursor, Pipeline
from psycopg.generators import send
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from domain.addresses import POOL_MODE, TRANSACTION_MODE

CARRIED = "carried_settings"  # an engine's execution option


class CarriedSettings(dict[str, str | Callable[[], str]]):
    """By their names, what each transaction of an engine's connections begins with. A callable is asked each time."""

    def statement(self) -> tuple[str, tuple[str, ...]]:
        calls = [f"set_config('{name}', {_placed(value)}, true)" for name, value in self.items()]
        return f"SELECT {', '.join(calls)}", tuple(value() for value in self.values() if callable(value))


def _placed(value: str | Callable[[], str]) -> str:
    return "%s" if callable(value) else f"'{value}'"


# What we override or call of psycopg's own, for which pyproject.toml bounds its version.
PRIVATE_NAMES = ("_exit_gen", "_enqueue_sync", "_communicate_gen", "_fetch_gen")

if missing := [name for name in PRIVATE_NAMES if not hasattr(Pipeline, name)]:
    raise ImportError(f"psycopg {psycopg.__version__} has no Pipeline.{missing[0]}; install the one in constraints.txt")


class UnflushedPipeline(Pipeline):
    """Ends with a Sync alone. psycopg sends a Flush after it if answers are still on their way. A pooler that has seen
    the end of the transaction by then lends a session for the Flush, and never gets it back: a Flush has no answer."""

    def _exit_gen(self) -> Any:
        try:
            self._enqueue_sync()
            yield from self._communicate_gen()
        finally:
            yield from send(self.pgconn)  # of a megabyte, only the beginning was written so far
            yield from self._fetch_gen(flush=False)


class UnflushedAsyncPipeline(AsyncPipeline):
    """The same for asynchronous connections."""

    _exit_gen = UnflushedPipeline._exit_gen


@contextmanager
def _one_trip(connection: Connection[Any]) -> Iterator[None]:
    """`connection.pipeline()`, with ours."""
    pipeline = connection._pipeline = UnflushedPipeline(connection)
    try:
        with pipeline:
            yield
    finally:
        connection._pipeline = None


@asynccontextmanager
async def _one_async_trip(connection: AsyncConnection[Any]) -> AsyncIterator[None]:
    pipeline = connection._pipeline = UnflushedAsyncPipeline(connection)
    try:
        async with pipeline:
            yield
    finally:
        connection._pipeline = None


class CarryingCursor(Cursor[Any]):
    """Begins each transaction with `carried`, in the round trip of its first statement."""

    def __init__(self, connection: Any, *, carried: CarriedSettings, **options: Any) -> None:
        super().__init__(connection, **options)
        self._carried = carried

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        if self._is_begun():
            return super().execute(query, params, **options)
        with _one_trip(self.connection):  # one transaction, even where each statement commits
            self._carry()
            super().execute(query, params, **options)
        return self

    def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
        if self._is_begun():
            return super().executemany(query, params_seq, **options)
        with _one_trip(self.connection):
            self._carry()
            super().executemany(query, params_seq, **options)

    def _is_begun(self) -> bool:
        return not self._carried or self.connection.info.transaction_status is not TransactionStatus.IDLE

    def _carry(self) -> None:
        statement, values = self._carried.statement()
        Cursor(self.connection).execute(statement.encode(), values)


class AsyncCarryingCursor(AsyncCursor[Any]):
    """The same for asynchronous connections."""

    def __init__(self, connection: Any, *, carried: CarriedSettings, **options: Any) -> None:
        super().__init__(connection, **options)
        self._carried = carried

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        if self._is_begun():
            return await super().execute(query, params, **options)
        async with _one_async_trip(self.connection):
            await self._carry()
            await super().execute(query, params, **options)
        return self

    async def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
        if self._is_begun():
            return await super().executemany(query, params_seq, **options)
        async with _one_async_trip(self.connection):
            await self._carry()
            await super().executemany(query, params_seq, **options)

    def _is_begun(self) -> bool:
        return not self._carried or self.connection.info.transaction_status is not TransactionStatus.IDLE

    async def _carry(self) -> None:
        statement, values = self._carried.statement()
        await AsyncCursor(self.connection).execute(statement.encode(), values)


def is_pooled(url: URL) -> bool:
    """Whether the URL says that a pooler lends its sessions by the transaction."""
    return url.query.get(POOL_MODE) == TRANSACTION_MODE


def make_database(url: URL, **options: Any) -> Engine:
    """`create_engine` for a URL that may name its pooler's mode."""
    database = create_engine(url.difference_update_query([POOL_MODE]), **_options_for(url, options))
    _carry_if_pooled(database)
    return database


def make_async_database(url: URL, **options: Any) -> AsyncEngine:
    """The same for asynchronous engines."""
    database = create_async_engine(url.difference_update_query([POOL_MODE]), **_options_for(url, options))
    _carry_if_pooled(database.sync_engine)
    return database


def _options_for(url: URL, options: dict[str, Any]) -> dict[str, Any]:
    if not is_pooled(url):
        return options
    arguments = {**options.get("connect_args", {}), "prepare_threshold": None}
    return {**options, "connect_args": arguments, "execution_options": {CARRIED: CarriedSettings()}}


def _carry_if_pooled(database: Engine) -> None:
    if not keeps_sessions(database):
        carry(database, carried_settings(database))


def keeps_sessions(database: Engine) -> bool:
    """Whether each of its connections has a session of PostgreSQL to itself."""
    return CARRIED not in database.get_execution_options()


def carried_settings(database: Engine) -> CarriedSettings:
    """Of an engine that does not keep sessions."""
    return cast(CarriedSettings, database.get_execution_options()[CARRIED])


def carry(database: Engine, carried: CarriedSettings) -> None:
    """Let each transaction of this engine, which has no connections yet, begin with these settings."""

    @event.listens_for(database, "connect")
    def set_up(connection: Any, record: object) -> None:
        is_async = database.dialect.is_async
        driven = connection.driver_connection if is_async else connection
        driven.cursor_factory = partial(AsyncCarryingCursor if is_async else CarryingCursor, carried=carried)


def set_for_connections(database: Engine, settings: Mapping[str, str]) -> None:
    """Let this engine, which has no connections yet, run everything with these settings."""
    if not keeps_sessions(database):
        carried_settings(database).update(settings)
        return
    statement = "SELECT " + ", ".join(f"set_config('{name}', '{value}', false)" for name, value in settings.items())

    @event.listens_for(database, "connect")
    def set_up(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()  # a rollback would undo the settings
