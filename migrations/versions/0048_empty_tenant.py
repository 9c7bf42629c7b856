"""An empty celeriac.tenant_id is one that is not set.

Once a session has set it for a transaction, PostgreSQL shows it as empty ever after, also after RESET ALL and DISCARD
ALL. Behind a pooler, a session that has served the API's requests serves workers, maintenance or commands next: they
would see no rows at all.
"""

from time import sleep

from alembic import op
from psycopg.errors import LockNotAvailable
from sqlalchemy.exc import OperationalError

from domain.errors import ExpectedError

revision = "0048"
down_revision = "0047"

TENANT = "current_setting('celeriac.tenant_id', true)"

BY_TENANT = {"tenants": "id"} | dict.fromkeys(
    (
        "tenant_load",
        "api_keys",
        "jobs",
        "answers",
        "poison_requests",
        "usage_records",
        "usage_hours",
        "webhook_endpoints",
        "webhook_secrets",
        "webhook_deliveries",
        "limits",
        "limit_usage",
        "files",
        "batches",
        "conversations",
        "erasures",
        "metadata_entries",
    ),
    "tenant_id",
)

BY_PARENT = {
    "job_payloads": ("jobs", "job_id"),
    "job_chunks": ("jobs", "job_id"),
    "job_results": ("jobs", "job_id"),
    "job_attempts": ("jobs", "job_id"),
    "job_followers": ("jobs", "job_id"),
    "webhook_attempts": ("webhook_deliveries", "delivery_id"),
    "file_pieces": ("files", "file_id"),
    "batch_lines": ("batches", "batch_id"),
    "conversation_items": ("conversations", "conversation_id"),
    "conversation_turns": ("conversations", "conversation_id"),
}

OWNER_BY_TABLE = BY_TENANT | {
    table: f"(SELECT p.tenant_id FROM {parent} p WHERE p.id = {table}.{column})"
    for table, (parent, column) in BY_PARENT.items()
}


LOCK_SECONDS = 2  # for which everybody else may have to wait behind us

PAUSE_SECONDS = 1.0  # in which they get on

MAX_TRIES = 20  # per table: a minute


def _alter(sees_all: str) -> None:
    """Written as in 0031, so that the planner expects to find nearly all rows."""
    policies = {
        table: f"CASE WHEN {sees_all} THEN true WHEN {owner} = nullif({TENANT}, '')::uuid THEN true END IS NOT NULL"
        for table, owner in OWNER_BY_TABLE.items()
    }
    with op.get_context().autocommit_block():  # a lock on one table at a time
        for table, policy in (policies | {"audit_log": sees_all}).items():
            _alter_soon(table, policy)


def _alter_soon(table: str, policy: str) -> None:
    """A dump reads its tables for hours, and whoever comes after a lock that waits for it would wait as long."""
    for _ in range(MAX_TRIES):
        try:
            op.execute(f"""
                DO $$ BEGIN
                    PERFORM set_config('lock_timeout', '{LOCK_SECONDS}s', true);  -- until the end of this statement
                    ALTER POLICY of_tenant ON {table} USING ({policy});
                END $$
            """)
            return
        except OperationalError as exc:
            if not isinstance(exc.orig, LockNotAvailable):
                raise
        sleep(PAUSE_SECONDS)
    raise ExpectedError(
        f"a transaction, such as that of pg_dump, has been using the table {table} all the time; migrate again when it "
        "has ended: what has been done by then does no harm"
    )


def upgrade() -> None:
    _alter(f"nullif({TENANT}, '') IS NULL")


def downgrade() -> None:
    _alter(f"{TENANT} IS NULL")
