"""The ledger: what each attempt at a job took, kept when the job is deleted."""

from alembic import op

revision = "0025"
down_revision = "0024"

UPGRADE = """
CREATE TABLE usage_records (
    tenant_id uuid NOT NULL,
    ended_at timestamptz NOT NULL,
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    outcome text NOT NULL,
    is_attempt boolean NOT NULL,
    is_end boolean NOT NULL,
    key_id text,
    model text NOT NULL,
    adapter text,
    kind text NOT NULL,
    is_batch boolean NOT NULL,
    num_prompt_tokens bigint NOT NULL,
    num_cached_tokens bigint NOT NULL,
    num_output_tokens bigint NOT NULL,
    num_reasoning_tokens bigint NOT NULL,
    queue_seconds double precision NOT NULL,
    prefill_seconds double precision NOT NULL,
    decode_seconds double precision NOT NULL,
    engine_seconds double precision NOT NULL,
    CONSTRAINT usage_records_pkey PRIMARY KEY (tenant_id, ended_at, job_id, attempt, outcome)
);
CREATE INDEX usage_records_ended_idx ON usage_records USING brin (ended_at);

ALTER TABLE jobs ADD COLUMN key_id text, ADD COLUMN engine_seconds real NOT NULL DEFAULT 0;
ALTER TABLE batches ADD COLUMN key_id text;
"""

DOWNGRADE = """
ALTER TABLE batches DROP COLUMN key_id;
ALTER TABLE jobs DROP COLUMN key_id, DROP COLUMN engine_seconds;
DROP TABLE usage_records;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
