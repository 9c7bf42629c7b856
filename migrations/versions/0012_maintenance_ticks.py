"""The last tick of each maintenance clock, and how often a batch's step has failed in the same way."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.execute("""
CREATE TABLE maintenance_ticks (
    clock text NOT NULL,
    ticked_at timestamptz NOT NULL,
    CONSTRAINT maintenance_ticks_pkey PRIMARY KEY (clock)
);
ALTER TABLE batches ADD COLUMN step_failure text, ADD COLUMN num_step_failures integer NOT NULL DEFAULT 0;
""")


def downgrade() -> None:
    op.execute("""
DROP TABLE maintenance_ticks;
ALTER TABLE batches DROP COLUMN step_failure, DROP COLUMN num_step_failures;
""")
