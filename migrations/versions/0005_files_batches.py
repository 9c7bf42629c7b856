"""Files with their content, batches, and the lines of unfinished batches."""

from alembic import op

revision = "0005"
down_revision = "0004"

TABLES = """
CREATE TABLE files (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    filename text NOT NULL,
    purpose text NOT NULL,
    status text NOT NULL,
    num_bytes bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    touched_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    CONSTRAINT files_pkey PRIMARY KEY (id),
    CONSTRAINT files_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT files_status_check CHECK (status IN ('uploading', 'live', 'processed')),
    CONSTRAINT files_purpose_check CHECK (purpose IN ('batch', 'batch_output'))
);
CREATE INDEX files_tenant_idx ON files (tenant_id, id DESC);
CREATE INDEX files_expires_idx ON files (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX files_uploading_idx ON files (touched_at) WHERE status = 'uploading';

CREATE TABLE file_pieces (
    file_id uuid NOT NULL,
    number integer NOT NULL,
    content bytea NOT NULL,
    CONSTRAINT file_pieces_pkey PRIMARY KEY (file_id, number),
    CONSTRAINT file_pieces_file_id_fkey FOREIGN KEY (file_id) REFERENCES files (id) ON DELETE CASCADE
);
-- Not compressed: a line is read without the rest of its piece.
ALTER TABLE file_pieces ALTER COLUMN content SET STORAGE EXTERNAL;

CREATE TABLE batches (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    status text NOT NULL DEFAULT 'validating',
    endpoint text NOT NULL,
    input_file_id uuid NOT NULL,
    completion_window text NOT NULL,
    metadata json NOT NULL,
    output_ttl_seconds integer NOT NULL,
    model text,
    errors json,
    output_file_id uuid,
    error_file_id uuid,
    num_bytes_read bigint NOT NULL DEFAULT 0,
    num_lines_read integer NOT NULL DEFAULT 0,
    num_lines integer NOT NULL DEFAULT 0,
    num_in_flight integer NOT NULL DEFAULT 0,
    num_completed integer NOT NULL DEFAULT 0,
    num_failed integer NOT NULL DEFAULT 0,
    num_frozen integer NOT NULL DEFAULT 0,
    prompt_tokens bigint NOT NULL DEFAULT 0,
    cached_tokens bigint NOT NULL DEFAULT 0,
    completion_tokens bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    in_progress_at timestamptz,
    finalizing_at timestamptz,
    completed_at timestamptz,
    failed_at timestamptz,
    expired_at timestamptz,
    cancelling_at timestamptz,
    cancelled_at timestamptz,
    CONSTRAINT batches_pkey PRIMARY KEY (id),
    CONSTRAINT batches_output_file_id_key UNIQUE (output_file_id),
    CONSTRAINT batches_error_file_id_key UNIQUE (error_file_id),
    CONSTRAINT batches_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT batches_status_check CHECK (status IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed',
        'expired', 'cancelling', 'cancelled'))
);
CREATE INDEX batches_tenant_idx ON batches (tenant_id, id DESC);
CREATE INDEX batches_unfinished_idx ON batches (tenant_id)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

CREATE TABLE batch_lines (
    batch_id uuid NOT NULL,
    line integer NOT NULL,
    custom_id text NOT NULL,
    first_byte bigint NOT NULL,
    num_bytes integer NOT NULL,
    prefix_hash bigint NOT NULL,
    num_sequences integer NOT NULL DEFAULT 1,
    job_id uuid,
    outcome text,
    refusal json,
    CONSTRAINT batch_lines_pkey PRIMARY KEY (batch_id, line),
    CONSTRAINT batch_lines_batch_id_custom_id_key UNIQUE (batch_id, custom_id),
    CONSTRAINT batch_lines_job_id_key UNIQUE (job_id),
    CONSTRAINT batch_lines_batch_id_fkey FOREIGN KEY (batch_id) REFERENCES batches (id) ON DELETE CASCADE,
    CONSTRAINT batch_lines_outcome_check CHECK (outcome IN ('completed', 'failed', 'expired', 'cancelled'))
);
CREATE INDEX batch_lines_waiting_idx ON batch_lines (batch_id, prefix_hash, line)
    WHERE job_id IS NULL AND outcome IS NULL;
CREATE INDEX batch_lines_in_flight_idx ON batch_lines (batch_id) WHERE job_id IS NOT NULL AND outcome IS NULL;
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE batch_lines, batches, file_pieces, files")
