"""The outbox of webhooks: the ends of jobs are written down for delivery in the transaction that makes them.

The statements that end jobs only say of each whether anybody may want to hear of it (IS_TOLD), so that a job without a
webhook costs nothing beside; for the others `write_deliveries` follows.
"""

# ruff: noqa: S608  (only constants of this module are put into the text; values are bound)

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

# For the RETURNING of a statement that ends jobs `j`.
IS_TOLD = """(j.webhook_url IS NOT NULL OR EXISTS (
        SELECT FROM webhook_endpoints p WHERE p.tenant_id = j.tenant_id)) AS is_told"""

# What the end of a job is called outside, and what the route calls it that the job came by: as OpenAI's SDKs know it.
JOB_EVENT = "'job.' || j.status"
EVENT_OF_ROUTE = f"""CASE WHEN j.endpoint <> 'responses' THEN {JOB_EVENT} ELSE 'response.' || CASE
        WHEN j.status = 'completed' AND j.finish_reason = 'length' THEN 'incomplete'
        WHEN j.status = 'expired' THEN CASE WHEN j.num_committed_tokens > 0 THEN 'incomplete' ELSE 'failed' END
        ELSE j.status END END"""

# The event has the id of its job, so a second one for the same destination cannot exist. An endpoint is not a foreign
# key: one that is deleted at this moment must not keep jobs from ending.
WRITE_DELIVERIES = text(f"""
WITH ended AS MATERIALIZED (
    SELECT j.id, j.tenant_id, {JOB_EVENT} AS job_event, {EVENT_OF_ROUTE} AS event_of_route,
        CASE WHEN j.status = ANY(j.webhook_statuses) THEN j.webhook_url END AS url
    FROM jobs j WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.finished_at IS NOT NULL
)
INSERT INTO webhook_deliveries (tenant_id, event_id, type, endpoint_id, url)
SELECT tenant_id, id, event_of_route, NULL::uuid, url FROM ended WHERE url IS NOT NULL
UNION ALL
SELECT ended.tenant_id, ended.id,
    CASE WHEN event_of_route = ANY(p.event_types) THEN event_of_route ELSE job_event END, p.id, p.url
FROM ended JOIN webhook_endpoints p ON p.tenant_id = ended.tenant_id AND p.disabled_at IS NULL
    AND p.event_types && ARRAY[event_of_route, job_event]
ON CONFLICT DO NOTHING
""")


def write_deliveries(session: Session, job_ids: Sequence[UUID]) -> None:
    """One delivery per destination that asked for it, of each of these jobs that has ended. Belongs in the transaction
    that ended them; once more does nothing."""
    if job_ids:
        session.execute(WRITE_DELIVERIES, {"ids": list(job_ids)})


# A batch ends once, in a transaction that holds its row, so its event needs no further guard than its id.
WRITE_BATCH_DELIVERIES = text("""
INSERT INTO webhook_deliveries (tenant_id, event_id, type, endpoint_id, url)
SELECT tenant_id, :batch_id, :type, id, url FROM webhook_endpoints
WHERE tenant_id = :tenant_id AND disabled_at IS NULL AND :type = ANY(event_types)
ON CONFLICT DO NOTHING
""")


def write_batch_deliveries(session: Session, batch_id: UUID, tenant_id: UUID, status: str) -> None:
    """As `write_deliveries`, of a batch that ends as `status`."""
    parameters = {"batch_id": batch_id, "tenant_id": tenant_id, "type": f"batch.{status}"}
    session.execute(WRITE_BATCH_DELIVERIES, parameters)
