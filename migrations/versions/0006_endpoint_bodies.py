"""The body of a request, for the routes that return it again."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("ALTER TABLE job_payloads ADD COLUMN endpoint_body json;")


def downgrade() -> None:
    op.execute("ALTER TABLE job_payloads DROP COLUMN endpoint_body;")
