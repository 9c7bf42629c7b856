"""Erasures of users that administrators have asked for; maintenance does them, step by step."""

from alembic import op

revision = "0038"
down_revision = "0037"

TENANT = "current_setting('celeriac.tenant_id', true)"

# As in 0031.
POLICY = f"CASE WHEN {TENANT} IS NULL THEN true WHEN tenant_id = nullif({TENANT}, '')::uuid THEN true END IS NOT NULL"

UPGRADE = f"""
CREATE TABLE erasures (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants ON DELETE CASCADE,
    key_id text,
    metadata_name text,
    metadata_value text,
    actor text NOT NULL,
    step text NOT NULL DEFAULT 'batches' CHECK (step IN ('batches', 'jobs', 'conversations', 'archive', 'done')),
    after uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    due_at timestamptz NOT NULL DEFAULT now(),
    num_jobs integer NOT NULL DEFAULT 0,
    num_batches integer NOT NULL DEFAULT 0,
    num_conversations integer NOT NULL DEFAULT 0,
    num_archived_jobs integer NOT NULL DEFAULT 0,
    num_unfinished_batches integer NOT NULL DEFAULT 0,
    file_ids uuid[] NOT NULL DEFAULT '{{}}',
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    CONSTRAINT erasures_finished_at_check CHECK ((step = 'done') = (finished_at IS NOT NULL)),
    CONSTRAINT erasures_metadata_value_check CHECK (step <> 'done' OR metadata_value IS NULL)
);

CREATE INDEX erasures_tenant_idx ON erasures (tenant_id, id DESC);
CREATE INDEX erasures_due_idx ON erasures (due_at) WHERE step <> 'done';
CREATE UNIQUE INDEX erasures_one_of_each ON erasures (tenant_id, key_id, metadata_name, metadata_value)
    NULLS NOT DISTINCT WHERE step <> 'done';

CREATE POLICY of_tenant ON erasures USING ({POLICY});
ALTER TABLE erasures FORCE ROW LEVEL SECURITY;
ALTER TABLE erasures ENABLE ROW LEVEL SECURITY;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE erasures")
