"""A worker says which release it runs, so that one of another release is named."""

from alembic import op

revision = "0043"
down_revision = "0042"


def upgrade() -> None:
    op.execute("ALTER TABLE workers ADD COLUMN IF NOT EXISTS release text")


def downgrade() -> None:
    op.execute("ALTER TABLE workers DROP COLUMN release")
