"""Token buckets, and what the headers of an answer say about them.

A bucket holds what may be taken at once, and fills up again within a minute. Of tokens, a job takes at its acceptance
as many as it may use, and gives back at its end what it has not used. So that a job that may use more than a whole
bucket can run at all, it only needs a full one: the level falls below zero, and nothing else is accepted until it has
risen.
"""

import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

MINUTE_SECONDS = 60.0


def counted(number: int, noun: str) -> str:
    """In words for a message: `1 job`, `2 jobs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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

    def after(self, seconds: float) -> "BucketStanding":
        """What it is by then if nothing is taken meanwhile."""
        until_full = max(0.0, self.seconds_until_full - seconds)
        level = self.limit - until_full * self.limit / MINUTE_SECONDS
        return BucketStanding(self.limit, max(self.num_remaining, int(level)), until_full)


class LimitStanding(NamedTuple):
    """What is left to a request's key and tenant: of several limits of a kind, the one of which least is left. None
    where there is no such limit."""

    requests: BucketStanding | None
    tokens: BucketStanding | None

    @classmethod
    def of(cls, requests: Iterable[Bucket | None], tokens: Iterable[Bucket | None]) -> "LimitStanding | None":
        """None if there are no limits with a rate."""
        tightest = cls(_tightest(requests), _tightest(tokens))
        return None if tightest == (None, None) else tightest

    def after(self, seconds: float) -> "LimitStanding":
        requests, tokens = (None if kind is None else kind.after(seconds) for kind in self)
        return LimitStanding(requests, tokens)


def _tightest(buckets: Iterable[Bucket | None]) -> BucketStanding | None:
    standings = [bucket.standing for bucket in buckets if bucket is not None]
    return min(standings, key=lambda standing: standing.num_remaining, default=None)


@dataclass(slots=True)
class LastStanding:
    """What a process has last heard of what is left to a caller."""

    standing: LimitStanding
    noted_at: float = field(default_factory=time.monotonic)

    def note(self, standing: LimitStanding) -> None:
        self.standing, self.noted_at = standing, time.monotonic()

    @property
    def now(self) -> LimitStanding:
        return self.standing.after(time.monotonic() - self.noted_at)


class ClientCall(NamedTuple):
    """A client's call that takes several jobs, and the place of one of them in it."""

    number: int
    num_jobs: int
    cost: int  # of all jobs, in tokens


class CallerLimits(NamedTuple):
    """What a process knows of the limits of a request's key and tenant without asking for them again."""

    is_limited: bool = False  # whether there are any
    standing: LastStanding | None = None  # None: there are none with a rate
    key_streams: int | None = None
    tenant_streams: int | None = None


#: Whether the tenant or key of the request may have limits, so that its jobs must be measured against them.
is_limited_context: ContextVar[bool] = ContextVar("is_limited", default=False)

#: The limits on streams of the request's key and tenant, by the id of the key.
stream_limits_context: ContextVar[tuple[str | None, CallerLimits]] = ContextVar(
    "stream_limits", default=(None, CallerLimits())
)


@dataclass(slots=True)
class RequestStandings:
    """What is left of the limits of a request's key and tenant, for the headers of its answer."""

    last: LastStanding | None = None
    after_jobs: list[LimitStanding] = field(default_factory=list)  # that the request has asked for

    @property
    def all(self) -> list[LimitStanding]:
        """What was left after each of its jobs; of a request without jobs, what is left now."""
        return self.after_jobs or ([] if self.last is None else [self.last.now])


standings_context: ContextVar[RequestStandings | None] = ContextVar("standings", default=None)


def note_caller(limits: CallerLimits) -> None:
    standings = standings_context.get()
    if standings is not None:
        standings.last = limits.standing


def note_standing(standing: LimitStanding | None) -> None:
    """Of a job of the request that was accepted or refused."""
    standings = standings_context.get()
    if standing is None or standings is None:
        return
    standings.after_jobs.append(standing)
    if standings.last is not None:
        standings.last.note(standing)


def duration_text(seconds: float) -> str:
    """As OpenAI's headers have it: 120ms, 6s, 1m30s, 2h0m5s. Rounded up."""
    milliseconds = -int(-seconds * 1000 // 1)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    whole = -(-milliseconds // 1000)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{whole % 60}s"
