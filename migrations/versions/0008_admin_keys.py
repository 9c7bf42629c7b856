"""The admin role of keys. Existing keys do not have it."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE api_keys ADD COLUMN is_admin boolean NOT NULL DEFAULT false;")


def downgrade() -> None:
    op.execute("ALTER TABLE api_keys DROP COLUMN is_admin;")
