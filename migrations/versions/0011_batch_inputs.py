"""The number of embedding inputs of a batch, which is limited."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute("ALTER TABLE batches ADD COLUMN num_inputs integer NOT NULL DEFAULT 0;")


def downgrade() -> None:
    op.execute("ALTER TABLE batches DROP COLUMN num_inputs;")
