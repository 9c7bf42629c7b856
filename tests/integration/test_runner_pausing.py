"""A tenant that waits gets its share of the slots: a long job of another one is paused, and goes on unharmed."""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select

from domain.jobs import JobStatus
from domain.requests import SamplingParams
from domain.structured_output import StructuredOutput
from gpu_worker import intake, pausing
from gpu_worker.engine.fake_tokens import fake_text
from gpu_worker.threads import RunnerEventKind
from metrics import jobs_recomputed_tokens_total
from storage import jobs
from storage.tables import Job
from tests.conftest import MakeTenant
from tests.integration.runner_harness import MODEL, PROMPT, RecordingRunner, Rig
from tests.prepared import PreparedProcess, nursery
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
StartProcess = Callable[[Sequence[UUID]], PreparedProcess]
QUANTUM_SECONDS = 0.1
LONG = 1000  # tokens: five seconds at a step of 5 ms
ENDLESS = 3000  # tokens: longer than any of these tests waits, also on a busy machine
SHORT = 5


@pytest.fixture(autouse=True)
def _frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "LOOK_SECONDS", 0.05)


@pytest.fixture
def noisy(rig: Rig, make_tenant: MakeTenant) -> UUID:
    """A tenant whose long jobs run in both slots, and of which more wait."""
    rig.write_catalog(max_num_seqs=2)
    return make_tenant().id


def start(rig: Rig) -> RecordingRunner:
    return rig.start(pause_quantum_seconds=QUANTUM_SECONDS)


def run_long_jobs(rig: Rig, tenant_id: UUID, worker: RecordingRunner, num_jobs: int = 3) -> list[UUID]:
    job_ids = rig.add_jobs(num_jobs, max_tokens=LONG, tenant_id=tenant_id, cost=3 + LONG)
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids[:2])
    return job_ids


def paused(rig: Rig, job_ids: Sequence[UUID]) -> list[UUID]:
    return [job_id for job_id in job_ids if rig.job(job_id).paused_at is not None]


def test_a_waiting_tenant_starts_and_the_paused_job_goes_on_as_if_nothing_had_been(
    rig: Rig, noisy: UUID, make_tenant: MakeTenant
) -> None:
    worker = start(rig)
    long_jobs = run_long_jobs(rig, noisy, worker)
    quiet = rig.add_jobs(5, max_tokens=SHORT, tenant_id=make_tenant().id)
    wait_until(lambda: all(rig.job(job_id).status is JobStatus.COMPLETED for job_id in quiet), "they have run")
    for job_id in quiet:
        rig.assert_intact(job_id)
        assert rig.job(job_id).attempt == 1
    left = [job_id for job_id in long_jobs if rig.job(job_id).attempt > 1 or rig.job(job_id).paused_at is not None]
    assert left, "its turn did not begin with the end of another job"
    worker.wait_for(RunnerEventKind.ENDED, long_jobs)
    for job_id in long_jobs:
        rig.assert_intact(job_id)
        job = rig.job(job_id)
        assert (job.num_failures, job.num_suspicions, job.paused_at) == (0, 0, None)


def test_a_tenant_that_is_alone_is_never_paused(rig: Rig, noisy: UUID, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[pausing.Exchange] = []

    def look(*arguments: Any, **more: Any) -> pausing.Exchange:
        looks.append(pausing.exchange(*arguments, **more))
        return looks[-1]

    monkeypatch.setattr(intake, "exchange", look)
    worker = start(rig)
    long_jobs = run_long_jobs(rig, noisy, worker)
    wait_until(lambda: len(looks) >= 5, "it has looked")
    assert not any(exchange.claimed or exchange.leaving for exchange in looks)
    assert not paused(rig, long_jobs)


def test_an_engine_that_keeps_no_prefixes_is_left_to_finish(rig: Rig, noisy: UUID, make_tenant: MakeTenant) -> None:
    rig.write_catalog(max_num_seqs=2, keeps_prefixes=False)
    worker = start(rig)
    job_ids = rig.add_jobs(2, max_tokens=200, tenant_id=noisy, cost=203)
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    quiet = rig.add_job(max_tokens=SHORT, tenant_id=make_tenant().id)
    worker.offer([quiet])
    worker.wait_for(RunnerEventKind.ENDED, [*job_ids, quiet])
    assert [rig.job(job_id).attempt for job_id in job_ids] == [1, 1]


def test_tenants_take_turns_at_a_single_slot(rig: Rig, make_tenant: MakeTenant) -> None:
    rig.write_catalog(max_num_seqs=1)
    worker = start(rig)
    job_ids = [
        rig.add_job(max_tokens=ENDLESS, tenant_id=make_tenant().id, params=SamplingParams(n=n, temperature=0.0))
        for n in (1, 1, 2)
    ]
    worker.offer(job_ids)
    wait_until(lambda: all(rig.job(job_id).attempt >= 2 for job_id in job_ids), "each has had two turns")
    assert not any(rig.job(job_id).status is JobStatus.COMPLETED for job_id in job_ids)
    rig.wait_for_tokens(job_ids)
    for job_id in job_ids:
        chunks, seed = rig.chunks(job_id), rig.job(job_id).seed
        assert [chunk.sequence_number for chunk in chunks] == list(range(1, len(chunks) + 1))
        own = [chunk for chunk in chunks if chunk.index == 0]
        num_tokens = sum(len(chunk.token_ids) for chunk in own)
        assert "".join(chunk.text for chunk in own) == fake_text(PROMPT, seed, 0, num_tokens)


def test_two_workers_exchange_no_more_than_the_share(rig: Rig, noisy: UUID, make_tenant: MakeTenant) -> None:
    workers = [start(rig) for _ in range(2)]
    long_jobs = rig.add_jobs(6, max_tokens=ENDLESS, tenant_id=noisy, cost=3 + ENDLESS)
    for worker in workers:
        worker.offer(long_jobs[:2])
    rig.wait_for_tokens(long_jobs[:4])
    quiet = rig.add_jobs(6, max_tokens=ENDLESS, tenant_id=make_tenant().id, cost=3 + ENDLESS)

    def num_running(job_ids: Sequence[UUID]) -> int:
        return sum(rig.job(job_id).status is JobStatus.IN_PROGRESS for job_id in job_ids)

    wait_until(lambda: (num_running(long_jobs), num_running(quiet)) == (2, 2), "both have their shares")
    rig.wait_for_tokens([job_id for job_id in quiet if rig.job(job_id).status is JobStatus.IN_PROGRESS], 100)
    assert (num_running(long_jobs), num_running(quiet)) == (2, 2), "and that is how it stays"


def test_the_slot_between_two_shares_goes_round(rig: Rig, make_tenant: MakeTenant) -> None:
    """Each is due one and a half of three slots. With whole ones, one would have twice as much as the other."""
    rig.write_catalog(max_num_seqs=3)
    worker = start(rig)
    tenants = [make_tenant().id for _ in range(2)]
    job_ids = [rig.add_job(max_tokens=LONG, tenant_id=tenant, cost=3 + LONG) for tenant in tenants for _ in range(3)]
    worker.offer(job_ids)

    def num_tokens() -> list[int]:
        with rig.sessions() as session:
            statement = select(Job.tenant_id, func.sum(Job.num_committed_tokens)).group_by(Job.tenant_id)
            return [total for _, total in session.execute(statement)]

    wait_until(lambda: sum(num_tokens()) > 2400, "800 tokens of each slot")
    less, more = sorted(num_tokens())
    assert more / less < 1.5, (less, more)


def test_service_is_even_while_many_tenants_share_few_slots(rig: Rig, make_tenant: MakeTenant) -> None:
    rig.write_catalog(max_num_seqs=4)
    worker = start(rig)
    tenants = [make_tenant().id for _ in range(10)]
    job_ids = [rig.add_job(max_tokens=1000, tenant_id=tenant, cost=1003) for tenant in tenants for _ in range(2)]
    worker.offer(job_ids)

    def num_tokens() -> list[int]:
        with rig.sessions() as session:
            statement = select(Job.tenant_id, func.sum(Job.num_committed_tokens)).group_by(Job.tenant_id)
            return [total for _, total in session.execute(statement)]

    wait_until(lambda: sum(num_tokens()) > 3000, "300 tokens on average")
    served = num_tokens()
    jain = sum(served) ** 2 / (len(tenants) * sum(total**2 for total in served))
    assert jain >= 0.95, served


@pytest.mark.parametrize("moment", ["while it is paused", "when it has just been resumed"])
def test_a_worker_that_is_killed_meanwhile_loses_and_repeats_nothing(
    rig: Rig, noisy: UUID, make_tenant: MakeTenant, start_process: StartProcess, moment: str
) -> None:
    long_jobs = rig.add_jobs(3, max_tokens=600, tenant_id=noisy, cost=603)
    worker = start_process(long_jobs)
    rig.wait_for_tokens(long_jobs[:2])
    quiet = rig.add_jobs(2, max_tokens=100, tenant_id=make_tenant().id, cost=103)
    wait_until(lambda: paused(rig, long_jobs), "one is paused")
    if moment == "when it has just been resumed":
        wait_until(lambda: any(rig.job(job_id).attempt > 1 for job_id in long_jobs), "it goes on")
    worker.kill()
    worker.wait()
    rescue_until_idle(rig)
    successor = start(rig)
    successor.offer([*long_jobs, *quiet])
    all_jobs = [*long_jobs, *quiet]
    wait_until(lambda: all(rig.job(job_id).status is JobStatus.COMPLETED for job_id in all_jobs), "all have ended")
    for job_id in all_jobs:
        rig.assert_intact(job_id)


@pytest.fixture
def start_process(rig: Rig) -> Iterator[StartProcess]:
    started: list[PreparedProcess] = []

    def start(job_ids: Sequence[UUID]) -> PreparedProcess:
        environment = {
            "CELERIAC_DATABASE_URL": rig.settings.database_url,
            "CELERIAC_REDIS_URL": rig.settings.redis_url,
            "CELERIAC_MODELS_FILE": str(rig.settings.models_file),
            "CELERIAC_LEASE_SECONDS": "1",
            "CELERIAC_PAUSE_QUANTUM_SECONDS": "0.1",
        }
        module, arguments = "tests.integration.runner_process", [*map(str, job_ids)]
        started.append(nursery().start(module, arguments, environment=os.environ | environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def rescue_until_idle(rig: Rig) -> None:
    """The janitor's part: give back what nobody renews."""

    def is_idle() -> bool:
        with rig.sessions.begin() as session:
            jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=0, quiet_seconds=0)
            return session.scalar(select(func.count()).where(Job.status == JobStatus.IN_PROGRESS)) == 0

    wait_until(is_idle, "the leases have lapsed")


GRAMMAR = StructuredOutput(regex="([a-z ]{5}[.] )+")
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True),
    "seeded, two texts with logprobs": SamplingParams(temperature=1.0, n=2, logprobs=2, ignore_eos=True),
    "a grammar": SamplingParams(temperature=1.0, structured_output=GRAMMAR, ignore_eos=True),
}


def test_texts_of_a_real_model_are_those_of_an_unpaused_run(rig: Rig, make_tenant: MakeTenant) -> None:
    """And hardly anything is computed again: what fills less than a block of the cache."""
    lines = ["[[models]]", f'id = "{MODEL}"', f'path = "{ROOT}/models/celeriac-mini"', 'device = "cpu"']
    rig.settings.models_file.write_text("\n".join([*lines, "max_num_seqs = 2", "max_model_len = 1024"]))
    rig.settings = rig.settings.model_copy(update={"flush_min_seconds": 0.02})
    worker = start(rig)

    def run() -> list[UUID]:
        tenant = make_tenant().id  # what it shares with another tenant is not in its cache
        job_ids = [
            rig.add_job(max_tokens=200, params=params, tenant_id=tenant, cost=3 + 200 * params.num_sequences)
            for params in PARAMS.values()
        ]
        worker.offer(job_ids)
        return job_ids

    unpaused = run()
    wait_until(lambda: all(rig.job(job_id).status is JobStatus.COMPLETED for job_id in unpaused), "all have ended")
    recomputed = jobs_recomputed_tokens_total.labels(MODEL)
    num_before = recomputed._value.get()
    job_ids = run()
    other = make_tenant().id
    while not all(rig.job(job_id).status is JobStatus.COMPLETED for job_id in job_ids):
        worker.offer([neighbour := rig.add_job(max_tokens=2, tenant_id=other)])
        worker.wait_for(RunnerEventKind.ENDED, [neighbour])
    num_pauses = sum(rig.job(job_id).attempt - 1 for job_id in job_ids)
    assert num_pauses > 0
    for name, one, two in zip(PARAMS, unpaused, job_ids, strict=True):
        for before, after in zip(rig.result(one).choices, rig.result(two).choices, strict=True):
            assert after.text == before.text, name
            assert (after.num_tokens, after.finish_reason) == (before.num_tokens, before.finish_reason)
            for here, there in zip(before.logprobs or (), after.logprobs or (), strict=True):
                assert there.token_id == here.token_id
                assert there.logprob == pytest.approx(here.logprob, abs=1e-3)
    assert recomputed._value.get() - num_before <= num_pauses * 2 * 16
