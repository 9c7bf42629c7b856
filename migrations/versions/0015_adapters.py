"""The LoRA adapter that a job asks for."""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.execute("ALTER TABLE jobs ADD COLUMN adapter text")


def downgrade() -> None:
    op.execute("ALTER TABLE jobs DROP COLUMN adapter")
