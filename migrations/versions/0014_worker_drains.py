"""GPU workers that an operator has drained, by name."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute("""
    CREATE TABLE worker_drains (
        hostname text PRIMARY KEY,
        since timestamptz NOT NULL DEFAULT now(),
        release_after_seconds double precision NOT NULL
    );
    """)


def downgrade() -> None:
    op.execute("DROP TABLE worker_drains")
