"""Indexes of few of the jobs: those that continue earlier output, and lines of batches by their keys."""

from alembic import op

revision = "0035"
down_revision = "0034"


def upgrade() -> None:
    # An attempt that was interrupted leaves an index that is not valid.
    begun = "status = 'queued' AND (attempt > 0 OR retry_of IS NOT NULL)"
    _create("jobs_begun_idx", f"(model, model_revision) WHERE {begun}")
    _create("jobs_lines_idx", "(tenant_id, idempotency_key text_pattern_ops) WHERE priority < -10")


def downgrade() -> None:
    _drop("jobs_lines_idx")
    _drop("jobs_begun_idx")


def _create(name: str, columns: str) -> None:
    """Without a lock that writers wait for."""
    _drop(name)
    with op.get_context().autocommit_block():
        op.execute(f"CREATE INDEX CONCURRENTLY {name} ON jobs {columns}")


def _drop(name: str) -> None:
    with op.get_context().autocommit_block():
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
