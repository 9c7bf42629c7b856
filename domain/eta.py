"""ETAs: an ETA is the estimate of when a job starts and ends, from the work ahead and what recent jobs took. No I/O.

A job's *raw* estimate divides the work ahead over the model's slots; work is predicted in seconds of a slot, from the
tokens that jobs may take and the share of them that recent jobs took. How far raw estimates were off lately says how to
correct the next one: the median of the errors gives p50, their 90th percentile p90. So a bias that lasts, such as that
of jobs which overtake, corrects itself.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

MIN_SAMPLES = 30  # recent jobs, for an estimate on which a job may be refused

#: Of the errors of recent starts and ends. The highest is a little above 0.9, since the load may change meanwhile.
QUANTILES = (0.1, 0.5, 0.94)

CLAIM_SECONDS = 0.1  # within which a claim counts as coming at once

FLOOR_SECONDS = 0.5  # errors are relative to the estimate plus this: nobody minds if 0.01 s were 0.1 s


class Quantiles(NamedTuple):
    """Quantiles of a ratio or of a time."""

    p10: float
    p50: float
    p90: float

    def of(self, raw_seconds: float) -> "Quantiles":
        """The corrected estimates, if these are the quantiles of (actual + FLOOR_SECONDS) / (raw + FLOOR_SECONDS)."""
        return Quantiles(*(max(0.0, (raw_seconds + FLOOR_SECONDS) * error - FLOOR_SECONDS) for error in self))


#: Before there are enough samples.
UNKNOWN_ERRORS = Quantiles(0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """What a model's newest jobs took, by the ledger."""

    num_jobs: int = 0
    seconds_to_first_output: float = 0.0
    seconds_per_token: float = 0.0
    token_share: float = 1.0  # of the output tokens that jobs might have taken, those that they took
    seconds_left: float = 0.0  # that a running job still takes, on average over all times
    start_errors: Quantiles | None = None  # None: too few samples
    end_errors: Quantiles | None = None

    def work(self, num_jobs: float, num_tokens: float) -> float:
        """The seconds of a slot that queued jobs take which may generate `num_tokens` in all."""
        return num_jobs * self.seconds_to_first_output + num_tokens * self.token_share * self.seconds_per_token


class Load(NamedTuple):
    """Jobs, what fairness charges for them, and the output tokens that they may take."""

    num_jobs: float = 0.0
    cost: float = 0.0
    num_tokens: float = 0.0

    def plus(self, other: "Load") -> "Load":
        return Load(self.num_jobs + other.num_jobs, self.cost + other.cost, self.num_tokens + other.num_tokens)

    def times(self, factor: float) -> "Load":
        return Load(factor * self.num_jobs, factor * self.cost, factor * self.num_tokens)


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """What one tenant has waiting for a model, and how much it has received."""

    tenant_id: UUID
    virtual_time: float
    weight: float
    num_running: int
    load: Load

    @property
    def end(self) -> float:
        """The virtual time at which the last of its jobs begins and all of them are charged."""
        return self.virtual_time + self.load.cost / self.weight

    def before(self, fair_time: float) -> Load:
        """The part of its queue whose turn comes before `fair_time`, as if all of its jobs were alike."""
        if fair_time <= self.virtual_time or not self.load.cost:
            return Load()
        return self.load.times(min(1.0, (fair_time - self.virtual_time) * self.weight / self.load.cost))


class FairOrder:
    """All tenants' queues of a model, for finding how much comes before a job in logarithmic time."""

    def __init__(self, tenants: Iterable[TenantQueue]) -> None:
        self.by_id = {tenant.tenant_id: tenant for tenant in tenants}
        slopes: dict[float, Load] = {}  # changes of what a unit of virtual time adds to the sum
        for tenant in self.by_id.values():
            if tenant.load.cost > 0:
                slope = tenant.load.times(tenant.weight / tenant.load.cost)
                slopes[tenant.virtual_time] = slopes.get(tenant.virtual_time, Load()).plus(slope)
                slopes[tenant.end] = slopes.get(tenant.end, Load()).plus(slope.times(-1))
        self._times = sorted(slopes)
        self._sums: list[tuple[Load, Load]] = []  # at each time: what comes before, and the slope from there on
        total = slope = Load()
        before = self._times[0] if self._times else 0.0
        for time in self._times:
            total = total.plus(slope.times(time - before))
            slope, before = slope.plus(slopes[time]), time
            self._sums.append((total, slope))
        self.total = Load(*(sum(column) for column in zip(*(t.load for t in self.by_id.values()), strict=True)))
        active = [tenant.virtual_time for tenant in self.by_id.values() if tenant.num_running]
        #: Where a tenant begins that has been idle.
        self.level = min(active, default=max((t.virtual_time for t in self.by_id.values()), default=0.0))

    def before(self, fair_time: float) -> Load:
        """What all tenants have before `fair_time`."""
        place = bisect_right(self._times, fair_time) - 1
        if place < 0:
            return Load()
        total, slope = self._sums[place]
        return total.plus(slope.times(fair_time - self._times[place]))

    def ahead_of(self, tenant_id: UUID, own: Load, weight: float = 1.0) -> Load:
        """What comes before a job that has `own` of its tenant's queue before it."""
        tenant = self.by_id.get(tenant_id) or TenantQueue(tenant_id, self.level, weight, 0, Load())
        fair_time = tenant.virtual_time + own.cost / tenant.weight
        others = self.before(fair_time).plus(tenant.before(fair_time).times(-1))
        return Load(*(max(0.0, value) for value in others)).plus(own)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds until a job starts and until it ends, and the raw figures from which the next errors are measured."""

    start: Quantiles
    end: Quantiles | None  # None: nothing is known about how long it runs
    raw_start_seconds: float
    raw_end_seconds: float
    is_trustworthy: bool

    @classmethod
    def at(cls, seconds: float) -> "Estimate":
        """A start that does not depend on other jobs; nothing is known about the end."""
        return cls(UNKNOWN_ERRORS.of(seconds), None, seconds, seconds, is_trustworthy=False)

    @property
    def stored(self) -> tuple[float, float, float, float]:
        """The raw start and end, and p50 and p90 of the start: from these, its errors are measured."""
        return self.raw_start_seconds, self.raw_end_seconds, self.start.p50, self.start.p90


@dataclass(frozen=True, slots=True)
class Slots:
    """A model's slots, and its running jobs."""

    num_slots: int
    num_running: int
    allowed_tokens: int = 0  # that the running jobs may take in all
    committed_tokens: int = 0


MIN_SHARE_LEFT = 0.25  # of the predicted work of the running jobs, which is never taken to be about over


def estimate(ahead: Load, num_tokens: float, slots: Slots, pace: Pace) -> Estimate:
    """For a job that may take `num_tokens` of output and has `ahead` before it. It waits for slots only."""
    raw_start = 0.0
    if ahead.num_jobs + slots.num_running >= slots.num_slots:
        predicted = slots.allowed_tokens * pace.token_share
        left = max(predicted - slots.committed_tokens, MIN_SHARE_LEFT * predicted) * pace.seconds_per_token
        # When it starts, the other slots are still busy.
        others = (slots.num_slots - 1) * pace.seconds_left
        work = pace.work(ahead.num_jobs, ahead.num_tokens) + left
        raw_start = max(work - others, work / slots.num_slots) / slots.num_slots
    raw_end = raw_start + pace.work(1, num_tokens)
    return Estimate(
        start=(pace.start_errors or UNKNOWN_ERRORS).of(raw_start),
        end=(pace.end_errors or UNKNOWN_ERRORS).of(raw_end),
        raw_start_seconds=raw_start,
        raw_end_seconds=raw_end,
        is_trustworthy=pace.start_errors is not None,
    )


def pace_by_rate(tokens_per_second: float, num_slots: int, mean_tokens: float) -> Pace:
    """Before any job has ended: as if each of them took all of its tokens, at the rate that the workers report."""
    seconds_per_token = num_slots / tokens_per_second
    return Pace(seconds_per_token=seconds_per_token, seconds_left=mean_tokens * seconds_per_token / 2)
