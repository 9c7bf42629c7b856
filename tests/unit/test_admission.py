"""A job that cannot start in time is refused at once, if that can be told."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from domain.eta import Eta, Quantiles
from tasks.submit import unattainable, with_estimate
from tests.storage_samples import new_job


def estimated(*, is_trustworthy: bool = True) -> Eta:
    """A start after 40 to 90 s."""
    return Eta(Quantiles(40, 60, 90), None, 60.0, 70.0, is_trustworthy)


@pytest.mark.parametrize(
    ("limits", "is_refused"),
    [
        ({}, False),
        ({"start_timeout_seconds": 50.0}, False),
        ({"start_timeout_seconds": 30.0}, True),
        ({"deadline_at": timedelta(seconds=50)}, False),
        ({"deadline_at": timedelta(seconds=30)}, True),
        ({"start_timeout_seconds": 50.0, "deadline_at": timedelta(seconds=30)}, True),
        ({"run_timeout_seconds": 1.0}, False),
    ],
)
def test_only_what_even_the_fastest_would_miss_is_refused(limits: dict[str, Any], is_refused: bool) -> None:
    if "deadline_at" in limits:
        limits = limits | {"deadline_at": datetime.now(UTC) + limits["deadline_at"]}
    job = with_estimate(new_job(**limits), lambda _: estimated())
    assert (job.hopeless_seconds is not None) is is_refused
    assert job.eta == estimated()
    assert with_estimate(new_job(**limits), lambda _: estimated(is_trustworthy=False)).hopeless_seconds is None
    assert with_estimate(new_job(**limits), lambda _: None).hopeless_seconds is None
    assert with_estimate(new_job(**limits, answer_key=b"known"), lambda _: estimated()).hopeless_seconds is None


def test_the_refusal_names_the_clock_and_the_wait() -> None:
    refusal = unattainable(with_estimate(new_job(start_timeout_seconds=30.0), lambda _: estimated()))
    assert (refusal.param, refusal.predicted_wait_seconds, refusal.retry_after_seconds) == ("start_timeout", 60, 30)
    assert "about 60.0 s" in refusal.message
