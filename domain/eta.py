"""ETAs: an ETA is the estimate of when a job starts and ends, from the work ahead and what recent jobs took. No I/O.

A job's *raw* estimate divides the work ahead over the model's slots; work is predicted in seconds of a slot, from the
tokens that jobs may take and the share of them that recent jobs took. Ahead is what waits and comes before it in the
order of claims, and what its competitors will submit meanwhile, if they go on as they did lately: a tenant with a long
queue gets its share and no more, however short the others' queues are now. How far raw estimates of about this length
were off lately says how to correct the next one: the median of their errors gives p50, their 90th percentile p90.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from uuid import UUID

MIN_SAMPLES = 30  # recent jobs, for an estimate on which a job may be refused

NUM_NEAREST = 48  # of the recent jobs: those whose raw estimates were most like the one to be corrected

HORIZONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # seconds; what arrives later than the last is not foreseen

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


class Errors:
    """What came of recent raw estimates: pairs of raw and actual seconds, newest first."""

    def __init__(self, pairs: Iterable[tuple[float, float]] = ()) -> None:
        self._pairs = sorted(pairs, key=lambda pair: pair[0])
        self._raws = [raw for raw, _ in self._pairs]
        self.is_enough = len(self._pairs) >= MIN_SAMPLES

    def near(self, raw_seconds: float) -> Quantiles:
        """The quantiles among the samples most like this one, as short and long waits err differently."""
        if not self.is_enough:
            return UNKNOWN_ERRORS
        middle = (bisect_left(self._raws, raw_seconds) + bisect_right(self._raws, raw_seconds)) // 2
        start = max(0, min(middle - NUM_NEAREST // 2, len(self._pairs) - NUM_NEAREST))
        nearest = self._pairs[start : start + NUM_NEAREST]
        errors = sorted((actual + FLOOR_SECONDS) / (raw + FLOOR_SECONDS) for raw, actual in nearest)
        return Quantiles(*(_quantile(errors, share) for share in QUANTILES))


def _quantile(values: list[float], share: float) -> float:
    """Of sorted values, between two of them if need be."""
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Pace:
    """What a model's newest jobs took, by the ledger."""

    num_jobs: int = 0
    seconds_to_first_output: float = 0.0
    seconds_per_token: float = 0.0
    token_share: float = 1.0  # of the output tokens that jobs might have taken, those that they took
    start_errors: Errors = field(default_factory=Errors)
    end_errors: Errors = field(default_factory=Errors)

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


NOTHING = Load()


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """What one tenant has waiting for a model, and how much it has received."""

    tenant_id: UUID
    virtual_time: float
    weight: float
    num_running: int
    load: Load
    arriving: Load = NOTHING  # per second, lately

    def before(self, fair_time: float) -> Load:
        """The part of its queue whose turn comes before `fair_time`, as if all of its jobs were alike."""
        if fair_time <= self.virtual_time or not self.load.cost:
            return Load()
        return self.load.times(min(1.0, (fair_time - self.virtual_time) * self.weight / self.load.cost))


def level_of(tenants: Collection[TenantQueue]) -> float:
    """Where a tenant begins that has been idle."""
    active = (tenant.virtual_time for tenant in tenants if tenant.num_running)
    return min(active, default=max((tenant.virtual_time for tenant in tenants), default=0.0))


class Rises:
    """What several queues have before each virtual time: sums that rise evenly between two times at which the turn of
    some queue begins or ends. In plain numbers, since the API builds one for all tenants of a model each second."""

    def __init__(self, tenants: Iterable[TenantQueue]) -> None:
        changes: list[tuple[float, float, float, float]] = []  # a time, and what the slopes change by
        for tenant in tenants:
            num_jobs, cost, num_tokens = tenant.load
            if cost > 0:
                rate = tenant.weight / cost
                jobs, costs, tokens = num_jobs * rate, cost * rate, num_tokens * rate
                changes.append((tenant.virtual_time, jobs, costs, tokens))
                changes.append((tenant.virtual_time + cost / tenant.weight, -jobs, -costs, -tokens))
        changes.sort()
        self._times = [change[0] for change in changes]
        self._sums: list[tuple[float, ...]] = []  # at each time: what comes before, and the slopes from there on
        jobs = costs = tokens = job_slope = cost_slope = token_slope = 0.0
        before = changes[0][0] if changes else 0.0
        for time, more_jobs, more_costs, more_tokens in changes:
            width, before = time - before, time
            jobs, costs, tokens = jobs + job_slope * width, costs + cost_slope * width, tokens + token_slope * width
            job_slope += more_jobs
            cost_slope += more_costs
            token_slope += more_tokens
            self._sums.append((jobs, costs, tokens, job_slope, cost_slope, token_slope))

    def before(self, fair_time: float) -> Load:
        """What all of them have before `fair_time`."""
        place = bisect_right(self._times, fair_time) - 1
        if place < 0:
            return Load()
        jobs, costs, tokens, job_slope, cost_slope, token_slope = self._sums[place]
        width = fair_time - self._times[place]
        return Load(jobs + job_slope * width, costs + cost_slope * width, tokens + token_slope * width)


Queues = tuple[Mapping[UUID, TenantQueue], Rises]


class FairOrder:
    """All tenants' queues of a model, for finding how much comes before a job in logarithmic time."""

    def __init__(self, tenants: Iterable[TenantQueue]) -> None:
        self.by_id = {tenant.tenant_id: tenant for tenant in tenants}
        self._rises = Rises(self.by_id.values())
        arriving = [tenant for tenant in self.by_id.values() if tenant.arriving.num_jobs]
        self._arriving = {tenant.tenant_id: tenant for tenant in arriving}
        self._after: dict[float, Queues] = {}  # by seconds, of those that submit
        self.total = Load(*(sum(column) for column in zip(*(t.load for t in self.by_id.values()), strict=True)))
        self._present = {tenant.tenant_id for tenant in self.by_id.values() if tenant.num_running or tenant.load.cost}
        self.level = level_of(self.by_id.values())

    def has_others(self, tenant_id: UUID) -> bool:
        """Whether any other tenant has jobs queued or running now."""
        return len(self._present) > (tenant_id in self._present)

    def before(self, fair_time: float) -> Load:
        """What all tenants have before `fair_time`."""
        return self._rises.before(fair_time)

    def fair_time(self, tenant_id: UUID, own_cost: float) -> float:
        """Of a job that has so much of its tenant's queue before it."""
        tenant = self.by_id.get(tenant_id)
        return self.level + own_cost if tenant is None else tenant.virtual_time + own_cost / tenant.weight

    def ahead_of(self, tenant_id: UUID, own: Load) -> Load:
        """What comes before a job that has `own` of its tenant's queue before it."""
        return _others((self.by_id, self._rises), tenant_id, self.fair_time(tenant_id, own.cost)).plus(own)

    def overtaking(self, tenant_id: UUID, fair_time: float, seconds: float) -> Load:
        """What other tenants will submit within so many seconds and have before this tenant's job at `fair_time`."""
        now = _others(self._after_seconds(0.0), tenant_id, fair_time)
        later = _others(self._after_seconds(seconds), tenant_id, fair_time)
        return _not_negative(later.plus(now.times(-1)))

    def _after_seconds(self, seconds: float) -> Queues:
        """The queues of those that submit, as they will be. The others' stay as they are, however many there are."""
        if seconds not in self._after:
            later = {
                tenant_id: replace(tenant, load=tenant.load.plus(tenant.arriving.times(seconds)))
                for tenant_id, tenant in self._arriving.items()
            }
            self._after[seconds] = later, Rises(later.values())
        return self._after[seconds]


def _others(queues: Queues, tenant_id: UUID, fair_time: float) -> Load:
    """What all other tenants have before `fair_time`."""
    by_id, rises = queues
    before, tenant = rises.before(fair_time), by_id.get(tenant_id)
    return before if tenant is None else _not_negative(before.plus(tenant.before(fair_time).times(-1)))


def _not_negative(load: Load) -> Load:
    return Load(*(max(0.0, value) for value in load))


@dataclass(frozen=True, slots=True)
class Eta:
    """Seconds until a job starts and until it ends, and the raw figures from which the next errors are measured."""

    start: Quantiles
    end: Quantiles | None  # None: nothing is known about how long it runs
    raw_start_seconds: float
    raw_end_seconds: float
    is_trustworthy: bool

    @classmethod
    def at(cls, seconds: float) -> "Eta":
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


Foresight = Callable[[float], Load]


def nothing_more(seconds: float) -> Load:
    """The foresight that nobody will overtake."""
    return Load()


def estimate(
    ahead: Load,
    num_tokens: float,
    slots: Slots,
    pace: Pace,
    overtaking: Foresight = nothing_more,
    *,
    age_seconds: float = 0.0,
) -> Eta:
    """For a job that may take `num_tokens` of output and has `ahead` before it, by figures of this age. It waits for
    slots only. `overtaking` tells what will have come before it by so many seconds after the figures were read."""
    raw_start = 0.0
    if ahead.num_jobs + slots.num_running >= slots.num_slots:
        raw_start = _seconds_until_start(ahead, slots, pace, overtaking, age_seconds)
    raw_end = raw_start + pace.work(1, num_tokens)
    start = pace.start_errors.near(raw_start).of(raw_start)
    end = pace.end_errors.near(raw_end).of(raw_end)
    return Eta(
        start=start,
        end=Quantiles(*map(max, start, end)),  # corrected by other errors, but no job ends before it starts
        raw_start_seconds=raw_start,
        raw_end_seconds=raw_end,
        is_trustworthy=pace.start_errors.is_enough,
    )


def _seconds_until_start(ahead: Load, slots: Slots, pace: Pace, overtaking: Foresight, age_seconds: float) -> float:
    """When all that comes before the job until then has been begun. All slots are busy until its start, and the rest of
    each job in them is what is left of one of them now."""
    predicted = slots.allowed_tokens * pace.token_share
    tokens_left = max(predicted - slots.committed_tokens, MIN_SHARE_LEFT * predicted) / slots.num_slots

    def start(later: Load) -> float:
        work = pace.work(ahead.num_jobs + later.num_jobs, ahead.num_tokens + later.num_tokens)
        return age_seconds + (work + tokens_left * pace.seconds_per_token) / slots.num_slots

    def is_by(horizon: float) -> bool:
        return start(overtaking(horizon)) <= horizon

    if not is_by(HORIZONS[-1]):
        return start(overtaking(HORIZONS[-1])) - age_seconds
    place = bisect_left(HORIZONS, True, key=is_by)
    before, after = HORIZONS[place - 1] if place else 0.0, HORIZONS[place]
    # In between, as much comes in as is foreseen until the start.
    early, late = start(overtaking(before) if before else NOTHING), start(overtaking(after))
    return before + (early - before) * (after - before) / ((after - before) - (late - early)) - age_seconds


def pace_by_rate(tokens_per_second: float, num_slots: int) -> Pace:
    """Before any job has ended: as if each of them took all of its tokens, at the rate that the workers report."""
    return Pace(seconds_per_token=num_slots / tokens_per_second)
