"""What is said about a full queue: when there will be room, or that a call can never fit.

Asked only for jobs that are being refused, in the transaction that refuses them.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from domain.errors import AuthenticationFailed, CeleriacError, InvalidRequest, TooManyQueuedJobs
from domain.limits import ClientCall

DRAIN_SECONDS = 5.0  # until a queue is assumed to have room, if nothing tells how fast it gets shorter

MIN_DRAIN_SECONDS = 1.0

# What the running jobs of a tenant have waited, on average of the newest ones, which an index finds.
WAITED_SECONDS = """(SELECT avg(extract(epoch FROM r.started_at - r.created_at))::float8 FROM (
        SELECT j.started_at, j.created_at FROM jobs j WHERE j.status = 'in_progress' AND j.tenant_id = l.tenant_id
        ORDER BY j.id DESC LIMIT 100) r)"""

FULL = text(f"""
SELECT l.tenant_id, l.num_queued, t.max_queued, {WAITED_SECONDS} AS waited_seconds
FROM tenant_load l JOIN tenants t ON t.id = l.tenant_id WHERE l.tenant_id = ANY(CAST(:tenant_ids AS uuid[]))
""")  # noqa: S608  (only a constant of this module is inserted)


def drain_seconds(waited_seconds: float | None, num_queued: int, *, num_jobs: int = 1) -> float:
    """Until a queue is `num_jobs` shorter, by Little's law: the jobs that run now waited `waited_seconds`, which is how
    long the whole queue takes to pass. None: no job of it runs."""
    if waited_seconds is None or not num_queued:
        return DRAIN_SECONDS
    return max(MIN_DRAIN_SECONDS, num_jobs * waited_seconds / num_queued)


def never_fits(call: ClientCall | None, name: str, needed: int, limit: int, *, what: str, whose: str) -> InvalidRequest:
    """The refusal of a call whose jobs are more than a limit allows, however empty the queue is."""
    num_jobs = 1 if call is None else call.num_jobs
    return InvalidRequest(
        f"the {num_jobs} prompts of this request may take {needed} {what}, and {name}{whose} is {limit}; send fewer "
        f"prompts at once, or have an administrator raise {name}",
        param="prompt",
    )


def refusals(
    session: Session, calls: Sequence[tuple[Any, ClientCall | None]], *, max_queued_jobs: int
) -> list[CeleriacError]:
    """Of jobs for which the queues of their tenants had no room, each by its tenant's id and the call it belongs to.
    `max_queued_jobs` applies to tenants without a limit of their own."""
    if not calls:
        return []
    rows = session.execute(FULL, {"tenant_ids": list({tenant_id for tenant_id, _ in calls})})
    row_by_tenant = {row.tenant_id: row for row in rows}
    return [_refusal(row_by_tenant.get(tenant_id), call, max_queued_jobs) for tenant_id, call in calls]


def _refusal(row: Row[Any] | None, call: ClientCall | None, max_queued_jobs: int) -> CeleriacError:
    if row is None:
        return AuthenticationFailed("this tenant was deleted a moment ago; use the key of another one")
    name, whose = "queued_jobs", " of your tenant"
    bound, num_jobs = row.max_queued, 1 if call is None else call.num_jobs
    if bound is None:
        name, whose, bound = "CELERIAC_MAX_QUEUED_JOBS", "", max_queued_jobs
    if num_jobs > max(1, bound):  # a bound of 0 is a door that an administrator has closed for now
        return never_fits(call, name, num_jobs, bound, what="jobs", whose=whose)
    missing = max(1, row.num_queued + num_jobs - bound)
    return TooManyQueuedJobs(
        f"your queue is full: {row.num_queued} of your jobs wait, this request adds {num_jobs}, and {name}{whose} is "
        f"{bound}; retry when some have started",
        retry_after_seconds=drain_seconds(row.waited_seconds, row.num_queued, num_jobs=missing),
    )
