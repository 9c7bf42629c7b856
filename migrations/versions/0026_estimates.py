"""Estimates of starts and ends, made when a job is accepted, and how they compare with what came."""

from alembic import op

revision = "0026"
down_revision = "0025"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE jobs ADD COLUMN eta real[];
        ALTER TABLE usage_records ADD COLUMN num_allowed_tokens bigint NOT NULL DEFAULT 0,
            ADD COLUMN eta_start_seconds real, ADD COLUMN eta_end_seconds real;
        CREATE INDEX usage_records_model_idx ON usage_records (model, ended_at) WHERE is_attempt AND NOT is_batch;
    """)


def downgrade() -> None:
    op.execute("""
        DROP INDEX usage_records_model_idx;
        ALTER TABLE usage_records DROP COLUMN num_allowed_tokens, DROP COLUMN eta_start_seconds,
            DROP COLUMN eta_end_seconds;
        ALTER TABLE jobs DROP COLUMN eta;
    """)
