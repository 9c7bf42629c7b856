"""An ended job submitted once more: a new job that names the old one and has its request, with the same defaults."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from domain.ids import external_id
from domain.jobs import JobStatus, Lane
from storage.job_queries import JobRecord
from storage.jobs_accept import Accepted, AcceptOutcome, NewJob
from tasks.job_options import JobOptions
from tasks.submit import Submitted, Submitter, raise_refusal


@dataclass(frozen=True, slots=True)
class Resubmission:
    verb: Literal["retry", "replay"]
    keeps_output: bool = False  # go on behind what was committed, where the model is still the same
    is_poison_allowed: bool = False  # then it runs alone


async def resubmit(
    submitter: Submitter,
    record: JobRecord,
    how: Resubmission,
    accept: Callable[[NewJob, bool], Awaitable[Accepted]],
) -> Submitted:
    """Returns once the new job is committed; an earlier call's, where there was one. Raises the CeleriacError that says
    why not. `record` holds the request of an ended job; `accept(new_job, keeps_output)` commits. The old job's deadline
    is not taken over: it is past, or belonged to another time."""
    assert record.request is not None
    old = record.job
    options = JobOptions(
        priority=old.priority,
        run_timeout_seconds=old.run_timeout_seconds,
        result_ttl_seconds=old.result_ttl_seconds,
        # With blanks, which no client's own key may have; so a repeated call finds the first one's job.
        idempotency_key=f"{how.verb} of {external_id(old.id)}",
        metadata=old.job_metadata,
        endpoint=old.endpoint,
        is_stored=old.is_stored,
    )
    new_job = replace(
        await submitter.prepare(old.tenant_id, record.request, options),
        retry_of=old.id,
        lane=Lane.ISOLATED if how.is_poison_allowed else Lane.STANDARD,
        webhook_url=old.webhook_url,
        webhook_statuses=[JobStatus(status) for status in old.webhook_statuses or ()],
    )
    accepted = await accept(new_job, how.keeps_output)
    raise_refusal(accepted, options)
    is_new = accepted.outcome is AcceptOutcome.ACCEPTED
    if is_new:
        submitter.announce(new_job)
    return Submitted(accepted.job_id, is_new, accepted.created_at or datetime.now(UTC), new_job)
