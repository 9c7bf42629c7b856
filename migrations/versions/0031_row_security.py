"""Row-level security on every table of tenants' data: see storage/row_security.py.

A session that has not set celeriac.tenant_id sees everything, so the processes of the last release, which never set it,
work on. Each table is changed in a transaction of its own: to lock all of them in one could be a deadlock with running
transactions. What is done twice does no harm.
"""

from alembic import op

revision = "0031"
down_revision = "0030"

TENANT = "current_setting('celeriac.tenant_id', true)"

# Written so that the planner expects to find nearly all rows (as of every `IS NOT NULL` of an expression), which is so
# in the sessions that see everything; OR would be taken to find next to none, and joins would be planned accordingly.
# No subqueries for the setting: they would be planned again for each table of each statement.
POLICY = (
    f"CASE WHEN {TENANT} IS NULL THEN true WHEN {{tenant_id}} = nullif({TENANT}, '')::uuid THEN true END IS NOT NULL"
)

BY_TENANT = {"tenants": "id"} | dict.fromkeys(
    (
        "tenant_load",
        "api_keys",
        "jobs",
        "answers",
        "poison_requests",
        "usage_records",
        "webhook_endpoints",
        "webhook_secrets",
        "webhook_deliveries",
        "limits",
        "limit_usage",
        "files",
        "batches",
        "conversations",
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

POLICY_BY_TABLE = (
    {table: POLICY.format(tenant_id=column) for table, column in BY_TENANT.items()}
    | {
        table: POLICY.format(tenant_id=f"(SELECT p.tenant_id FROM {parent} p WHERE p.id = {table}.{column})")
        for table, (parent, column) in BY_PARENT.items()
    }
    | {"audit_log": f"{TENANT} IS NULL"}  # which names tenants, for administrators
)


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for table, policy in POLICY_BY_TABLE.items():
            op.execute(f"DROP POLICY IF EXISTS of_tenant ON {table}")
            op.execute(f"CREATE POLICY of_tenant ON {table} USING ({policy})")
            op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")  # for the owner too, which Celeriac usually is
            op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for table in POLICY_BY_TABLE:
            op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
            op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
            op.execute(f"DROP POLICY IF EXISTS of_tenant ON {table}")
