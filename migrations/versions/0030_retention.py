"""How long the finished jobs of a tenant are kept at most, and autovacuum for tables from which much is deleted."""

from alembic import op

revision = "0030"
down_revision = "0029"

TABLES = ("job_payloads", "job_chunks", "job_results", "file_pieces")


def upgrade() -> None:
    op.execute("""
        ALTER TABLE tenants ADD COLUMN retention_seconds integer NOT NULL DEFAULT 315360000
            CONSTRAINT tenants_retention_seconds_check CHECK (retention_seconds BETWEEN 60 AND 315360000)
    """)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} SET (autovacuum_vacuum_scale_factor = 0.02)")


def downgrade() -> None:
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} RESET (autovacuum_vacuum_scale_factor)")
    op.execute("ALTER TABLE tenants DROP COLUMN retention_seconds")
