"""What tenants receive within a minute: the rule for pauses and the order of claims, played through on slots of steps.

The rule is the product's (`choose`). The claims are a short form of what the SQL statements do, which have tests of
their own: the tenant with the lowest virtual time is next, is charged the whole cost, and gets the unused part back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from gpu_worker.pausing import LOOK_SECONDS, Candidate, choose
from storage.job_statements import COUNTED_AHEAD, MAX_DEBT_TOKENS
from storage.shares import NextJob, Shares

STEP_SECONDS, QUANTUM_SECONDS = 0.02, 2.0
WEIGHTS = (1, 2, 4)
PROMPT = 30
ENDLESS = 1_000_000

Lengths = Callable[[int], int]  # of a tenant's jobs, by their number


def always(num_tokens: int) -> Lengths:
    return lambda number: num_tokens


def mixed(number: int) -> int:
    return (5, 150, 20, 60)[number % 4]


@dataclass
class SimulatedJob:
    id: UUID
    num_tokens: int  # that each sequence takes
    max_tokens: int
    num_sequences: int
    num_done: int = 0
    num_claims: int = 0
    started_at: float = 0.0

    @property
    def num_left(self) -> int:
        return self.num_tokens * self.num_sequences - self.num_done

    @property
    def unused(self) -> int:
        return self.max_tokens * self.num_sequences - self.num_done

    @property
    def charge(self) -> int:
        return self.unused if self.num_claims else PROMPT + self.unused


@dataclass
class SimulatedTenant:
    """One that always has more jobs waiting while it is there."""

    id: UUID
    weight: float
    lengths: Lengths
    is_there: Callable[[float], bool] = lambda now: True
    num_sequences: int = 1
    max_tokens: int = 0  # of each job, if it is more than it takes
    virtual_time: float = 0.0
    running: list[SimulatedJob] = field(default_factory=list)
    waiting: list[SimulatedJob] = field(default_factory=list)
    num_received: int = 0
    num_jobs: int = 0

    @property
    def received(self) -> float:
        return self.virtual_time - sum(job.unused for job in self.running) / self.weight

    @property
    def fair_time(self) -> float:
        reserved = sum(min(COUNTED_AHEAD * job.num_sequences, job.unused) for job in self.running)
        return self.received + reserved / self.weight

    @property
    def num_slots(self) -> int:
        return sum(job.num_sequences for job in self.running)

    def submit(self) -> None:
        job_id = UUID(int=self.id.int * 1_000_000 + self.num_jobs)
        num_tokens = self.lengths(self.num_jobs)
        self.waiting.append(SimulatedJob(job_id, num_tokens, max(num_tokens, self.max_tokens), self.num_sequences))
        self.num_jobs += 1

    def start(self, job: SimulatedJob, now: float) -> None:
        self.waiting.remove(job)
        self.virtual_time += job.charge / self.weight
        job.num_claims, job.started_at = job.num_claims + 1, now
        self.running.append(job)

    def stop(self, job: SimulatedJob) -> None:
        self.running.remove(job)
        self.virtual_time -= job.unused / self.weight
        if job.num_left:
            self.waiting.insert(0, job)


class Slots:
    def __init__(self, num_slots: int, tenants: Sequence[SimulatedTenant]) -> None:
        self.num_slots = num_slots
        self.tenants = tenants
        self.now = 0.0
        self._looked_at = 0.0

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self._come_and_go()
            while sum(tenant.num_slots for tenant in self.tenants) < self.num_slots and (due := self._in_turn()):
                due[0].start(due[0].waiting[0], self.now)
            if self.now - self._looked_at >= LOOK_SECONDS:
                self._looked_at = self.now
                self._exchange()
            self._step()
            self.now += STEP_SECONDS

    def _come_and_go(self) -> None:
        """As ACCEPT does for tenants that were idle."""
        for tenant in self.tenants:
            if not tenant.is_there(self.now):
                tenant.waiting = [job for job in tenant.waiting if job.num_claims]
                continue
            if not tenant.running and not tenant.waiting:
                level = min((other.received for other in self.tenants if other.running), default=self._highest)
                ceiling = level + MAX_DEBT_TOKENS / tenant.weight
                tenant.virtual_time = min(max(tenant.virtual_time, level), ceiling)
            while len(tenant.waiting) < self.num_slots:
                tenant.submit()

    @property
    def _highest(self) -> float:
        return max((tenant.virtual_time for tenant in self.tenants if tenant.waiting), default=0.0)

    def _in_turn(self) -> list[SimulatedTenant]:
        waiting = (tenant for tenant in self.tenants if tenant.waiting)
        return sorted(waiting, key=lambda tenant: (tenant.fair_time, len(tenant.running)))

    def _exchange(self) -> None:
        by_id = {tenant.id: tenant for tenant in self.tenants if tenant.running or tenant.waiting}
        may_leave = [
            Candidate(job.id, tenant.id, 0, quanta, job.num_sequences)
            for tenant in self.tenants
            for job in tenant.running
            if (quanta := (self.now - job.started_at) / QUANTUM_SECONDS) >= 1
        ]
        seen = Shares(
            num_running={tenant.id: tenant.num_slots for tenant in self.tenants if tenant.running},
            weights={id: tenant.weight for id, tenant in by_id.items()},
            received={id: tenant.received for id, tenant in by_id.items()},
            waiting=[NextJob(one.waiting[0].id, one.id, one.num_sequences) for one in self._in_turn()],
        )
        for next_job, leaving in choose(seen, may_leave):
            by_id[next_job.tenant_id].start(by_id[next_job.tenant_id].waiting[0], self.now)
            for candidate in leaving:
                giver = by_id[candidate.tenant_id]
                giver.stop(next(job for job in giver.running if job.id == candidate.job_id))

    def _step(self) -> None:
        """A token for each sequence that has a slot; those that came first have theirs first."""
        num_free = self.num_slots
        running = [
            (job.started_at, tenant.id, job.id, tenant, job) for tenant in self.tenants for job in tenant.running
        ]
        for *_, tenant, job in sorted(running, key=lambda one: one[:3]):
            num_new = min(num_free, job.num_sequences, job.num_left)
            num_free -= min(num_free, job.num_sequences)
            tenant.num_received += num_new if job.num_done else num_new + (PROMPT if num_new else 0)
            job.num_done += num_new
            if not job.num_left:
                tenant.stop(job)


def tenants_of(*lengths: Lengths) -> list[SimulatedTenant]:
    """With the weights 1, 2 and 4."""
    made = zip(WEIGHTS, lengths, strict=True)
    return [SimulatedTenant(UUID(int=number + 1), weight, own) for number, (weight, own) in enumerate(made)]


def off_in_a_minute(slots: Slots, tenants: Sequence[SimulatedTenant], *, after: float = 3.0) -> list[float]:
    """By what part each of these receives more or less than its weight among them says."""
    slots.run(after)
    before = [tenant.num_received for tenant in tenants]
    slots.run(60.0)
    received = [tenant.num_received - so_far for tenant, so_far in zip(tenants, before, strict=True)]
    total, total_weight = sum(received), sum(tenant.weight for tenant in tenants)
    return [own / total / (tenant.weight / total_weight) - 1 for own, tenant in zip(received, tenants, strict=True)]


@pytest.mark.parametrize("num_slots", [4, 9])
@pytest.mark.parametrize(
    "lengths",
    [
        (always(10), always(15), always(20)),
        (mixed, mixed, mixed),
        (always(1000), always(20), always(20)),
        (always(20), always(20), always(1000)),
        (always(150), always(150), always(150)),
        (always(1000), always(1000), always(1000)),
        (always(ENDLESS), always(ENDLESS), always(ENDLESS)),
        (always(ENDLESS), always(5), mixed),
    ],
    ids=["short", "mixed", "light long", "heavy long", "of three seconds", "of twenty", "endless", "of all kinds"],
)
def test_a_minute_divides_by_weight_whatever_the_lengths_of_jobs(lengths: Sequence[Lengths], num_slots: int) -> None:
    tenants = tenants_of(*lengths)
    assert off_in_a_minute(Slots(num_slots, tenants), tenants) == pytest.approx([0, 0, 0], abs=0.05)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_jobs_of_several_sequences_get_no_more(place: int) -> None:
    tenants = tenants_of(always(50), always(50), always(50))
    tenants[place].num_sequences = 4
    assert off_in_a_minute(Slots(8, tenants), tenants) == pytest.approx([0, 0, 0], abs=0.05)


@pytest.mark.parametrize("places", [(0,), (2,), (0, 1, 2)])
def test_jobs_that_take_little_of_what_they_may_get_no_less(places: Sequence[int]) -> None:
    tenants = tenants_of(always(20), always(20), always(20))
    for place in places:
        tenants[place].max_tokens = 4000
    assert off_in_a_minute(Slots(4, tenants), tenants) == pytest.approx([0, 0, 0], abs=0.05)


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("num_tokens", [20, 1000, ENDLESS])
def test_who_comes_late_gets_its_share_and_nothing_on_top(late: int, num_tokens: int) -> None:
    tenants = tenants_of(*[always(num_tokens)] * 3)
    tenants[late].is_there = lambda now: now >= 30
    assert off_in_a_minute(Slots(4, tenants), tenants, after=36) == pytest.approx([0, 0, 0], abs=0.05)


@pytest.mark.parametrize("num_tokens", [20, 150])
def test_who_was_idle_has_saved_nothing_and_who_was_alone_owes_little(num_tokens: int) -> None:
    """The heavy one is away for a minute, the others have the machine to themselves; then all are there."""
    tenants = tenants_of(*[always(num_tokens)] * 3)
    tenants[2].is_there = lambda now: not 10 <= now < 70
    assert off_in_a_minute(Slots(4, tenants), tenants, after=73) == pytest.approx([0, 0, 0], abs=0.05)
