"""Scopes and limits of keys, limits of tenants, tenants that are disabled, and a log of what administrators change."""

from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE tenants ADD COLUMN disabled_at timestamptz;
        -- Without `admin`, which is the column is_admin: processes of the last release read and write that one.
        ALTER TABLE api_keys ADD COLUMN scopes text[] NOT NULL DEFAULT '{submit,read,cancel}';
        CREATE TABLE audit_log (
            id uuid PRIMARY KEY,
            changed_at timestamptz NOT NULL DEFAULT now(),
            actor text NOT NULL,
            action text NOT NULL,
            tenant text NOT NULL,
            key_id text,
            changes json NOT NULL
        );
        CREATE TABLE limits (
            tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,
            key_id text NOT NULL,
            requests_per_minute bigint,
            tokens_per_minute bigint,
            queued_jobs bigint,
            unfinished_jobs bigint,
            queued_tokens bigint,
            streams bigint,
            tokens_per_day bigint,
            tokens_per_month bigint,
            requests_level double precision,
            tokens_level double precision,
            refilled_at timestamptz NOT NULL DEFAULT now(),
            num_returned_tokens bigint NOT NULL DEFAULT 0,
            PRIMARY KEY (tenant_id, key_id)
        );
        CREATE TABLE limit_usage (
            tenant_id uuid NOT NULL,
            key_id text NOT NULL,
            day date NOT NULL DEFAULT (now() AT TIME ZONE 'UTC')::date,
            tokens_on_day bigint NOT NULL DEFAULT 0,
            tokens_in_month bigint NOT NULL DEFAULT 0,
            num_unused_tokens bigint NOT NULL DEFAULT 0,
            PRIMARY KEY (tenant_id, key_id),
            FOREIGN KEY (tenant_id, key_id) REFERENCES limits (tenant_id, key_id) ON DELETE CASCADE
        );
    """)


def downgrade() -> None:
    op.execute("""
        DROP TABLE limit_usage;
        DROP TABLE limits;
        DROP TABLE audit_log;
        ALTER TABLE api_keys DROP COLUMN scopes;
        ALTER TABLE tenants DROP COLUMN disabled_at;
    """)
