"""APIs and maintenance processes report that they run; they and workers tell what they find wrong with themselves."""

from alembic import op

revision = "0037"
down_revision = "0035"

UPGRADE = """
ALTER TABLE workers ADD COLUMN troubles jsonb NOT NULL DEFAULT '{}';
CREATE TABLE processes (
    id uuid PRIMARY KEY,
    kind text NOT NULL,
    name text NOT NULL,
    release text NOT NULL,
    troubles jsonb NOT NULL DEFAULT '{}',
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now()
);
"""

DOWNGRADE = """
DROP TABLE processes;
ALTER TABLE workers DROP COLUMN troubles;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
