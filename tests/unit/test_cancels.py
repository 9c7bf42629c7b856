"""Cancellations that a worker was asked for go to SQL in few transactions."""

from collections.abc import Iterator, Sequence
from threading import Event
from uuid import UUID

import pytest

from domain.jobs import new_id
from gpu_worker.cancels import MAX_AT_ONCE, Cancels
from gpu_worker.threads import Mailbox, StorageThread
from tests.waiting import wait_until


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.close()


@pytest.fixture
def thread(mailbox: Mailbox) -> Iterator[StorageThread]:
    thread = StorageThread(mailbox.post)
    thread.start()
    yield thread
    thread.stop()


def test_a_storm_of_cancels_is_few_transactions(mailbox: Mailbox, thread: StorageThread) -> None:
    written: list[list[UUID]] = []
    may_go_on = Event()

    def write(job_ids: Sequence[UUID]) -> None:
        may_go_on.wait()
        written.append(list(job_ids))

    cancels = Cancels(thread, write)
    job_ids = [new_id() for _ in range(4 * MAX_AT_ONCE)]
    for job_id in job_ids:
        cancels.add([job_id])
        cancels.add([job_id])  # the same again, as from a client that insists
    may_go_on.set()

    def are_all_written() -> bool:
        mailbox.run_all()
        return {job_id for group in written for job_id in group} == set(job_ids)

    wait_until(are_all_written)
    assert len(written) <= 6


def test_one_that_fails_does_not_hold_up_the_next(mailbox: Mailbox, thread: StorageThread) -> None:
    written: list[UUID] = []

    def write(job_ids: Sequence[UUID]) -> None:
        if not written:
            written.extend(job_ids)
            raise ValueError("no")
        written.extend(job_ids)

    cancels = Cancels(thread, write)
    job_ids = [new_id(), new_id()]
    for job_id in job_ids:
        cancels.add([job_id])

    def are_all_written() -> bool:
        mailbox.run_all()
        return written == job_ids

    wait_until(are_all_written)
