"""The history of attempts, poison requests, ageing in the queue, and the findings of maintenance.

The ready index orders each tenant's queue by when a job would have come, had every step of its priority made it come
ten minutes earlier: that order never changes while jobs wait, so that old ones rise without being touched.
"""

from alembic import op

revision = "0004"
down_revision = "0003"

UPGRADE = """
ALTER TABLE jobs
    ADD COLUMN attempt_started_at timestamptz,
    ADD COLUMN progressed_at timestamptz,
    ADD COLUMN num_tokens_at_claim integer NOT NULL DEFAULT 0,
    ADD COLUMN retry_of uuid;
UPDATE jobs SET attempt_started_at = started_at, progressed_at = statement_timestamp() WHERE status = 'in_progress';

DROP INDEX jobs_ready_idx;
CREATE INDEX jobs_ready_idx ON jobs
    (model, tenant_id, ((extract(epoch FROM available_at AT TIME ZONE 'UTC') - 600 * priority)), id)
    WHERE status = 'queued';
CREATE INDEX jobs_dead_idx ON jobs (tenant_id, id DESC) WHERE status = 'failed';

ALTER TABLE job_payloads ADD COLUMN fingerprint bytea;

CREATE TABLE job_attempts (
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    worker_id uuid NOT NULL,
    worker_name text,
    started_at timestamptz NOT NULL,
    ended_at timestamptz NOT NULL,
    outcome text NOT NULL,
    error_code text,
    num_tokens integer NOT NULL,
    CONSTRAINT job_attempts_pkey PRIMARY KEY (job_id, attempt),
    CONSTRAINT job_attempts_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE,
    CONSTRAINT job_attempts_outcome_check CHECK (outcome IN
        ('completed', 'failed', 'cancelled', 'expired', 'released', 'lost', 'crashed', 'stalled'))
);

CREATE TABLE poison_requests (
    tenant_id uuid NOT NULL,
    fingerprint bytea NOT NULL,
    job_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT poison_requests_pkey PRIMARY KEY (tenant_id, fingerprint),
    CONSTRAINT poison_requests_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);

CREATE TABLE maintenance_figures (
    name text NOT NULL,
    label text NOT NULL,
    value double precision NOT NULL,
    updated_at timestamptz NOT NULL,
    CONSTRAINT maintenance_figures_pkey PRIMARY KEY (name, label)
);
"""

DOWNGRADE = """
DROP TABLE maintenance_figures, poison_requests, job_attempts;
ALTER TABLE job_payloads DROP COLUMN fingerprint;
DROP INDEX jobs_dead_idx, jobs_ready_idx;
CREATE INDEX jobs_ready_idx ON jobs (model, tenant_id, priority DESC, available_at, id) WHERE status = 'queued';
ALTER TABLE jobs DROP COLUMN attempt_started_at, DROP COLUMN progressed_at, DROP COLUMN num_tokens_at_claim,
    DROP COLUMN retry_of;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
