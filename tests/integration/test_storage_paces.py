"""What estimates are made of: the newest records, and what is ahead in queues of any length."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from domain.eta import MIN_SAMPLES, Eta, Load, Quantiles
from domain.jobs import BATCH_PRIORITY, JobKind, new_id
from storage import job_queues, paces
from storage.job_accept import AcceptOutcome, accept
from storage.tables import DEFAULT_TENANT_ID, Job, JobFollower, TenantLoad
from storage.usage import UsageRecord
from tests.conftest import MakeJob
from tests.storage_samples import MODEL, claim, new_job


def record(number: int, **fields: object) -> UsageRecord:
    """Of 2 s until its first token, 4 s for 40 of 80 tokens, after twice the wait that was estimated."""
    values: dict[str, object] = {
        "tenant_id": DEFAULT_TENANT_ID,
        "ended_at": datetime.now(UTC) - timedelta(seconds=number),
        "job_id": uuid4(),
        "attempt": 1,
        "outcome": "completed",
        "is_attempt": True,
        "is_end": True,
        "model": MODEL,
        "kind": JobKind.GENERATION,
        "is_batch": False,
        "num_prompt_tokens": 5,
        "num_cached_tokens": 0,
        "num_output_tokens": 40,
        "num_reasoning_tokens": 0,
        "queue_seconds": 20.5,
        "prefill_seconds": 2.0,
        "decode_seconds": 4.0,
        "engine_seconds": 1.0,
        "num_allowed_tokens": 80,
        "eta_start_seconds": 10.0,
        "eta_end_seconds": 13.0,
    }
    return UsageRecord(**(values | fields))


def test_a_pace_is_that_of_the_newest_records(session: Session) -> None:
    old = [record(1000 + number, prefill_seconds=99.0) for number in range(paces.NUM_NEWEST)]
    session.add_all([*old, *(record(number) for number in range(paces.NUM_NEWEST)), record(0, model="other")])
    session.flush()
    pace = paces.read(session, [MODEL, "never used"])[MODEL]
    assert (pace.num_jobs, pace.seconds_to_first_output, pace.seconds_per_token) == (paces.NUM_NEWEST, 2.0, 0.1)
    assert pace.token_share == 0.5
    assert pace.start_errors.near(10.0) == Quantiles(2.0, 2.0, 2.0)
    assert pace.end_errors.near(13.0) == Quantiles(2.0, 2.0, 2.0)


def test_few_records_or_none_say_little(session: Session) -> None:
    session.add_all([record(number) for number in range(MIN_SAMPLES - 1)])
    session.flush()
    pace = paces.read(session, [MODEL])[MODEL]
    assert (pace.num_jobs, pace.start_errors.is_enough) == (MIN_SAMPLES - 1, False)
    assert paces.read(session, ["never used"]) == {}


def test_errors_of_ends_are_told_only_from_enough_of_them(session: Session) -> None:
    """Estimates of starts alone, as of jobs that waited for a load, say nothing about ends."""
    session.add_all([record(number, eta_end_seconds=None) for number in range(MIN_SAMPLES)])
    session.flush()
    pace = paces.read(session, [MODEL])[MODEL]
    assert pace.start_errors.near(10.0) == Quantiles(2.0, 2.0, 2.0)
    assert not pace.end_errors.is_enough
    session.add_all([record(number) for number in range(MIN_SAMPLES - 1)])
    session.flush()
    assert not paces.read(session, [MODEL])[MODEL].end_errors.is_enough


def test_jobs_that_were_cancelled_together_say_nothing_of_when_others_start(session: Session) -> None:
    cancelled = {"outcome": "cancelled", "queue_seconds": 1.0}
    session.add_all(record(number, **(cancelled if number % 2 else {})) for number in range(100))
    session.flush()
    assert paces.read(session, [MODEL])[MODEL].start_errors.near(10.0) == Quantiles(2.0, 2.0, 2.0)


def test_lines_of_batches_and_ends_in_the_queue_do_not_hide_a_pace(session: Session) -> None:
    lines = [record(number, is_batch=True) for number in range(paces.NUM_NEWEST)]
    ends = [record(number, is_attempt=False) for number in range(paces.NUM_NEWEST)]
    session.add_all([*lines, *ends, *(record(1000 + number) for number in range(MIN_SAMPLES))])
    session.flush()
    assert paces.read(session, [MODEL])[MODEL].num_jobs == MIN_SAMPLES


def test_rates_of_arrival_are_those_of_the_newest_jobs(session: Session, make_job: MakeJob, make_tenant: Any) -> None:
    busy, quiet = make_tenant(weight=2.0), make_tenant()
    few = [make_job(tenant_id=quiet.id, model="another") for _ in range(3)]
    make_job(tenant_id=quiet.id, priority=BATCH_PRIORITY)
    jobs = [make_job(tenant_id=busy.id) for _ in range(paces.NUM_ARRIVALS + 5)]
    session.execute(update(Job).values(created_at=datetime.now(UTC) - timedelta(seconds=10)))
    found = paces.arrivals(session)
    assert set(found) == {MODEL, "another"}
    assert set(found[MODEL]) == {busy.id}, "a line of a batch overtakes nobody"
    assert found[MODEL][busy.id].weight == 2.0
    per_second = found[MODEL][busy.id].per_second
    assert per_second.num_jobs == pytest.approx(paces.NUM_ARRIVALS / 10, rel=0.2)
    assert per_second.cost == pytest.approx(per_second.num_jobs * jobs[0].cost)
    assert found["another"][quiet.id].per_second.num_jobs == len(few) / paces.ARRIVAL_SECONDS, "all of a minute"


def test_what_is_ahead_of_a_job_is_counted_up_to_a_bound(session: Session, make_job: MakeJob) -> None:
    made = [make_job() for _ in range(5)]
    ahead = paces.own_ahead(session, [made[3].id, new_id()])
    assert list(ahead) == [made[3].id]
    own = ahead[made[3].id]
    figures = job_queues.queue_figures(session)[made[3].model]
    cost, num_tokens = made[3].cost, made[3].cost - made[3].num_prompt_tokens
    assert own.load == Load(3, 3 * cost, 3 * num_tokens)
    assert (own.model, own.share, own.num_tokens) == (made[3].model, None, num_tokens)
    assert figures.loads == {made[3].tenant_id: Load(5, 5 * cost, 5 * num_tokens)}
    assert job_queues.positions(session, [made[3].id])[made[3].id].tokens_ahead == own.load.num_tokens


def test_in_a_long_queue_the_place_is_told_from_the_ranks_at_its_ends(session: Session) -> None:
    jobs = [new_job() for _ in range(paces.MAX_COUNTED + 3)]
    accept(session, jobs, max_queued_jobs=len(jobs))
    ids = [job.id for job in jobs]
    session.execute(update(Job).values(available_at=Job.created_at - timedelta(hours=1)))
    session.execute(update(Job).where(Job.id == ids[-1]).values(available_at=Job.created_at))
    asked = [ids[0], ids[paces.MAX_COUNTED - 1], ids[-1]]
    found = paces.own_ahead(session, asked)
    assert [found[id_].load.num_jobs for id_ in asked] == [0, paces.MAX_COUNTED - 1, paces.MAX_COUNTED]
    assert [found[id_].share for id_ in asked] == [None, None, 1.0]
    cost = jobs[0].cost
    assert [found[id_].load.cost for id_ in asked] == [0, (paces.MAX_COUNTED - 1) * cost, paces.MAX_COUNTED * cost]


def test_a_job_that_follows_another_one_has_its_place_and_is_ahead_of_nobody(
    session: Session, make_job: MakeJob, make_tenant: Any
) -> None:
    leader, follower, late = make_job(), make_job(), make_tenant()
    other = make_job(tenant_id=late.id)
    session.execute(update(TenantLoad).where(TenantLoad.tenant_id == late.id).values(virtual_time=1e6))
    session.add(JobFollower(job_id=follower.id, leader_id=leader.id))
    session.commit()

    def places() -> dict[UUID, int]:
        found = job_queues.positions(session, [leader.id, follower.id, other.id])
        return {id_: position.num_ahead for id_, position in found.items()}

    assert places() == {leader.id: 0, follower.id: 0, other.id: 1}
    claim(session, leader.id)
    assert places() == {follower.id: 0, other.id: 0}


def test_a_hopeless_job_is_accepted_only_if_it_was_before(session: Session) -> None:
    job = new_job(idempotency_key="once", eta=Eta.at(2.0))
    [first] = accept(session, [job], max_queued_jobs=9)
    assert session.get_one(Job, first.job_id).eta == [2.0, 2.0, 2.0, 4.5]
    [again] = accept(session, [new_job(idempotency_key="once", hopeless_seconds=60.0)], max_queued_jobs=9)
    assert (again.outcome, again.job_id) == (AcceptOutcome.DUPLICATE, first.job_id)
    [other] = accept(session, [new_job(hopeless_seconds=60.0)], max_queued_jobs=9)
    assert other.outcome is AcceptOutcome.UNATTAINABLE
