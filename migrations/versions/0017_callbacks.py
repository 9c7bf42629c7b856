"""The Celery message that continues a task when its job has ended."""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.execute("ALTER TABLE job_payloads ADD COLUMN callback json")


def downgrade() -> None:
    op.execute("ALTER TABLE job_payloads DROP COLUMN callback")
