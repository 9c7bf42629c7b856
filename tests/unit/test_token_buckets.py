"""Token buckets, the words of the headers, and which refusal a limit makes."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.errors import error_response
from api.limit_headers import anthropic_limit_headers, openai_limit_headers
from domain.errors import LimitReached, RequestsPerMinuteExceeded, TokensPerDayExceeded
from domain.limits import Bucket, BucketStanding, LimitStanding, duration_text
from storage.admission import Asking, Meter


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (1.2, "2s"),
        (59.5, "1m0s"),
        (90, "1m30s"),
        (7205, "2h0m5s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_new_bucket_is_full_and_empties_one_by_one() -> None:
    bucket = Bucket.refilled(3, None, seconds=0)
    for left in (2, 1, 0):
        assert bucket.seconds_until(1) == 0
        bucket.take(1)
        assert bucket.standing.num_remaining == left
    assert bucket.seconds_until(1) == 20
    assert bucket.standing.seconds_until_full == 60


def test_a_bucket_fills_up_within_a_minute_and_no_further() -> None:
    assert Bucket.refilled(60, 0.0, seconds=0.5).seconds_until(1) == 0.5
    assert Bucket.refilled(60, 0.0, seconds=1).seconds_until(1) == 0
    assert Bucket.refilled(60, 0.0, seconds=60).level == Bucket.refilled(60, 0.0, seconds=1e9).level == 60


def test_a_clock_that_goes_backwards_adds_and_takes_nothing() -> None:
    assert Bucket.refilled(60, 7.0, seconds=-3600, returned=-5).level == 7


def test_a_job_larger_than_the_bucket_needs_a_full_one_and_leaves_debt() -> None:
    bucket = Bucket.refilled(100, None, seconds=0)
    assert bucket.seconds_until(1000) == 0
    bucket.take(1000)
    assert bucket.standing.num_remaining == 0
    assert bucket.seconds_until(1) == pytest.approx(540.6)
    assert Bucket.refilled(100, bucket.level, seconds=0, returned=990).level == 90


def test_a_smaller_limit_lowers_the_level() -> None:
    assert Bucket.refilled(5, 80.0, seconds=0).level == 5


@given(
    st.integers(1, 10**6),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 100)), min_size=1, max_size=50),
)
def test_no_more_is_taken_than_a_bucket_and_what_it_filled_up(per_minute: int, asked: list[tuple[float, int]]) -> None:
    level, taken, passed = None, 0.0, 0.0
    for seconds, wanted in asked:
        passed += seconds
        bucket = Bucket.refilled(per_minute, level, seconds=seconds)
        if bucket.seconds_until(wanted) == 0:
            bucket.take(wanted)
            taken += wanted
        level = bucket.level
    assert taken <= per_minute + passed * per_minute / 60 + 100


def test_what_was_last_heard_of_a_bucket_rises_with_time() -> None:
    bucket = Bucket.refilled(60, None, seconds=0)
    bucket.take(90)
    standing = bucket.standing
    assert standing == (60, 0, 90)
    assert standing.after(29.5) == (60, 0, 60.5)
    assert standing.after(40) == (60, 10, 50)
    assert standing.after(3600) == (60, 60, 0)


def test_the_tightest_of_several_limits_is_told_and_none_where_there_are_none() -> None:
    less, more = Bucket.refilled(10, 3.0, seconds=0), Bucket.refilled(5, None, seconds=0)
    assert LimitStanding.of([more, less, None], [None]) == (less.standing, None)
    assert LimitStanding.of([None], []) is None


STANDING = LimitStanding(BucketStanding(10, 4, 36.0), BucketStanding(1000, 0, 61.5))


def test_the_headers_of_either_api() -> None:
    assert dict(openai_limit_headers([STANDING])) == {
        b"x-ratelimit-limit-requests": b"10",
        b"x-ratelimit-remaining-requests": b"4",
        b"x-ratelimit-reset-requests": b"36s",
        b"x-ratelimit-limit-tokens": b"1000",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"1m2s",
    }
    headers = dict(anthropic_limit_headers([STANDING]))
    assert headers[b"anthropic-ratelimit-requests-remaining"] == b"4"
    reset = datetime.fromisoformat(headers[b"anthropic-ratelimit-tokens-reset"].decode())
    assert timedelta(seconds=60) < reset - datetime.now(UTC) < timedelta(seconds=63)
    assert openai_limit_headers([]) == []


def test_of_several_jobs_the_headers_tell_what_is_left_after_all() -> None:
    less = LimitStanding(BucketStanding(10, 3, 42.0), None)
    headers = dict(openai_limit_headers([STANDING, less]))
    assert headers[b"x-ratelimit-remaining-requests"] == b"3"
    assert headers[b"x-ratelimit-limit-tokens"] == b"1000"


NOW = datetime(2026, 1, 31, 23, 0, tzinfo=UTC)


def meter_of(**fields: Any) -> Meter:
    names = ("queued_jobs", "unfinished_jobs", "queued_tokens", "tokens_per_day", "tokens_per_month")
    row = dict.fromkeys(names) | {"key_id": "", "day": NOW.date(), "tokens_on_day": 0, "tokens_in_month": 0}
    counts = {
        name: fields.pop(name) for name in ("num_queued", "queued_tokens_now", "waited_seconds") if name in fields
    }
    meter = Meter(SimpleNamespace(**row | {"read_at": NOW} | fields), None, None)  # type: ignore[arg-type]
    meter.num_queued = meter.num_unfinished = counts.get("num_queued", 0)
    meter.queued_tokens = counts.get("queued_tokens_now", 0)
    meter.waited_seconds = counts.get("waited_seconds")
    return meter


ASKING = Asking(uuid4(), None, cost=100)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"tokens_per_day": 10, "tokens_on_day": 10}, 3600),
        ({"tokens_per_day": 10, "tokens_on_day": 9}, None),
        ({"tokens_per_day": 10, "tokens_on_day": 99, "day": date(2026, 1, 30)}, None),
        ({"tokens_per_month": 10, "tokens_in_month": 10, "day": date(2026, 1, 2)}, 3600),
        ({"tokens_per_month": 10, "tokens_in_month": 99, "day": date(2025, 1, 31)}, None),
    ],
)
def test_a_budget_is_that_of_the_day_or_month_in_utc(fields: dict[str, Any], seconds: float | None) -> None:
    refusal = meter_of(**fields).refusal_of(ASKING)
    assert (refusal.retry_after_seconds if isinstance(refusal, LimitReached) else None) == seconds


def test_queues_have_room_when_they_have_become_shorter_as_fast_as_they_do() -> None:
    refusal = meter_of(unfinished_jobs=4, num_queued=4, waited_seconds=20.0).refusal_of(ASKING)
    assert isinstance(refusal, LimitReached)
    assert refusal.retry_after_seconds == 5
    assert "4 jobs of your tenant are waiting or running, and unfinished_jobs is 4" in refusal.message


def test_the_only_job_may_be_longer_than_the_queue() -> None:
    assert meter_of(queued_tokens=50).refusal_of(ASKING) is None
    assert meter_of(queued_tokens=150, num_queued=1, queued_tokens_now=51).refusal_of(ASKING) is not None
    assert meter_of(queued_tokens=150, num_queued=1, queued_tokens_now=50).refusal_of(ASKING) is None


LINE = replace(ASKING, is_line=True)


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({"queued_jobs": 5}, {"num_queued": 3}),
        ({"unfinished_jobs": 5}, {"num_queued": 3}),
        ({"queued_tokens": 500}, {"num_queued": 1, "queued_tokens_now": 151}),
    ],
)
def test_lines_of_batches_leave_half_of_a_queue_to_requests(fields: dict[str, Any], used: dict[str, Any]) -> None:
    assert meter_of(**fields, **used).refusal_of(ASKING) is None
    assert meter_of(**fields, **used).refusal_of(LINE) is not None
    assert meter_of(**fields, **{name: number - 1 for name, number in used.items()}).refusal_of(LINE) is None


@pytest.mark.parametrize(("level", "is_refused"), [(500, True), (599, True), (600, False), (1000, False)])
def test_lines_of_batches_leave_half_of_a_bucket_to_requests(level: float, is_refused: bool) -> None:
    meter = meter_of()
    meter.tokens = Bucket(1000, level)
    assert meter.refusal_of(ASKING) is None
    assert (meter.refusal_of(LINE) is not None) is is_refused


@pytest.mark.parametrize(("cost", "needed"), [(240, 740), (250, 750), (500, 750), (750, 750), (900, 900), (2000, 1000)])
def test_a_long_line_leaves_less_as_a_bucket_that_others_use_is_never_full(cost: int, needed: int) -> None:
    meter, long = meter_of(), replace(LINE, cost=cost)
    for level in (needed - 1, needed):
        meter.tokens = Bucket(1000, level)
        assert (meter.refusal_of(long) is not None) is (level < needed)
    free = meter_of(queued_tokens=1000, num_queued=1, queued_tokens_now=1000 - needed)
    taken = meter_of(queued_tokens=1000, num_queued=1, queued_tokens_now=1001 - needed)
    assert taken.refusal_of(long) is not None
    assert (free.refusal_of(long) is None) is (cost <= 1000)


def test_a_client_is_never_told_to_come_back_too_early_nor_to_repeat_what_is_spent() -> None:
    for _ in range(50):
        assert (
            7 <= int(error_response(RequestsPerMinuteExceeded("", retry_after_seconds=6.1)).headers["retry-after"]) <= 8
        )
    spent = error_response(TokensPerDayExceeded("", retry_after_seconds=3600.5))
    assert (spent.headers["retry-after"], spent.headers["x-should-retry"]) == ("3601", "false")
