"""Token buckets, and what the headers of an answer say about them.

A bucket holds what may be taken at once, and fills up again within a minute. Of tokens, a job takes at its acceptance
as many as it may use, and gives back at its end what it has not used. So that a job that may use more than a whole
bucket can run at all, it only needs a full one: the level falls below zero, and nothing else is accepted until it has
risen.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

MINUTE_SECONDS = 60.0


@dataclass(slots=True)
class Bucket:
    per_minute: int  # its size, too
    level: float

    @classmethod
    def refilled(cls, per_minute: int, level: float | None, *, seconds: float, returned: float = 0) -> "Bucket":
        """As it is `seconds` after its level was noted (None: it was full), with what was returned meanwhile. A clock
        that went backwards adds nothing."""
        if level is None:
            return cls(per_minute, float(per_minute))
        risen = level + max(0.0, seconds) * per_minute / MINUTE_SECONDS + max(0.0, returned)
        return cls(per_minute, min(float(per_minute), risen))

    def seconds_until(self, wanted: float) -> float:
        """Until `wanted`, or a whole bucket if that is less, can be taken; 0 if it can be now."""
        missing = min(wanted, self.per_minute) - self.level
        return max(0.0, missing * MINUTE_SECONDS / self.per_minute)

    def take(self, wanted: float) -> None:
        self.level -= wanted

    @property
    def standing(self) -> "BucketStanding":
        return BucketStanding(self.per_minute, max(0, int(self.level)), self.seconds_until(self.per_minute))


class BucketStanding(NamedTuple):
    limit: int
    num_remaining: int
    seconds_until_full: float


class LimitStanding(NamedTuple):
    """What is left to a request's key and tenant: of several limits of a kind, the one of which least is left. None
    where there is no such limit."""

    requests: BucketStanding | None
    tokens: BucketStanding | None


class ClientCall(NamedTuple):
    """A client's call that takes several jobs, and the place of one of them in it."""

    number: int
    num_jobs: int
    cost: int  # of all jobs, in tokens


class CallerLimits(NamedTuple):
    """What a process knows of the limits of a request's key and tenant without asking for them again."""

    is_limited: bool = False  # whether there are any
    key_streams: int | None = None
    tenant_streams: int | None = None


#: Whether the tenant or key of the request may have limits, so that its jobs must be measured against them.
is_limited_context: ContextVar[bool] = ContextVar("is_limited", default=False)

#: The limits on streams of the request's key and tenant, by the id of the key.
stream_limits_context: ContextVar[tuple[str | None, CallerLimits]] = ContextVar(
    "stream_limits", default=(None, CallerLimits())
)

#: What the limits had left after each of the request's jobs, for the headers of its answer.
standings_context: ContextVar[list[LimitStanding] | None] = ContextVar("standings", default=None)


def note_standing(standing: LimitStanding | None) -> None:
    standings = standings_context.get()
    if standing is not None and standings is not None:
        standings.append(standing)


def duration_text(seconds: float) -> str:
    """As OpenAI's headers have it: 120ms, 6s, 1m30s, 2h0m5s. Rounded up."""
    milliseconds = -int(-seconds * 1000 // 1)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    whole = -(-milliseconds // 1000)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{whole % 60}s"
