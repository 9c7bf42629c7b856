"""An index of pending webhook deliveries by host and tenant, so that tenants take turns at a host."""

from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    # webhook_deliveries_due_idx stays for senders of the last release.
    op.execute("""
        CREATE INDEX webhook_deliveries_turn_idx ON webhook_deliveries (host, tenant_id, next_attempt_at)
        WHERE status = 'pending'
    """)


def downgrade() -> None:
    op.execute("DROP INDEX webhook_deliveries_turn_idx")
