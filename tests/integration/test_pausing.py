"""A tenant that waits gets its share of the slots: a long job of another one is paused, and goes on as if it had not."""

import signal
import threading
from collections.abc import Sequence
from uuid import UUID

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from domain.jobs import AttemptOutcome, JobStatus
from domain.requests import SamplingParams
from gpu_worker import pausing
from gpu_worker.threads import RunnerEventKind
from storage.tables import Job, JobAttempt, TenantLoad
from tests.conftest import MakeTenant
from tests.integration.runner_harness import Rig, RecordingRunner
from tests.waiting import wait_until

QUANTUM = {"pause_quantum_seconds": 0.1}
LONG = 3000  # tokens: 15 seconds at a step of 5 ms
SHORT = 5
CONTEXT = 4096


@pytest.fixture(autouse=True)
def _frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_worker import intake

    monkeypatch.setattr(intake, "LOOK_SECONDS", 0.05)


@pytest.fixture
def noisy(rig: Rig, make_tenant: MakeTenant) -> UUID:
    """A tenant whose long jobs run in both slots, and of which more wait."""
    rig.write_catalog(max_num_seqs=2)
    return make_tenant().id


def run_long_jobs(rig: Rig, tenant_id: UUID, worker: RecordingRunner, num_jobs: int = 4) -> list[UUID]:
    job_ids = rig.add_jobs(num_jobs, max_tokens=LONG, tenant_id=tenant_id, cost=3 + LONG)
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids[:2])
    return job_ids


def paused(rig: Rig, job_ids: Sequence[UUID]) -> list[UUID]:
    return [job_id for job_id in job_ids if rig.job(job_id).paused_at is not None]


def wait_until_one_is_paused(rig: Rig, job_ids: Sequence[UUID]) -> UUID:
    wait_until(lambda: paused(rig, job_ids), "one is paused")
    return paused(rig, job_ids)[0]


def test_a_waiting_tenant_starts_and_the_paused_job_goes_on_as_if_nothing_had_been(
    rig: Rig, noisy: UUID, make_tenant: MakeTenant
) -> None:
    worker = rig.start(**QUANTUM)
    long_jobs = run_long_jobs(rig, noisy, worker)
    quiet = rig.add_jobs(5, max_tokens=SHORT, tenant_id=make_tenant().id)
    wait_until(lambda: all(rig.job(job_id).status is JobStatus.COMPLETED for job_id in quiet), "they have run")
    assert not any(rig.job(job_id).status is JobStatus.COMPLETED for job_id in long_jobs), "none has had to end before"
    for job_id in quiet:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1
    left = [job_id for job_id in long_jobs if rig.job(job_id).attempt > 1 or rig.job(job_id).paused_at is not None]
    assert left
    worker.wait_for(RunnerEventKind.ENDED, long_jobs)
    for job_id in long_jobs:
        rig.assert_intact(job_id)
        job = rig.job(job_id)
        assert (job.num_failures, job.num_suspicions, job.paused_at) == (0, 0, None)
