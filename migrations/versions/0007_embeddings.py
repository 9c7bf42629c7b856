"""Embedding jobs, whose payload also has the length of each input."""

from alembic import op

revision = "0007"
down_revision = "0006"

STATEMENTS = """
ALTER TABLE jobs ADD COLUMN kind text NOT NULL DEFAULT 'generation',
    ADD CONSTRAINT jobs_kind_check CHECK (kind IN ('generation', 'embedding'));
ALTER TABLE job_payloads ADD COLUMN input_lengths integer[];
"""


def upgrade() -> None:
    op.execute(STATEMENTS)


def downgrade() -> None:
    op.execute("ALTER TABLE job_payloads DROP COLUMN input_lengths")
    op.execute("ALTER TABLE jobs DROP COLUMN kind")
