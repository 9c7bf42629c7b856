"""Reads of jobs' logs that streams share."""

import asyncio
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from storage.known_jobs import NEAR_CHUNKS, KnownJobs
from storage.log_reads import LogReads


async def test_what_goes_wrong_with_a_read_is_told_to_its_streams_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw, as of a chunk that a newer release has written."""
    began = asyncio.Event()

    async def fail_at_first(self: LogReads, job_id: UUID, after: int) -> tuple[None, list[Any]]:
        if after == 0:
            began.set()
            await asyncio.sleep(0)
            raise ValueError("a chunk of another release")
        return None, []

    monkeypatch.setattr(LogReads, "_query", fail_at_first)
    reads = LogReads(cast(Any, None), lambda job_id: None, KnownJobs(lambda job_id: None), is_shared=False)
    job_id = uuid4()
    first = asyncio.create_task(reads.read(job_id, after=0))
    await began.wait()
    others = [asyncio.create_task(reads.read(job_id, after=after)) for after in (0, NEAR_CHUNKS + 1)]
    outcomes = await asyncio.gather(first, *others, return_exceptions=True)
    assert [isinstance(outcome, ValueError) for outcome in outcomes] == [True, True, False]


async def test_who_waits_for_a_read_of_a_process_that_stops_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    began = asyncio.Event()

    async def hang(self: LogReads, job_id: UUID, after: int) -> tuple[None, list[Any]]:
        began.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    monkeypatch.setattr(LogReads, "_query", hang)
    reads = LogReads(cast(Any, None), lambda job_id: None, KnownJobs(lambda job_id: None), is_shared=False)
    job_id = uuid4()
    first = asyncio.create_task(reads.read(job_id, after=0))
    await began.wait()
    waiting = asyncio.create_task(reads.read(job_id, after=0))
    await asyncio.sleep(0)
    await reads.aclose()
    outcomes = await asyncio.gather(first, waiting, return_exceptions=True)
    assert [isinstance(outcome, asyncio.CancelledError) for outcome in outcomes] == [True, True]
