"""The second wall between tenants: on the API's connections, PostgreSQL itself hides the rows of other tenants.

Every statement names its tenant (`WHERE tenant_id = ...`), and that is the first wall. The second one is for the day on
which one forgets it. Each table of tenants' data has a policy that compares a row's tenant with a setting of the
session, SETTING (migration 0031):

| the session's setting                | it sees                                                                       |
|--------------------------------------|-------------------------------------------------------------------------------|
| not set                              | all tenants: workers, maintenance, commands, psql, `system` pools of the API  |
| NO_TENANT, as `wall_off` sets it     | none of any tenant                                                            |
| a tenant, set for one transaction    | that tenant's                                                                 |

docs/adr/0058 says why it is done this way.
"""

import logging
from typing import Any, Self

from psycopg import AsyncCursor
from psycopg.pq import TransactionStatus
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from domain.shares import NO_TENANT, current_tenant

log = logging.getLogger(__name__)

SETTING = "celeriac.tenant_id"

SET_FOR_SESSION = f"SELECT set_config('{SETTING}', '{NO_TENANT}', false)"

SET_FOR_TRANSACTION = f"SELECT set_config('{SETTING}', %s, true)"

# One row: why PostgreSQL does not enforce the policies for this role, or NULL if it does.
GAP = """
SELECT CASE
    WHEN (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN format('%I is a superuser', current_user)
    WHEN (SELECT rolbypassrls FROM pg_roles WHERE rolname = current_user) THEN format('%I has BYPASSRLS', current_user)
    WHEN count(*) = 0 THEN 'the schema has no policies'
    WHEN NOT bool_and(is_active) THEN 'it is switched off for '
        || string_agg(name, ', ' ORDER BY name) FILTER (WHERE NOT is_active)
END FROM (
    SELECT polrelid::regclass::text AS name, row_security_active(polrelid) AS is_active
    FROM pg_policy WHERE polname = 'of_tenant'
) policies
"""

REMEDY = "let Celeriac connect as a role of its own that owns its tables and has neither SUPERUSER nor BYPASSRLS"


class TenantCursor(AsyncCursor[Any]):
    """Runs each transaction as `current_tenant`. The setting travels with the first statement, in one round trip."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        if self.connection.info.transaction_status is not TransactionStatus.IDLE:
            return await super().execute(query, params, **options)
        async with self.connection.pipeline():  # one transaction, even where each statement commits
            await self._set_tenant()
            await super().execute(query, params, **options)
        return self

    async def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
        if self.connection.info.transaction_status is not TransactionStatus.IDLE:
            return await super().executemany(query, params_seq, **options)
        async with self.connection.pipeline():
            await self._set_tenant()
            await super().executemany(query, params_seq, **options)

    async def _set_tenant(self) -> None:
        await AsyncCursor(self.connection).execute(SET_FOR_TRANSACTION, (str(current_tenant.get()),))


def wall_off(database: AsyncEngine) -> AsyncEngine:
    """Let the connections of this pool, which has none yet, see only rows of `current_tenant`."""

    @event.listens_for(database.sync_engine, "connect")
    def set_up(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(SET_FOR_SESSION)
        cursor.close()
        connection.commit()  # a rollback would undo it
        connection.driver_connection.cursor_factory = TenantCursor

    return database


def warn_of_gap(database: AsyncEngine) -> None:
    """Log once, at the first connection of this pool, if row-level security is not in force on it."""

    @event.listens_for(database.sync_engine, "first_connect")
    def look(connection: Any, record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(GAP)
        [reason] = cursor.fetchone()
        cursor.close()
        connection.commit()
        if reason is not None:
            log.warning("row-level security is not in force; %s", REMEDY, extra={"reason": reason})
