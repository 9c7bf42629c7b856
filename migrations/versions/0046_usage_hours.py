"""The ledger summed up by hours, from the hour of its oldest record on; maintenance fills it."""

from alembic import op

revision = "0046"
down_revision = "0045"

TENANT = "current_setting('celeriac.tenant_id', true)"

POLICY = f"CASE WHEN {TENANT} IS NULL THEN true WHEN tenant_id = nullif({TENANT}, '')::uuid THEN true END IS NOT NULL"

UPGRADE = f"""
CREATE TABLE IF NOT EXISTS usage_hours (
    tenant_id uuid NOT NULL,
    hour timestamptz NOT NULL,
    key_id text NOT NULL,
    model text NOT NULL,
    adapter text NOT NULL,
    kind text NOT NULL,
    is_batch boolean NOT NULL,
    num_jobs bigint NOT NULL,
    num_attempts bigint NOT NULL,
    num_prompt_tokens bigint NOT NULL,
    num_cached_tokens bigint NOT NULL,
    num_output_tokens bigint NOT NULL,
    num_reasoning_tokens bigint NOT NULL,
    queue_seconds double precision NOT NULL,
    prefill_seconds double precision NOT NULL,
    decode_seconds double precision NOT NULL,
    engine_seconds double precision NOT NULL,
    CONSTRAINT usage_hours_pkey PRIMARY KEY (tenant_id, hour, key_id, model, adapter, kind, is_batch)
);
CREATE INDEX IF NOT EXISTS usage_hours_hour_idx ON usage_hours (hour);
CREATE TABLE IF NOT EXISTS usage_closing (
    id smallint DEFAULT 1 NOT NULL,
    closed_from timestamptz NOT NULL,
    closed_until timestamptz NOT NULL,
    CONSTRAINT usage_closing_pkey PRIMARY KEY (id),
    CONSTRAINT usage_closing_id_check CHECK (id = 1)
);
INSERT INTO usage_closing (closed_from, closed_until)
SELECT oldest, oldest FROM (
    SELECT to_timestamp(3600 * floor(extract(epoch FROM coalesce(min(ended_at), now())) / 3600)) AS oldest
    FROM usage_records) o ON CONFLICT DO NOTHING;
ALTER TABLE usage_hours ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_hours FORCE ROW LEVEL SECURITY;
DROP POLICY IF EXISTS of_tenant ON usage_hours;
CREATE POLICY of_tenant ON usage_hours USING ({POLICY});
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE usage_hours, usage_closing")
