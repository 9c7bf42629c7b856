"""When leases can be believed."""

from datetime import UTC, datetime, timedelta

import pytest

from maintenance.janitor import OutageGuard

START = datetime(2026, 1, 1, tzinfo=UTC)


def may_rescue(guard: OutageGuard, seconds: float, *, stepped: float = 0.0) -> bool:
    return guard.may_rescue(START + timedelta(seconds=seconds + stepped), 1000.0 + seconds)


def test_steady_ticks_rescue() -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert all(may_rescue(guard, seconds) for seconds in range(100))


def test_after_an_outage_the_owners_have_one_lease_to_renew() -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert may_rescue(guard, 0)
    assert [may_rescue(guard, seconds) for seconds in (20, 25, 34, 35, 36)] == [False, False, False, True, True]


def test_an_outage_of_two_thirds_of_a_lease_may_have_outlasted_a_lease() -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert may_rescue(guard, 0)
    assert not may_rescue(guard, 11)


def test_a_first_answer_that_took_long_is_an_outage_too() -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert [may_rescue(guard, seconds) for seconds in (12, 20, 28)] == [False, False, True]


def test_after_the_clock_stepped_forward_too() -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert may_rescue(guard, 0)
    assert not may_rescue(guard, 1, stepped=60)
    assert not may_rescue(guard, 10, stepped=60)
    assert may_rescue(guard, 16, stepped=60)


@pytest.mark.parametrize("step", [5.5, 17, 29])
def test_a_step_that_leaves_owners_too_little_of_their_lease_is_one(step: float) -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert may_rescue(guard, 0)
    assert not may_rescue(guard, 1, stepped=step)


def test_a_short_gap_is_no_outage() -> None:
    guard = OutageGuard(lease_seconds=15, clock=1000.0)
    assert [may_rescue(guard, seconds) for seconds in (0, 9, 18)] == [True, True, True]
