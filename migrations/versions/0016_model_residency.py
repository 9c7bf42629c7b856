"""Workers with several models: the state of one that is not loaded at present, and how far a load has come."""

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.execute("""
    ALTER TABLE workers DROP CONSTRAINT workers_state_check, ADD CONSTRAINT workers_state_check
        CHECK (state IN ('loading', 'ready', 'draining', 'unloaded', 'standby'));
    ALTER TABLE workers ADD COLUMN load_percent smallint, ADD COLUMN ready_in_seconds double precision;
    """)


def downgrade() -> None:
    op.execute("""
    DELETE FROM workers WHERE state = 'standby';
    ALTER TABLE workers DROP CONSTRAINT workers_state_check, ADD CONSTRAINT workers_state_check
        CHECK (state IN ('loading', 'ready', 'draining', 'unloaded'));
    ALTER TABLE workers DROP COLUMN load_percent, DROP COLUMN ready_in_seconds;
    """)
