"""How far the priority of a tenant's jobs counts among those of others."""

from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE tenants ADD COLUMN max_priority smallint NOT NULL DEFAULT 0
            CONSTRAINT tenants_max_priority_check CHECK (max_priority BETWEEN 0 AND 10)
    """)


def downgrade() -> None:
    op.execute("ALTER TABLE tenants DROP COLUMN max_priority")
