"""The place in a trace of the HTTP request that submitted a job."""

from alembic import op

revision = "0029"
down_revision = "0028"


def upgrade() -> None:
    op.execute("ALTER TABLE job_payloads ADD COLUMN traceparent text")


def downgrade() -> None:
    op.execute("ALTER TABLE job_payloads DROP COLUMN traceparent")
