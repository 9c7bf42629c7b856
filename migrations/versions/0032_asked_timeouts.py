"""The deadline that a client gave, apart from that at which its job expires; timeouts for all lines of a batch."""

from alembic import op

revision = "0032"
down_revision = "0031"

UPGRADE = """
ALTER TABLE jobs ADD COLUMN asked_deadline_at timestamptz;
ALTER TABLE batches ADD COLUMN start_timeout_seconds double precision, ADD COLUMN run_timeout_seconds double precision;
"""

DOWNGRADE = """
ALTER TABLE jobs DROP COLUMN asked_deadline_at;
ALTER TABLE batches DROP COLUMN start_timeout_seconds, DROP COLUMN run_timeout_seconds;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
