"""How many tokens the queued jobs of each tenant may take, and what its running ones have not taken yet.

Maintenance counts both as soon as it starts, and again as long as processes of the last release change jobs without
them. Not here, where it would read long queues while nobody else may change these counters.
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
"""

DOWNGRADE = """
DROP TABLE running_sums;
ALTER TABLE tenant_load DROP COLUMN num_queued_tokens, DROP COLUMN num_unused_tokens, DROP COLUMN num_excess_tokens;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(DOWNGRADE)
