"""Estimates of when jobs start and end."""

import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast
from uuid import UUID

import pytest

from api.model_queues import UNKNOWN_PLACE
from api.openai.running import Run
from api.services import Services
from dialects.native import QueueView
from domain.eta import (
    FLOOR_SECONDS,
    NUM_NEAREST,
    UNKNOWN_ERRORS,
    Errors,
    FairOrder,
    Load,
    Pace,
    Quantiles,
    Slots,
    TenantQueue,
    estimate,
    pace_by_rate,
)

A, B, C = UUID(int=1), UUID(int=2), UUID(int=3)

PACE = Pace(num_jobs=100, seconds_to_first_output=1.0, seconds_per_token=0.1, token_share=0.5)


def tenant(id_: UUID, virtual_time: float, num_jobs: int, *, weight: float = 1.0, num_running: int = 0) -> TenantQueue:
    """Each job is charged 10 tokens and may generate 4."""
    return TenantQueue(id_, virtual_time, weight, num_running, Load(num_jobs, 10 * num_jobs, 4 * num_jobs))


def test_those_who_have_received_less_come_first() -> None:
    order = FairOrder([tenant(A, 0, 5), tenant(B, 20, 5)])
    assert order.ahead_of(B, Load()) == Load(2, 20, 8), "A's first two jobs make it level"
    assert order.ahead_of(A, Load(5, 50, 20)) == Load(5 + 3, 50 + 30, 20 + 12)
    assert order.ahead_of(A, Load()) == Load()


def test_weights_and_the_ends_of_queues_count() -> None:
    order = FairOrder([tenant(A, 0, 100, weight=2), tenant(B, 0, 3)])
    assert order.ahead_of(B, Load(2, 20, 8)) == pytest.approx((2 + 4, 20 + 40, 8 + 16))
    assert order.ahead_of(A, Load(50, 500, 200)) == pytest.approx((50 + 3, 530, 212))


def test_a_tenant_that_was_idle_begins_level_with_those_who_run() -> None:
    order = FairOrder([tenant(A, 100, 50, num_running=4), tenant(B, 700, 0)])
    assert order.ahead_of(C, Load()) == Load()
    assert order.ahead_of(C, Load(1, 10, 4)) == Load(2, 20, 8)
    assert FairOrder([]).ahead_of(C, Load(3, 30, 12)) == Load(3, 30, 12)


def test_the_sums_are_those_of_every_tenant_by_itself() -> None:
    draw = random.Random(7)
    tenants = [
        tenant(UUID(int=number), draw.uniform(0, 100), draw.randrange(9), weight=draw.choice((0.5, 1, 2)))
        for number in range(200)
    ]
    order = FairOrder(tenants)
    for _ in range(100):
        at = draw.uniform(-10, 300)
        slowly = sum(one.before(at).num_jobs for one in tenants)
        assert order.before(at).num_jobs == pytest.approx(slowly, abs=1e-6)


def test_a_free_slot_is_taken_at_once_and_a_taken_one_waited_for() -> None:
    assert estimate(Load(), 20, Slots(2, 1, 20, 0), PACE).raw_start_seconds == 0
    one = estimate(Load(), 20, Slots(1, 1, 20, 5), PACE)
    assert one.raw_start_seconds == pytest.approx(0.5), "of 10 expected tokens, 5 are there"
    assert one.raw_end_seconds == pytest.approx(0.5 + 1 + 1)
    many = estimate(Load(10, 0, 200), 20, Slots(1, 1, 20, 5), PACE)
    assert many.raw_start_seconds == pytest.approx(0.5 + 10 * (1 + 1))
    shared = estimate(Load(10, 0, 200), 20, Slots(4, 4, 80, 20), PACE)
    assert shared.raw_start_seconds == pytest.approx((20 + 2 / 4) / 4), "one of four has 0.5 s left"


def coming(id_: UUID, per_second: float, virtual_time: float, num_jobs: int = 0) -> TenantQueue:
    load = Load(per_second, 10 * per_second, 4 * per_second)
    return replace(tenant(id_, virtual_time, num_jobs, num_running=1), arriving=load)


def test_whoever_comes_later_and_has_received_less_overtakes() -> None:
    """A has waited long; B's two jobs a second each come before A's, whose turn is at 30."""
    order = FairOrder([tenant(A, 0, 3), coming(B, 2.0, 0)])
    assert order.fair_time(A, 30) == 30
    assert order.ahead_of(A, Load(3, 30, 12)) == Load(3, 30, 12), "none of B's is there yet"
    assert order.overtaking(A, 30.0, 1.0) == Load(2, 20, 8)
    assert order.overtaking(A, 30.0, 8.0) == Load(3, 30, 12), "until B has received as much"
    assert FairOrder([tenant(A, 0, 3), coming(B, 2.0, 50)]).overtaking(A, 30.0, 8.0) == Load()
    assert FairOrder([coming(A, 5.0, 0, 3)]).overtaking(A, 30.0, 8.0) == Load(), "not its own tenant's"


def test_who_will_overtake_is_found_among_those_who_submit() -> None:
    draw = random.Random(3)
    tenants = [
        coming(UUID(int=number), draw.choice((0.0, 0.0, draw.uniform(0.1, 5))), draw.uniform(0, 100), draw.randrange(9))
        for number in range(100)
    ]
    order = FairOrder(tenants)
    for _ in range(50):
        own, at, seconds = draw.choice(tenants).tenant_id, draw.uniform(-10, 300), draw.choice((1.0, 8.0))
        slowly = 0.0
        for one in tenants:
            later = replace(one, load=one.load.plus(one.arriving.times(seconds)))
            slowly += (later.before(at).num_jobs - one.before(at).num_jobs) if one.tenant_id != own else 0.0
        assert order.overtaking(own, at, seconds).num_jobs == pytest.approx(slowly, abs=1e-6)


def test_an_estimate_foresees_those_who_will_overtake_until_the_start() -> None:
    """On one slot each job takes 2 s, and one is half done; one in four seconds overtakes."""
    pace, slots = Pace(num_jobs=100, seconds_per_token=0.1), Slots(1, 1, 20, 10)

    def one_in_four_seconds(seconds: float) -> Load:
        return Load(seconds / 4, 0, 20 * seconds / 4)

    alone = estimate(Load(3, 0, 60), 20, slots, pace)
    assert alone.raw_start_seconds == pytest.approx(1 + 6)
    overtaken = estimate(Load(3, 0, 60), 20, slots, pace, one_in_four_seconds)
    assert overtaken.raw_start_seconds == pytest.approx(14), "half of the time is theirs"
    later = estimate(Load(3, 0, 60), 20, slots, pace, one_in_four_seconds, age_seconds=1.0)
    assert later.raw_start_seconds == pytest.approx(15), "what came since the figures were read is ahead already"
    swamped = estimate(Load(3, 0, 60), 20, slots, pace, lambda seconds: Load(0, 0, 20 * seconds))
    assert swamped.raw_start_seconds == pytest.approx(7 + 2 * 64), "as far as it is foreseen"


def test_short_and_long_waits_are_corrected_by_their_like() -> None:
    short = [(0.5, 0.5 * 1.1 + 0.05 + number / 1000) for number in range(NUM_NEAREST)]
    long = [(20.0, 40.5) for _ in range(NUM_NEAREST)]
    errors = Errors([pair for both in zip(short, long, strict=True) for pair in both])
    assert errors.is_enough
    assert errors.near(0.4).p50 == pytest.approx(1.1, abs=0.05)
    assert errors.near(30.0) == pytest.approx((2.0, 2.0, 2.0))
    assert Errors(short[:5]).near(0.4) == UNKNOWN_ERRORS


def test_no_job_ends_before_it_starts() -> None:
    """As starts and ends are corrected by errors of their own."""
    pace = replace(PACE, start_errors=Errors([(20.0, 200.0)] * 40), end_errors=Errors([(20.0, 20.0)] * 40))
    estimated = estimate(Load(10, 0, 200), 20, Slots(1, 1, 20, 5), pace)
    assert estimated.end == estimated.start


def test_recent_errors_correct_an_estimate() -> None:
    spread = Errors([(0.5, error - FLOOR_SECONDS) for error in (1, 2, 4)] * 10)  # relative to 0.5 + FLOOR_SECONDS
    pace = Pace(100, 1.0, 0.1, 0.5, start_errors=spread, end_errors=Errors([(1.0, 10.0)] * 30))
    estimated = estimate(Load(10, 0, 200), 20, Slots(1, 1, 20, 5), pace)
    raw = estimated.raw_start_seconds
    assert estimated.is_trustworthy
    assert estimated.start == pytest.approx((raw, 2 * raw + FLOOR_SECONDS, 4 * raw + 3 * FLOOR_SECONDS))
    assert estimated.end == pytest.approx((7 * estimated.raw_end_seconds + 6 * FLOOR_SECONDS,) * 3)
    assert estimated.stored == (raw, estimated.raw_end_seconds, estimated.start.p50, estimated.start.p90)
    assert Quantiles(0.1, 0.2, 0.3).of(0.0) == (0, 0, 0)
    unsure = estimate(Load(10, 0, 200), 20, Slots(1, 1, 20, 5), PACE)
    assert not unsure.is_trustworthy
    assert unsure.start == UNKNOWN_ERRORS.of(raw)


def test_before_any_job_has_ended_the_workers_rate_counts() -> None:
    pace = pace_by_rate(20.0, 2)
    assert estimate(Load(3, 0, 60), 20, Slots(2, 2, 40, 0), pace).raw_start_seconds == pytest.approx(
        (60 + 40 / 2) * 0.1 / 2
    )


def test_the_answer_of_every_route_has_the_place_of_its_new_job_in_headers() -> None:
    place: QueueView = {**UNKNOWN_PLACE, "position": 3, "eta_seconds": 1.25, "end_eta_p90_seconds": 90.0}
    run = Run(
        services=cast(Services, None),
        tenant_id=UUID(int=1),
        job_id=UUID(int=2),
        model_name="m",
        model_revision="r",
        priority=0,
        created_at=datetime.now(UTC),
        started=0.0,
        num_prompt_tokens=1,
        queue=place,
    )
    told = {name: value for name, value in run.headers.items() if name.startswith("x-queue-")}
    assert told == {"x-queue-position": "3", "x-queue-eta-ms": "1250", "x-queue-end-eta-p90-ms": "90000"}
    for nothing in (None, UNKNOWN_PLACE):
        assert "x-queue-position" not in replace(run, queue=nothing).headers
