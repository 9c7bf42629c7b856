"""A job's options beside its request, and the bounds of its deadline."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from domain.errors import InvalidRequest
from domain.jobs import Endpoint, JobStatus
from domain.webhooks import TELLABLE_STATUSES

MAX_DEADLINE_AHEAD = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class JobOptions:
    """A job's options beside its request."""

    priority: int = 0
    deadline_at: datetime | None = None
    start_timeout_seconds: float | None = None
    run_timeout_seconds: float | None = None
    result_ttl_seconds: int | None = None  # None: the installation's
    idempotency_key: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    webhook_url: str | None = None  # told of the ends in webhook_statuses
    webhook_statuses: Sequence[JobStatus] = TELLABLE_STATUSES
    deadline_after_seconds: float | None = None  # since the accept; no part of what a repeated request must share
    endpoint: Endpoint = Endpoint.JOBS
    is_stored: bool = False
    endpoint_body: str | None = None  # JSON, kept beside the request for the route that shows it again


def refuse_impossible_deadline(options: JobOptions) -> None:
    if options.deadline_at is None:
        return
    now = datetime.now(UTC)
    if not now < options.deadline_at < now + MAX_DEADLINE_AHEAD:
        raise InvalidRequest(
            f"deadline is {options.deadline_at.isoformat()}; name a time to come within {MAX_DEADLINE_AHEAD.days} days",
            param="deadline",
        )


def deadline_of(options: JobOptions) -> datetime | None:
    """The earlier of the two that may be given."""
    if options.deadline_after_seconds is None:
        return options.deadline_at
    relative = datetime.now(UTC) + timedelta(seconds=options.deadline_after_seconds)
    return relative if options.deadline_at is None else min(relative, options.deadline_at)
