"""The place in a trace of the request that created a batch; spans of its lines link to it."""

from alembic import op

revision = "0040"
down_revision = "0038"


def upgrade() -> None:
    op.execute("ALTER TABLE batches ADD COLUMN traceparent text")


def downgrade() -> None:
    op.execute("ALTER TABLE batches DROP COLUMN traceparent")
