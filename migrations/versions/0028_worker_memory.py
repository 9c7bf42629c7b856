"""How full a worker's cache is and how much memory its engine holds, as it reports them."""

from alembic import op

revision = "0028"
down_revision = "0027"


def upgrade() -> None:
    op.execute("ALTER TABLE workers ADD COLUMN cache_usage real, ADD COLUMN memory_bytes bigint")


def downgrade() -> None:
    op.execute("ALTER TABLE workers DROP COLUMN cache_usage, DROP COLUMN memory_bytes")
