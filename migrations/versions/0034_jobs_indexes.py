"""Indexes for millions of jobs: lists by status, and batch lines that wait to be let in."""

from alembic import op

revision = "0034"
down_revision = "0033"

RANK = "(EXTRACT(epoch FROM (available_at AT TIME ZONE 'UTC'::text)) - (600 * priority)::numeric)"


def upgrade() -> None:
    # An attempt that was interrupted leaves an index that is not valid.
    _create("jobs_status_idx", "(tenant_id, status, id DESC)")
    held = "status = 'queued' AND lane = 'standard' AND priority < -10 AND num_dispatches = 0"
    _create("jobs_held_idx", f"(model, tenant_id, {RANK}, id) WHERE {held}")
    _drop("jobs_dead_idx")


def downgrade() -> None:
    _create("jobs_dead_idx", "(tenant_id, id DESC) WHERE status = 'failed'")
    _drop("jobs_held_idx")
    _drop("jobs_status_idx")


def _create(name: str, columns: str) -> None:
    """Without a lock that writers wait for."""
    _drop(name)
    with op.get_context().autocommit_block():
        op.execute(f"CREATE INDEX CONCURRENTLY {name} ON jobs {columns}")


def _drop(name: str) -> None:
    with op.get_context().autocommit_block():
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
