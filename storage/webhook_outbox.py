"""The outbox of webhooks: the part of every statement that ends jobs by which the ends are written down for delivery.

It is a CTE of these statements, so an end and its deliveries are committed together or not at all. Jobs that nobody
wants to hear of cost a look at the few endpoints of their tenant.
"""

# What the end of a job is called outside. An end that another face of a job names otherwise belongs here.
EVENT_TYPE = "'job.' || e.status"


# What a job row must hand on (RETURNING) to be heard of.
WEBHOOK = "j.webhook_url, j.webhook_statuses"


def deliveries_of(ended: str) -> str:
    """`webhooks`: one delivery per destination for each row of the CTE `ended(id, tenant_id, status, webhook_url,
    webhook_statuses)`, which may hold jobs that have not ended: nobody can ask for these.

    The event has the id of its job, so a second one for the same destination cannot exist. An endpoint is not a foreign
    key: one that is deleted at this moment must not keep jobs from ending."""
    return f"""
webhooks AS (
    INSERT INTO webhook_deliveries (tenant_id, event_id, type, endpoint_id, url)
    SELECT e.tenant_id, e.id, {EVENT_TYPE}, NULL::uuid, e.webhook_url
    FROM {ended} e WHERE e.webhook_url IS NOT NULL AND e.status = ANY(e.webhook_statuses)
    UNION ALL
    SELECT e.tenant_id, e.id, {EVENT_TYPE}, p.id, p.url FROM {ended} e JOIN webhook_endpoints p
        ON p.tenant_id = e.tenant_id AND p.disabled_at IS NULL AND {EVENT_TYPE} = ANY(p.event_types)
    ON CONFLICT DO NOTHING
)"""  # noqa: S608  (only constants of this module are put into the text)
