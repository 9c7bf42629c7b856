"""When the first token of a job was committed, for the statistics in /health."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN first_token_at timestamptz;")


def downgrade() -> None:
    op.execute("ALTER TABLE jobs DROP COLUMN first_token_at;")
