"""Whether the archive has jobs of a tenant, so that no erasure ends without looking into it."""

from alembic import op

revision = "0042"
down_revision = "0041"


def upgrade() -> None:
    op.execute("ALTER TABLE tenants ADD COLUMN IF NOT EXISTS archived_at timestamptz")


def downgrade() -> None:
    op.execute("ALTER TABLE tenants DROP COLUMN archived_at")
