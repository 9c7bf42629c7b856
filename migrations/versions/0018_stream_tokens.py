"""The key that signs a tenant's stream tokens."""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    # 122 random bits for each tenant. A new process of the last release, which does not name the column, sets it, too.
    op.execute("ALTER TABLE tenants ADD COLUMN signing_key uuid NOT NULL DEFAULT gen_random_uuid()")


def downgrade() -> None:
    op.execute("ALTER TABLE tenants DROP COLUMN signing_key")
