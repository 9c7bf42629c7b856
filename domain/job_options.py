"""The options of a job that are not part of its request: priority, clocks, idempotency, who is told of its end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from domain.callbacks import CeleryCallback
from domain.errors import InvalidRequest
from domain.jobs import Endpoint, JobStatus
from domain.webhooks import TELLABLE_STATUSES

MAX_DEADLINE_AHEAD = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class ConversationTurn:
    """The conversation that a job continues, as it was read for the job's prompt. `version` changes with its items."""

    conversation_id: UUID
    version: int


class Timeouts(NamedTuple):
    """For how many seconds a job may wait in the queue, and may run once it has started. None: for any time."""

    start_seconds: float | None = None
    run_seconds: float | None = None

    def or_else(self, default: "Timeouts") -> "Timeouts":
        """These, and `default` where there is none."""
        return Timeouts(
            default.start_seconds if self.start_seconds is None else self.start_seconds,
            default.run_seconds if self.run_seconds is None else self.run_seconds,
        )


NO_TIMEOUTS = Timeouts()


@dataclass(frozen=True, slots=True)
class JobOptions:
    """The options of a job that are not part of its request."""

    priority: int = 0
    deadline_at: datetime | None = None
    start_timeout_seconds: float | None = None
    run_timeout_seconds: float | None = None
    result_ttl_seconds: int | None = None  # None: CELERIAC_RESULT_TTL_SECONDS
    idempotency_key: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    webhook_url: str | None = None  # notified if the job ends with one of webhook_statuses
    webhook_statuses: Sequence[JobStatus] = TELLABLE_STATUSES
    callback: CeleryCallback | None = None  # the message that is sent when the job has ended
    deadline_after_seconds: float | None = None  # from acceptance; a repeated request may have another one
    endpoint: Endpoint = Endpoint.JOBS
    is_stored: bool = False
    endpoint_body: str | None = None  # JSON, stored for routes that return the request again
    use_cache: bool | None = None  # None: the response cache, for requests whose output is determined
    turn: ConversationTurn | None = None  # to which its input and output belong once it has completed


def refuse_impossible_deadline(options: JobOptions) -> None:
    """Raises InvalidRequest."""
    if options.deadline_at is None:
        return
    now = datetime.now(UTC)
    if not now < options.deadline_at < now + MAX_DEADLINE_AHEAD:
        raise InvalidRequest(
            f"deadline is {options.deadline_at.isoformat()}; send a future time within {MAX_DEADLINE_AHEAD.days} days",
            param="deadline",
        )


def deadline_of(options: JobOptions) -> datetime | None:
    """The earlier of the absolute and the relative deadline; None if neither is set."""
    if options.deadline_after_seconds is None:
        return options.deadline_at
    relative = datetime.now(UTC) + timedelta(seconds=options.deadline_after_seconds)
    return relative if options.deadline_at is None else min(relative, options.deadline_at)
