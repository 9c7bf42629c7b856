"""How many tokens the queued jobs of each tenant may take, and what its running ones have not taken yet.

The former is counted here for tenants that have a limit on it. Maintenance counts it again, and the latter, as long as
processes of the last release change jobs without it.
"""

from alembic import op

revision = "0045"
down_revision = "0043"

UPGRADE = """
ALTER TABLE tenant_load ADD COLUMN IF NOT EXISTS num_queued_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS num_unused_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS num_excess_tokens bigint NOT NULL DEFAULT 0;
CREATE TABLE IF NOT EXISTS running_sums (
    id smallint DEFAULT 1 NOT NULL,
    corrected_at timestamptz NOT NULL,
    num_corrected integer NOT NULL,
    CONSTRAINT running_sums_pkey PRIMARY KEY (id),
    CONSTRAINT running_sums_id_check CHECK (id = 1)
);
UPDATE tenant_load l SET num_queued_tokens = (
    SELECT coalesce(sum(j.cost), 0) FROM jobs j WHERE j.tenant_id = l.tenant_id AND j.status = 'queued')
WHERE l.tenant_id IN (SELECT tenant_id FROM limits WHERE key_id = '' AND queued_tokens IS NOT NULL);
"""

DOWNGRADE = """
DROP TABLE running_sums;
ALTER TABLE tenant_load DROP COLUMN num_queued_tokens, DROP COLUMN num_unused_tokens, DROP COLUMN num_excess_tokens;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
