"""The second wall between tenants: on the API's connections, PostgreSQL itself hides the rows of other tenants.

Every statement names its tenant (`WHERE tenant_id = ...`), and that is the first wall. The second one is for the day on
which one forgets it. Each table of tenants' data has a policy that compares a row's tenant with a setting of the
session, SETTING (migration 0031):

| the session's setting                | it sees                                                                       |
|--------------------------------------|-------------------------------------------------------------------------------|
| not set, or empty                    | all tenants: workers, maintenance, commands, psql, `system` pools of the API  |
| NO_TENANT, as `wall_off` sets it     | none of any tenant                                                            |
| a tenant, set for one transaction    | that tenant's                                                                 |

Empty is what PostgreSQL shows of a setting that was set for a transaction before (migration 0048).
docs/adr/0058 says why it is done this way.
"""

import logging
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from domain.shares import NO_TENANT, current_tenant
from storage.session_settings import CarriedSettings, carried_settings, carry, keeps_sessions, set_for_connections

log = logging.getLogger(__name__)

SETTING = "celeriac.tenant_id"

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


def wall_off(database: AsyncEngine) -> AsyncEngine:
    """Let the connections of this pool, which has none yet, see only rows of `current_tenant`. It travels with each
    transaction, in the round trip of its first statement."""
    engine = database.sync_engine
    if keeps_sessions(engine):
        set_for_connections(engine, {SETTING: str(NO_TENANT)})
        carry(engine, CarriedSettings({SETTING: _tenant}))
    else:
        carried_settings(engine)[SETTING] = _tenant
    return database


def _tenant() -> str:
    return str(current_tenant.get())


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
