"""The revision that a worker serves, where a job started over, and the id of a job's request, for the logs."""

from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.execute("""
    ALTER TABLE jobs ADD COLUMN reset_sequence_number integer NOT NULL DEFAULT 0;
    ALTER TABLE workers ADD COLUMN model_revision text;
    ALTER TABLE job_payloads ADD COLUMN request_id text;
    """)


def downgrade() -> None:
    op.execute("""
    ALTER TABLE job_payloads DROP COLUMN request_id;
    ALTER TABLE workers DROP COLUMN model_revision;
    ALTER TABLE jobs DROP COLUMN reset_sequence_number;
    """)
