"""Jobs by model, by key and by metadata: indexes, and a table of entries that triggers keep (ADR 69).

Triggers, so that jobs of the last release's processes have their entries too. They come first and the entries of older
jobs after them, in short transactions; what is done twice does no harm.
"""

from alembic import op

revision = "0041"
down_revision = "0040"

TENANT = "current_setting('celeriac.tenant_id', true)"

POLICY = f"CASE WHEN {TENANT} IS NULL THEN true WHEN tenant_id = nullif({TENANT}, '')::uuid THEN true END IS NOT NULL"

# As `entry_of` in storage/job_metadata.py. JSON with an escaped NUL cannot be read, so it has no entries.
ENTRY = "md5(length(m.key) || ':' || m.key || m.value)::uuid"
HAS_NO_NUL = r"strpos({job}.metadata::text, '\u0000') = 0"

# The array has an index scan chosen also where the table has no statistics. Sessions plan each statement anew, which here
# would be done for each row.
FUNCTION = rf"""
CREATE OR REPLACE FUNCTION enter_metadata() RETURNS trigger LANGUAGE plpgsql SET plan_cache_mode = auto AS $$
BEGIN
    IF TG_OP <> 'INSERT' AND {HAS_NO_NUL.format(job="OLD")} THEN
        DELETE FROM metadata_entries e WHERE e.tenant_id = OLD.tenant_id AND e.job_id = OLD.id
            AND e.entry = ANY (ARRAY(SELECT {ENTRY} FROM json_each_text(OLD.metadata) m));
    END IF;
    IF TG_OP <> 'DELETE' AND {HAS_NO_NUL.format(job="NEW")} THEN
        INSERT INTO metadata_entries (tenant_id, entry, job_id)
        SELECT NEW.tenant_id, {ENTRY}, NEW.id FROM json_each_text(NEW.metadata) m ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$
"""

TRIGGERS = {
    "jobs_metadata_added": "INSERT ON jobs FOR EACH ROW WHEN (NEW.metadata::text <> '{}')",
    "jobs_metadata_changed": "UPDATE OF metadata ON jobs FOR EACH ROW",
    "jobs_metadata_deleted": "DELETE ON jobs FOR EACH ROW WHEN (OLD.metadata::text <> '{}')",
}

INDEXES = {
    "jobs_model_idx": "(tenant_id, model, id DESC)",
    "jobs_key_idx": "(tenant_id, key_id) WHERE status = 'queued' AND key_id IS NOT NULL",
}

NUM_AT_ONCE = 10_000

# The jobs are locked against being deleted, so that no entry outlives its job.
ENTER = rf"""
WITH stored AS MATERIALIZED (
    SELECT id, tenant_id, metadata FROM jobs j WHERE id > '{{after}}' ORDER BY id LIMIT {NUM_AT_ONCE} FOR KEY SHARE
),
entered AS (
    INSERT INTO metadata_entries (tenant_id, entry, job_id)
    SELECT j.tenant_id, {ENTRY}, j.id FROM stored j CROSS JOIN LATERAL json_each_text(
        CASE WHEN {HAS_NO_NUL.format(job="j")} THEN j.metadata ELSE '{{{{}}}}' END) m ON CONFLICT DO NOTHING
)
SELECT id FROM stored ORDER BY id DESC LIMIT 1
"""


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for name, columns in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")  # of an attempt that was interrupted
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON jobs {columns}")
        op.execute("""
            CREATE TABLE IF NOT EXISTS metadata_entries (
                tenant_id uuid NOT NULL, entry uuid NOT NULL, job_id uuid NOT NULL,
                CONSTRAINT metadata_entries_pkey PRIMARY KEY (tenant_id, entry, job_id)
            ) WITH (autovacuum_vacuum_scale_factor = 0.02)
        """)
        op.execute("DROP POLICY IF EXISTS of_tenant ON metadata_entries")
        op.execute(f"CREATE POLICY of_tenant ON metadata_entries USING ({POLICY})")
        op.execute("ALTER TABLE metadata_entries FORCE ROW LEVEL SECURITY")
        op.execute("ALTER TABLE metadata_entries ENABLE ROW LEVEL SECURITY")
        op.execute(FUNCTION)
        for name, event in TRIGGERS.items():
            op.execute(f"CREATE OR REPLACE TRIGGER {name} AFTER {event} EXECUTE FUNCTION enter_metadata()")
        _enter_all()
        op.execute("ANALYZE metadata_entries")


def _enter_all() -> None:
    after: str | None = "00000000-0000-0000-0000-000000000000"
    while after is not None:
        after = op.get_bind().exec_driver_sql(ENTER.format(after=after)).scalar()


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for name in TRIGGERS:
            op.execute(f"DROP TRIGGER IF EXISTS {name} ON jobs")
        op.execute("DROP FUNCTION IF EXISTS enter_metadata()")
        op.execute("DROP TABLE IF EXISTS metadata_entries")
        for name in INDEXES:
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
