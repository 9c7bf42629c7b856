"""Models that an admin has unloaded, and the state of each worker instead of whether it is draining."""

from alembic import op

revision = "0009"
down_revision = "0008"

STATEMENTS = """
CREATE TABLE model_states (
    model text PRIMARY KEY,
    is_loaded boolean NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE workers DROP COLUMN is_draining, ADD COLUMN state text NOT NULL DEFAULT 'ready',
    ADD CONSTRAINT workers_state_check CHECK (state IN ('loading', 'ready', 'draining', 'unloaded'));
"""


def upgrade() -> None:
    op.execute(STATEMENTS)


def downgrade() -> None:
    op.execute("ALTER TABLE workers DROP COLUMN state, ADD COLUMN is_draining boolean NOT NULL DEFAULT false")
    op.execute("DROP TABLE model_states")
