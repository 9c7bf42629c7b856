"""What the ledger records counts against the limits of tenants and keys."""

from alembic import op

revision = "0027"
down_revision = "0026"

# A trigger on the ledger and not a part of the statements that end jobs, since these are many. The rows are locked in
# order, as several ends may have jobs of the same tenants. A job that was deleted while it waited or ran gives nothing
# back. Output that a retry has taken over (chunks with the attempt 0) was paid for with the job that generated it.
UPGRADE = """
CREATE FUNCTION count_limit_usage() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    today date := (statement_timestamp() AT TIME ZONE 'UTC')::date;
BEGIN
    IF NOT EXISTS (SELECT FROM limit_usage) THEN
        RETURN NULL;
    END IF;
    PERFORM FROM limit_usage u
        WHERE EXISTS (SELECT FROM recorded r WHERE r.tenant_id = u.tenant_id AND u.key_id IN ('', r.key_id))
        ORDER BY u.tenant_id, u.key_id FOR NO KEY UPDATE;
    UPDATE limit_usage u SET
        tokens_on_day = CASE WHEN u.day = today THEN u.tokens_on_day ELSE 0 END + t.num_tokens,
        tokens_in_month = t.num_tokens + CASE
            WHEN date_trunc('month', u.day) = date_trunc('month', today) THEN u.tokens_in_month ELSE 0 END,
        num_unused_tokens = u.num_unused_tokens + t.num_unused,
        day = today
    FROM (
        SELECT l.tenant_id, l.key_id, sum(r.num_prompt_tokens + r.num_output_tokens) AS num_tokens,
            coalesce(sum(j.cost - CASE WHEN j.attempt > 0 THEN j.num_prompt_tokens + j.num_committed_tokens - (
                    SELECT coalesce(sum(json_array_length(coalesce(c.chunk->'token_ids', '[]'))), 0) FROM job_chunks c
                    WHERE c.job_id = j.id AND c.attempt = 0 AND j.retry_of IS NOT NULL) ELSE 0 END)
                FILTER (WHERE r.is_end), 0) AS num_unused
        FROM recorded r JOIN limit_usage l ON l.tenant_id = r.tenant_id AND l.key_id IN ('', r.key_id)
        LEFT JOIN jobs j ON j.id = r.job_id
        GROUP BY l.tenant_id, l.key_id
    ) t
    WHERE u.tenant_id = t.tenant_id AND u.key_id = t.key_id;
    RETURN NULL;
END
$$;
CREATE TRIGGER count_limit_usage AFTER INSERT ON usage_records REFERENCING NEW TABLE AS recorded
    FOR EACH STATEMENT EXECUTE FUNCTION count_limit_usage();
"""

DOWNGRADE = """
DROP TRIGGER count_limit_usage ON usage_records;
DROP FUNCTION count_limit_usage();
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
