"""What open streams know of a job holds until something is heard that does not follow on it."""

from typing import Any, cast
from uuid import uuid4

import pytest

from domain.jobs import JobStatus
from domain.requests import TokenChunk
from storage import known_jobs
from storage.job_queries import CHUNKS_PER_READ, JobRecord, StreamState
from storage.known_jobs import KnownJobs, LogPage

JOB_ID = uuid4()


def chunk(number: int, *, is_reset: bool = False) -> TokenChunk:
    return TokenChunk(sequence_number=number, text="a", token_ids=() if is_reset else (1,), is_reset=is_reset)


def state(number: int, status: JobStatus = JobStatus.IN_PROGRESS) -> StreamState:
    return StreamState(status, 1, number)


def known_up_to(number: int, lowest: int = 0) -> KnownJobs:
    known = KnownJobs(lambda job_id: 5)
    page = LogPage(state(number), [chunk(one) for one in range(lowest + 1, number + 1)])
    known.keep_page(JOB_ID, 5, lowest, page)
    return known


def numbers(known: KnownJobs, after: int = 0) -> list[int] | None:
    found = known.page(JOB_ID, after=after)
    return None if found is None else [one.sequence_number for one in found[0].chunks]


def test_it_grows_with_each_chunk_that_follows() -> None:
    known = known_up_to(2)
    for number in (3, 2, 4):  # one is repeated
        known.hear(JOB_ID, chunk(number))
    assert numbers(known) == [1, 2, 3, 4]
    found = known.page(JOB_ID, after=3)
    assert found is not None
    assert found[0].state == state(4)


@pytest.mark.parametrize("heard", [None, chunk(4), chunk(3, is_reset=True)], ids=["a status", "a gap", "a reset"])
def test_anything_else_that_is_heard_ends_it(heard: TokenChunk | None) -> None:
    known = known_up_to(2)
    known.hear(JOB_ID, heard)
    assert numbers(known) is None


@pytest.mark.parametrize(
    "seen", [None, state(3), state(2, JobStatus.QUEUED)], ids=["it is deleted", "there is more", "another status"]
)
def test_a_look_at_sql_that_finds_something_else_ends_it(seen: StreamState | None) -> None:
    known = known_up_to(2)
    known.confirm(JOB_ID, state(2))
    assert numbers(known) == [1, 2]
    known.confirm(JOB_ID, seen)
    assert numbers(known) is None


def test_what_was_read_while_something_was_heard_is_not_kept() -> None:
    known = KnownJobs(lambda job_id: 6)
    known.keep_page(JOB_ID, 5, 0, LogPage(state(1), [chunk(1)]))
    assert numbers(known) is None


@pytest.mark.parametrize(
    "page",
    [
        LogPage(state(3), [chunk(1), chunk(2)]),
        LogPage(state(1, JobStatus.COMPLETED), [chunk(1)]),
        LogPage(None, []),
    ],
    ids=["a part", "the end", "no job"],
)
def test_what_is_not_all_or_may_be_deleted_is_not_kept(page: LogPage) -> None:
    known = KnownJobs(lambda job_id: 5)
    known.keep_page(JOB_ID, 5, 0, page)
    assert numbers(known) is None


def test_it_ends_where_it_would_become_long() -> None:
    known = known_up_to(CHUNKS_PER_READ - 2)
    known.hear(JOB_ID, chunk(CHUNKS_PER_READ - 1))
    assert numbers(known) is not None
    known.hear(JOB_ID, chunk(CHUNKS_PER_READ))
    assert numbers(known) is None


def test_streams_from_before_it_read_for_themselves_and_their_page_takes_its_place() -> None:
    known = known_up_to(9, lowest=5)
    assert numbers(known, after=4) is None
    assert numbers(known, after=9) == [6, 7, 8, 9]
    known.keep_page(JOB_ID, 5, 2, LogPage(state(9), [chunk(one) for one in range(3, 10)]))
    assert numbers(known, after=4) == [3, 4, 5, 6, 7, 8, 9]
    known.keep_page(JOB_ID, 5, 8, LogPage(state(9), [chunk(9)]))
    assert numbers(known, after=4) == [3, 4, 5, 6, 7, 8, 9]


def test_it_ends_unless_it_is_confirmed_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(known_jobs, "monotonic", lambda: now)
    known = known_up_to(1)
    now += known_jobs.KNOWN_SECONDS / 2
    known.confirm(JOB_ID, state(1))
    now += known_jobs.KNOWN_SECONDS
    assert numbers(known) == [1]
    now += 0.1
    assert numbers(known) is None
    known.confirm(JOB_ID, state(1))
    assert numbers(known) == [1]
    now += known_jobs.KNOWN_SECONDS + 0.1
    known.forget_unused()
    known.confirm(JOB_ID, state(1))
    assert numbers(known) is None


def test_a_job_that_was_read_and_does_not_agree_ends_it() -> None:
    known = known_up_to(2)

    def record(number: int, status: JobStatus = JobStatus.IN_PROGRESS) -> JobRecord:
        class FakeJob:
            attempt = 1
            committed_sequence_number = number

        FakeJob.status = status  # type: ignore[attr-defined]
        return JobRecord(cast(Any, FakeJob()), None, None)

    known.keep_record(JOB_ID, 5, record(1))
    known.hear(JOB_ID, chunk(3))
    found = known.record(JOB_ID)
    assert found is not None
    assert found[1].committed_sequence_number == 3
    known.keep_record(JOB_ID, 5, record(4))
    assert known.record(JOB_ID) is None
    assert numbers(known) is None
