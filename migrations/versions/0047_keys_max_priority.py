"""How far the priority of jobs sent with a key counts among those of other tenants."""

from alembic import op

revision = "0047"
down_revision = "0046"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE api_keys ADD COLUMN IF NOT EXISTS max_priority smallint NOT NULL DEFAULT 10
            CONSTRAINT api_keys_max_priority_check CHECK (max_priority BETWEEN 0 AND 10)
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE api_keys DROP COLUMN max_priority")
