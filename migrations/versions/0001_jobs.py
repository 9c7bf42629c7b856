"""Tenants, keys, jobs with their payloads, chunks and results, workers.

Self-contained: it must still run when the row classes have long moved on.
"""

from alembic import op

revision = "0001"
down_revision = None

TABLES = """
CREATE TABLE tenants (
    id uuid NOT NULL,
    name text NOT NULL,
    max_queued integer,
    weight real NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tenants_pkey PRIMARY KEY (id),
    CONSTRAINT tenants_name_key UNIQUE (name),
    CONSTRAINT tenants_weight_check CHECK (weight > 0)
);

CREATE TABLE tenant_load (
    tenant_id uuid NOT NULL,
    num_queued integer NOT NULL DEFAULT 0,
    num_running integer NOT NULL DEFAULT 0,
    virtual_time double precision NOT NULL DEFAULT 0,
    CONSTRAINT tenant_load_pkey PRIMARY KEY (tenant_id),
    CONSTRAINT tenant_load_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT tenant_load_num_queued_check CHECK (num_queued >= 0),
    CONSTRAINT tenant_load_num_running_check CHECK (num_running >= 0)
) WITH (fillfactor = 50);

CREATE TABLE api_keys (
    id text NOT NULL,
    tenant_id uuid NOT NULL,
    secret_sha256 bytea NOT NULL,
    name text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    CONSTRAINT api_keys_pkey PRIMARY KEY (id),
    CONSTRAINT api_keys_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);

CREATE TABLE jobs (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    model text NOT NULL,
    model_revision text NOT NULL,
    lane text NOT NULL DEFAULT 'standard',
    priority smallint NOT NULL DEFAULT 0,
    idempotency_key text,
    request_hash bytea NOT NULL,
    status text NOT NULL DEFAULT 'queued',
    attempt integer NOT NULL DEFAULT 0,
    num_failures integer NOT NULL DEFAULT 0,
    max_failures integer NOT NULL,
    num_suspicions integer NOT NULL DEFAULT 0,
    available_at timestamptz NOT NULL DEFAULT now(),
    start_deadline_at timestamptz,
    deadline_at timestamptz,
    run_timeout_seconds double precision,
    dispatch_at timestamptz NOT NULL DEFAULT now(),
    num_dispatches integer NOT NULL DEFAULT 0,
    lease_owner uuid,
    lease_expires_at timestamptz,
    cancel_requested_at timestamptz,
    committed_sequence_number integer NOT NULL DEFAULT 0,
    num_committed_tokens integer NOT NULL DEFAULT 0,
    num_prompt_tokens integer NOT NULL,
    max_tokens integer NOT NULL,
    seed bigint NOT NULL,
    cost integer NOT NULL,
    finish_reason text,
    error json,
    metadata json NOT NULL,
    result_ttl_seconds integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    prune_at timestamptz,
    CONSTRAINT jobs_pkey PRIMARY KEY (id),
    CONSTRAINT jobs_tenant_id_idempotency_key_key UNIQUE (tenant_id, idempotency_key),
    CONSTRAINT jobs_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT jobs_status_check
        CHECK (status IN ('queued', 'in_progress', 'completed', 'failed', 'cancelled', 'expired')),
    CONSTRAINT jobs_lease_owner_check CHECK ((status = 'in_progress') = (lease_owner IS NOT NULL)),
    CONSTRAINT jobs_finished_at_check CHECK ((status IN ('queued', 'in_progress')) = (finished_at IS NULL))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX jobs_ready_idx ON jobs (model, tenant_id, priority DESC, available_at, id) WHERE status = 'queued';
CREATE INDEX jobs_running_idx ON jobs (lease_owner) WHERE status = 'in_progress';
CREATE INDEX jobs_tenant_idx ON jobs (tenant_id, id DESC);
CREATE INDEX jobs_deadline_idx ON jobs (LEAST(deadline_at, start_deadline_at))
    WHERE status = 'queued' AND LEAST(deadline_at, start_deadline_at) IS NOT NULL;
CREATE INDEX jobs_prune_idx ON jobs (prune_at) WHERE prune_at IS NOT NULL;

CREATE TABLE job_payloads (
    job_id uuid NOT NULL,
    request json NOT NULL,
    prompt_token_ids integer[] NOT NULL,
    CONSTRAINT job_payloads_pkey PRIMARY KEY (job_id),
    CONSTRAINT job_payloads_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

CREATE TABLE job_chunks (
    job_id uuid NOT NULL,
    sequence_number integer NOT NULL,
    attempt integer NOT NULL,
    chunk json NOT NULL,
    CONSTRAINT job_chunks_pkey PRIMARY KEY (job_id, sequence_number),
    CONSTRAINT job_chunks_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

CREATE TABLE job_results (
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    result json NOT NULL,
    CONSTRAINT job_results_pkey PRIMARY KEY (job_id),
    CONSTRAINT job_results_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);

CREATE TABLE workers (
    id uuid NOT NULL,
    hostname text NOT NULL,
    model text NOT NULL,
    max_num_seqs integer NOT NULL,
    num_running integer NOT NULL DEFAULT 0,
    tokens_per_second double precision NOT NULL DEFAULT 0,
    is_draining boolean NOT NULL DEFAULT false,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT workers_pkey PRIMARY KEY (id)
);

INSERT INTO tenants (id, name) VALUES ('00000000-0000-7000-8000-000000000001', 'default');
INSERT INTO tenant_load (tenant_id) VALUES ('00000000-0000-7000-8000-000000000001');
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE workers, job_results, job_chunks, job_payloads, jobs, api_keys, tenant_load, tenants")
