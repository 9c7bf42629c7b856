"""The route through which a job was submitted, whether that route lists it, and whether its answer was delivered.

The defaults make every older job a native one, which no index of this migration holds.
"""

from alembic import op

revision = "0003"
down_revision = "0002"

STATEMENTS = """
ALTER TABLE jobs ADD COLUMN endpoint text NOT NULL DEFAULT 'jobs';
ALTER TABLE jobs ADD COLUMN is_stored boolean NOT NULL DEFAULT false;
ALTER TABLE jobs ADD COLUMN delivered_at timestamptz;
CREATE INDEX jobs_request_hash_idx ON jobs (tenant_id, request_hash) WHERE endpoint <> 'jobs';
CREATE INDEX jobs_stored_idx ON jobs (tenant_id, endpoint, id DESC) WHERE is_stored;
"""


def upgrade() -> None:
    op.execute(STATEMENTS)


def downgrade() -> None:
    op.execute("DROP INDEX jobs_stored_idx; DROP INDEX jobs_request_hash_idx;")
    op.execute("ALTER TABLE jobs DROP COLUMN delivered_at, DROP COLUMN is_stored, DROP COLUMN endpoint;")
