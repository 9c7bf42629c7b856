"""The response cache: which job has the answer to a request, and jobs that follow another one."""

from alembic import op

revision = "0024"
down_revision = "0023"

TABLES = """
ALTER TABLE jobs ADD COLUMN answered_by uuid;

CREATE TABLE answers (
    tenant_id uuid NOT NULL,
    key bytea NOT NULL,
    job_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT answers_pkey PRIMARY KEY (tenant_id, key),
    CONSTRAINT answers_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE,
    CONSTRAINT answers_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE INDEX answers_job_id_idx ON answers (job_id);

CREATE TABLE job_followers (
    job_id uuid NOT NULL,
    leader_id uuid NOT NULL,
    CONSTRAINT job_followers_pkey PRIMARY KEY (job_id),
    CONSTRAINT job_followers_job_id_fkey FOREIGN KEY (job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE answers, job_followers; ALTER TABLE jobs DROP COLUMN answered_by")
