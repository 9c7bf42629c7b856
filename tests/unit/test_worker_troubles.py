"""What a worker tells of itself: in words, for as long as it is so."""

from types import SimpleNamespace
from typing import Any, cast

from domain.troubles import Trouble
from gpu_worker.reporting import ENDED_SECONDS, WorkerTroubles, slowness


def troubles(**redis: Any) -> WorkerTroubles:
    supervisor: Any = SimpleNamespace(doubt=None)
    return WorkerTroubles(supervisor, cast(Any, SimpleNamespace(**{"redis_away_seconds": 0.0} | redis)))


def test_where_all_is_well_nothing_is_told() -> None:
    assert troubles().found(0.0, skew_seconds=0.2, report_seconds=0.9) == {}


def test_a_database_that_is_slow_for_this_worker_is_told() -> None:
    assert troubles().found(0.0, 0.0, report_seconds=1.26) == {
        Trouble.DATABASE: "the database takes 1.3 s for its report"
    }


def test_one_slow_report_says_nothing_and_one_that_took_far_too_long_does() -> None:
    assert [slowness(seconds) for seconds in ([], [1.5], [0.1, 1.5, 1.5], [1.2, 1.5, 1.4])] == [0.0, 0.0, 0.1, 1.2]
    assert slowness([0.1, 5.0]) == 5.0
    assert slowness([0.1, 5.0, 0.1]) == 0.1, "over at once"


def test_a_clock_is_told_with_its_direction() -> None:
    told = [troubles().found(0.0, skew, 0.0)[Trouble.CLOCK] for skew in (90.0, -90.0)]
    assert told == ["its clock is 90.0 s behind the database's", "its clock is 90.0 s ahead of the database's"]


def test_an_engine_that_ended_is_told_for_a_while() -> None:
    worker = troubles()
    worker.engine_ended(100.0, "killed")
    assert Trouble.ENGINE_ENDED in worker.found(100.0 + ENDED_SECONDS - 1, 0.0, 0.0)
    assert worker.found(100.0 + ENDED_SECONDS + 1, 0.0, 0.0) == {}


def test_claims_that_fail_are_told() -> None:
    assert troubles().found(0.0, 0.0, 0.0, "it cannot claim jobs") == {Trouble.CLAIMS: "it cannot claim jobs"}


def test_a_redis_that_is_away_is_told_with_its_error() -> None:
    worker = troubles(redis_away_seconds=6.0, redis_error="TimeoutError: no answer")
    assert worker.found(0.0, 0.0, 0.0) == {Trouble.REDIS: "Redis has not answered it: TimeoutError: no answer"}
