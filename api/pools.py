"""The API's connections to PostgreSQL: for requests, which see one tenant's rows, and for the installation."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from settings import Settings
from storage.database import async_session_factory, open_async_database, open_statement_database
from storage.row_security import wall_off, warn_of_gap

MAX_READS = 12  # of requests at a time: as many as there are connections for single statements

MAX_WRITES = 8  # of requests at a time: as many as there are connections for transactions

# Connections that stay open once they were needed: as many as one tenant can take, and some for others. A connection
# beyond these is opened for each use, which costs more than most uses, and most of all while the machine is busy.
KEPT_WRITES = MAX_WRITES // 2 + 2

MAX_SYSTEM_CONNECTIONS = 10  # for what concerns all tenants: streams and keys, which leave some to queues and others


class Pools(NamedTuple):
    """`sessions` are transactions, `statements` autocommit. Those of `system_` see all tenants, the others the tenant
    of their request."""

    sessions: async_sessionmaker[AsyncSession]
    statements: async_sessionmaker[AsyncSession]
    system_sessions: async_sessionmaker[AsyncSession]
    system_statements: async_sessionmaker[AsyncSession]


@asynccontextmanager
async def open_pools(settings: Settings) -> AsyncIterator[Pools]:
    """They connect on first use."""
    url, idle_seconds = settings.database_url, settings.idle_transaction_seconds
    async with AsyncExitStack() as stack:
        database = wall_off(
            open_async_database(
                url, pool_size=KEPT_WRITES, max_overflow=MAX_WRITES - KEPT_WRITES, idle_seconds=idle_seconds
            )
        )
        stack.push_async_callback(database.dispose)
        statements = wall_off(open_statement_database(url, pool_size=8, max_overflow=MAX_READS - 8))
        stack.push_async_callback(statements.dispose)
        system = open_statement_database(url, pool_size=8, max_overflow=MAX_SYSTEM_CONNECTIONS - 8)
        stack.push_async_callback(system.dispose)
        if settings.auth != "none":  # else there is only one tenant
            warn_of_gap(system)
        yield Pools(
            async_session_factory(database),
            async_session_factory(statements),
            async_session_factory(system.execution_options(isolation_level="READ COMMITTED")),
            async_session_factory(system),
        )
