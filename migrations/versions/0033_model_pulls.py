"""Models that administrators have asked for over HTTP; maintenance fetches them, one at a time."""

from alembic import op

revision = "0033"
down_revision = "0032"

UPGRADE = """
CREATE TABLE model_pulls (
    name text PRIMARY KEY,
    source text NOT NULL,
    accepts_licence boolean NOT NULL,
    status text NOT NULL CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled')),
    cancel_requested boolean NOT NULL DEFAULT false,
    step text NOT NULL DEFAULT '',
    num_bytes bigint NOT NULL DEFAULT 0,
    total_bytes bigint,
    error text,
    owner uuid,
    seen_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz
);

CREATE UNIQUE INDEX model_pulls_one_runs ON model_pulls ((true)) WHERE status = 'running';
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE model_pulls")
