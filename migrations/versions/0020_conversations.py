"""Conversations: their items, and the responses whose items are not among them yet."""

from alembic import op

revision = "0020"
down_revision = "0019"

TABLES = """
CREATE TABLE conversations (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    metadata json NOT NULL,
    version integer NOT NULL DEFAULT 0,
    num_items integer NOT NULL DEFAULT 0,
    num_bytes bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    CONSTRAINT conversations_pkey PRIMARY KEY (id),
    CONSTRAINT conversations_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
CREATE INDEX conversations_tenant_idx ON conversations (tenant_id);
CREATE INDEX conversations_expires_idx ON conversations (expires_at);

CREATE TABLE conversation_items (
    conversation_id uuid NOT NULL,
    position integer NOT NULL,
    item_id text NOT NULL,
    item json NOT NULL,
    CONSTRAINT conversation_items_pkey PRIMARY KEY (conversation_id, position),
    CONSTRAINT conversation_items_conversation_id_item_id_key UNIQUE (conversation_id, item_id),
    CONSTRAINT conversation_items_conversation_id_fkey FOREIGN KEY (conversation_id)
        REFERENCES conversations (id) ON DELETE CASCADE
);

CREATE TABLE conversation_turns (
    conversation_id uuid NOT NULL,
    job_id uuid NOT NULL,
    CONSTRAINT conversation_turns_pkey PRIMARY KEY (conversation_id),
    CONSTRAINT conversation_turns_job_id_key UNIQUE (job_id),
    CONSTRAINT conversation_turns_conversation_id_fkey FOREIGN KEY (conversation_id)
        REFERENCES conversations (id) ON DELETE CASCADE
);
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("DROP TABLE conversation_turns, conversation_items, conversations")
