"""Usage read by hours that are summed up is, to the token, what the records say."""

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobKind
from storage import usage, usage_hours
from storage.tables import DEFAULT_TENANT_ID
from storage.usage import UsageQuery, UsageRecord, UsageTotal
from storage.usage_hours import HOUR, Horizon, UsageClosing, UsageHour

NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)


def add_record(session: Session, ended_at: datetime, tenant_id: UUID = DEFAULT_TENANT_ID, **fields: object) -> None:
    values: dict[str, object] = {
        "attempt": 1,
        "outcome": "completed",
        "is_attempt": True,
        "is_end": True,
        "model": "a",
        "kind": JobKind.GENERATION,
        "is_batch": False,
        "num_prompt_tokens": 5,
        "num_cached_tokens": 1,
        "num_output_tokens": 40,
        "num_reasoning_tokens": 2,
        "queue_seconds": 0.5,
        "prefill_seconds": 2.0,
        "decode_seconds": 4.0,
        "engine_seconds": 1.0,
    }
    session.add(UsageRecord(tenant_id=tenant_id, ended_at=ended_at, job_id=uuid4(), **(values | fields)))


def close(session: Session, start: datetime, until: datetime) -> int:
    """As if the installation were as old as that. How many hours were closed."""
    session.execute(update(UsageClosing).values(closed_from=start, closed_until=start))
    num_hours = 0
    while usage_hours.close_next(session, until):
        num_hours += 1
    return num_hours


def test_totals_of_any_time_and_group_are_those_of_the_records(
    session: Session, make_tenant: Callable[..., object]
) -> None:
    chooser = random.Random(3)
    tenants = [DEFAULT_TENANT_ID, make_tenant(name="other").id]  # type: ignore[attr-defined]
    on_the_hour = [timedelta(), HOUR, 2 * HOUR, HOUR - timedelta(microseconds=1)]
    for number in range(300):
        add_record(
            session,
            NOON + (on_the_hour[number] if number < 4 else timedelta(seconds=chooser.uniform(-7_200, 18_000))),
            chooser.choice(tenants),
            key_id=chooser.choice([None, "k", "l"]),
            adapter=chooser.choice([None, "x"]),
            kind=chooser.choice(list(JobKind)),
            is_batch=chooser.random() < 0.3,
            is_end=chooser.random() < 0.7,
            num_output_tokens=chooser.randrange(-9, 1_000),
        )
    session.flush()
    queries = [
        UsageQuery(
            start=NOON + timedelta(minutes=chooser.choice([-200, -60, 0, 7, 60, 61])),
            end=NOON + timedelta(minutes=chooser.choice([62, 90, 120, 121, 180, 400])),
            tenant_id=chooser.choice([None, tenants[1]]),
            by_tenant=chooser.random() < 0.5,
            by_key=chooser.random() < 0.5,
            by_batch=chooser.random() < 0.5,
            bucket_seconds=chooser.choice([0, 60, 3_600, 86_400]),
            kinds=chooser.choice([tuple(JobKind), (JobKind.GENERATION,)]),
            tenants=chooser.choice([(), ("other",)]),
            key_ids=chooser.choice([(), ("k",)]),
            is_batch=chooser.choice([None, True]),
        )
        for _ in range(60)
    ]
    expected = [_rounded(usage.totals(session, query)) for query in queries]
    assert close(session, NOON - HOUR, NOON + timedelta(hours=3, minutes=30)) == 4
    assert [_rounded(usage.totals(session, query)) for query in queries] == expected
    session.execute(delete(UsageRecord).where(UsageRecord.ended_at.between(NOON, NOON + 2 * HOUR)))
    whole = replace(queries[0], start=NOON, end=NOON + HOUR, bucket_seconds=0)
    assert sum(one.num_jobs for one in usage.totals(session, whole)) > 0, "the records of closed hours are not read"


def _rounded(totals: list[UsageTotal]) -> list[UsageTotal]:
    seconds = ("queue_seconds", "prefill_seconds", "decode_seconds", "engine_seconds")
    return [replace(one, **{name: round(getattr(one, name), 6) for name in seconds}) for one in totals]


def test_an_hour_is_closed_when_it_has_ended_and_once(session: Session) -> None:
    add_record(session, NOON + timedelta(minutes=10))
    session.flush()
    assert close(session, NOON, NOON + HOUR - timedelta(seconds=1)) == 0
    assert close(session, NOON, NOON + HOUR) == 1
    assert not usage_hours.close_next(session, NOON + HOUR)
    assert session.scalar(select(func.sum(UsageHour.num_jobs))) == 1


def test_a_horizon_is_passed_when_whoever_wrote_before_has_ended(session_factory: sessionmaker[Session]) -> None:
    """A statement that began in an hour may be committed long after it."""

    def look() -> Horizon:
        with session_factory.begin() as session:
            return usage_hours.horizon(session)

    with session_factory() as writer:
        add_record(writer, NOON)
        writer.flush()
        first = look()
        assert not first.is_passed(look())
        writer.commit()
        assert first.is_passed(look())


def test_old_hours_are_pruned(session: Session) -> None:
    add_record(session, NOON)
    session.flush()
    assert close(session, NOON, NOON + HOUR) == 1
    age = datetime.now(UTC) - NOON
    assert usage_hours.prune(session, days=age.days + 1) == 0
    assert usage_hours.prune(session, days=max(0, age.days - 1)) == 1


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (timedelta(), HOUR, (timedelta(), HOUR)),
        (timedelta(minutes=1), 2 * HOUR, (HOUR, 2 * HOUR)),
        (timedelta(minutes=-300), timedelta(hours=9), (timedelta(), 3 * HOUR)),
        (timedelta(minutes=1), timedelta(minutes=119), (timedelta(minutes=1), timedelta(minutes=1))),
        (4 * HOUR, 9 * HOUR, (4 * HOUR, 4 * HOUR)),
    ],
)
def test_whole_closed_hours_are_found(
    session: Session, start: timedelta, end: timedelta, expected: tuple[timedelta, timedelta]
) -> None:
    session.execute(update(UsageClosing).values(closed_from=NOON, closed_until=NOON + 3 * HOUR))
    first, last = usage_hours.closed_within(session, NOON + start, NOON + end)
    assert (first - NOON, last - NOON) == expected
