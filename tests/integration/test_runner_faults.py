"""Engines and workers that die, hang and come back late: jobs complete, each token once, and the guilty one pays."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus, Lane
from domain.troubles import Trouble
from gpu_worker import intake, quarantine, runner
from gpu_worker.quarantine import QuarantineRules
from gpu_worker.threads import RunnerEventKind
from storage import job_queries, jobs, troubles
from storage.job_statements import PROVEN_TOKENS
from tests.integration.runner_harness import MODEL, RecordingRunner, Rig
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SLOW_STEP_SECONDS = 0.05  # a job that is to be caught running must not be over before
StartProcess = Callable[[Sequence[UUID]], subprocess.Popen[str]]


def wait_until_all_completed(rig: Rig, job_ids: Sequence[UUID]) -> None:
    wait_until(
        lambda: all(rig.job(job_id).status is JobStatus.COMPLETED for job_id in job_ids), "all completed", seconds=40
    )
    for job_id in job_ids:
        rig.assert_intact(job_id)


def offer_when_released(worker: RecordingRunner, job_ids: Sequence[UUID]) -> None:
    """What dispatch does in the whole system."""
    worker.wait_for(RunnerEventKind.RELEASED, job_ids)
    worker.offer(job_ids)


@pytest.fixture
def oom_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the workers of the test take for the kernel's."""
    counters = tmp_path / "proc/vmstat"
    counters.parent.mkdir()
    counters.write_text("nr_free_pages 7\noom_kill 0\n")
    monkeypatch.setattr(quarantine, "SYSTEM_ROOT", tmp_path)
    return counters


@pytest.mark.usefixtures("oom_counters")
def test_jobs_of_a_killed_engine_go_on_where_their_chunks_end(rig: Rig) -> None:
    job_ids = rig.add_jobs(8, max_tokens=200)
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids, at_least=20)
    worker.signal_engine(signal.SIGKILL)
    worker.wait_for(RunnerEventKind.RELEASED, job_ids)
    assert not any(rig.job(job_id).num_suspicions for job_id in job_ids), "somebody's kill is no job's doing"
    worker.offer(job_ids)
    wait_until_all_completed(rig, job_ids)
    for job_id in job_ids:
        job = rig.job(job_id)
        assert (job.attempt, job.num_failures, job.lane) == (2, 1, Lane.STANDARD)
        assert set(rig.attempts_of_chunks(job_id)) == {1, 2}


def test_jobs_of_a_killed_engine_keep_their_adapters(rig: Rig) -> None:
    adapters = ["poems", None, "prose"]
    job_ids = [rig.add_job(adapter=adapter, max_tokens=200) for adapter in adapters]
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids, at_least=20)
    worker.signal_engine(signal.SIGKILL)
    worker.wait_for(RunnerEventKind.RELEASED, job_ids)
    worker.offer(job_ids)
    wait_until_all_completed(rig, job_ids)
    for job_id, adapter in zip(job_ids, adapters, strict=True):
        assert (rig.job(job_id).attempt, rig.job(job_id).adapter) == (2, adapter)
        rig.assert_intact(job_id)
    assert len({rig.result(job_id).choices[0].text for job_id in job_ids}) == 3


def test_a_job_for_an_adapter_that_its_worker_does_not_have_fails_alone(rig: Rig) -> None:
    job_ids = [rig.add_job(adapter="verse"), rig.add_job()]
    worker = rig.start()
    worker.offer(job_ids)
    worker.wait_for(RunnerEventKind.ENDED, job_ids)
    error = rig.job(job_ids[0]).error
    assert error is not None
    assert (error.code, "no adapter 'verse'" in error.message) == ("model_not_found", True)
    rig.assert_intact(job_ids[1])


def test_a_silent_engine_is_killed_and_its_jobs_go_on(rig: Rig) -> None:
    job_ids = rig.add_jobs(4, max_tokens=150)
    worker = rig.start(engine_heartbeat_seconds=0.3)
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    frozen = worker.signal_engine(signal.SIGSTOP)
    offer_when_released(worker, job_ids)
    assert not psutil.pid_exists(frozen)
    wait_until_all_completed(rig, job_ids)


def test_a_job_that_hangs_the_engine_in_its_step_fails_and_its_neighbours_do_not(rig: Rig) -> None:
    rig.write_catalog(hang_at_token=12, hang_seed=99)
    neighbours, guilty = rig.add_jobs(1, max_tokens=40), rig.add_job(seed=99)
    worker = rig.start(engine_heartbeat_seconds=0.2)
    worker.offer([guilty, *neighbours])
    assert_only_the_guilty_one_fails(rig, worker, guilty, neighbours)


def test_a_job_that_crashes_engines_is_isolated_and_fails_alone(rig: Rig) -> None:
    rig.write_catalog(crash_at_token=12, crash_seed=99)
    neighbours, guilty = rig.add_jobs(3, max_tokens=40), rig.add_job(seed=99)
    worker = rig.start()
    worker.offer([guilty, *neighbours])
    assert_only_the_guilty_one_fails(rig, worker, guilty, neighbours)


def test_one_poison_job_costs_at_most_three_engines_and_none_of_sixteen_innocents(rig: Rig) -> None:
    """It crashes in mid-text, when nobody is a newcomer: the recorder alone cannot tell who it was."""
    rig.write_catalog(max_num_seqs=17, crash_at_token=40, crash_seed=99)
    innocents, guilty = rig.add_jobs(16, max_tokens=80), rig.add_job(seed=99, max_tokens=80)
    worker = rig.start()
    worker.offer([guilty, *innocents])
    wait_until(lambda: rig.job(guilty).status is JobStatus.FAILED, "the guilty job has failed")
    wait_until_all_completed(rig, innocents)
    with rig.sessions() as session:
        histories = job_queries.attempts_of(session, [guilty, *innocents])
    crashes = {
        attempt.ended_at for history in histories.values() for attempt in history if attempt.outcome == "crashed"
    }
    assert len(crashes) <= 3, "one statement, and so one time, for each crash"
    assert [attempt.outcome for attempt in histories[guilty]] == ["crashed"] * len(histories[guilty])
    assert histories[guilty][-1].error_code == "poison_job"
    assert all(histories[job_id][-1].outcome == "completed" for job_id in innocents)
    assert worker.unhealthy == []


def assert_only_the_guilty_one_fails(
    rig: Rig, worker: RecordingRunner, guilty: UUID, neighbours: Sequence[UUID]
) -> None:
    wait_until(lambda: rig.job(guilty).status is JobStatus.FAILED, "the guilty job has failed")
    wait_until_all_completed(rig, neighbours)
    job = rig.job(guilty)
    assert job.error is not None
    assert job.error.code == "poison_job"
    assert job.attempt <= 3, "it cost at most three engines"
    assert worker.ends(guilty) == [JobStatus.FAILED]
    assert worker.unhealthy == []


def test_the_isolated_lane_is_served_by_an_idle_worker_in_a_fresh_engine(rig: Rig) -> None:
    worker = rig.start()
    before = rig.add_job()
    worker.offer([before])
    worker.wait_for(RunnerEventKind.ENDED, [before])
    used_pid = worker.engine_pid
    suspect = rig.add_job(lane=Lane.ISOLATED)
    worker.wait_for(RunnerEventKind.ENDED, [suspect])
    rig.assert_intact(suspect)
    assert worker.engine_pid != used_pid


def test_a_suspect_waits_until_it_is_alone_and_others_wait_for_it(rig: Rig) -> None:
    rig.write_catalog(step_seconds=0.02)
    running = rig.add_job(max_tokens=60)
    worker = rig.start(rules=QuarantineRules(busy_look_seconds=0.2, neighbour_seconds=60.0))
    worker.offer([running])
    worker.wait_for(RunnerEventKind.CLAIMED, [running])
    suspect = rig.add_job(lane=Lane.ISOLATED, max_tokens=30)
    worker.wait_for(RunnerEventKind.CLAIMED, [suspect])
    assert worker.runner.num_free == 0
    later = rig.add_job()
    worker.offer([later])
    worker.wait_for(RunnerEventKind.ENDED, [running, suspect, later])
    order = [event.job_id for event in worker.events if event.kind is RunnerEventKind.ENDED]
    assert order == [running, suspect, later]


def test_a_suspect_that_has_proven_itself_leaves_isolation_and_others_join_it(rig: Rig) -> None:
    rig.write_catalog(step_seconds=0.02)
    suspect = rig.add_job(lane=Lane.ISOLATED, num_suspicions=2, max_tokens=1000)
    worker = rig.start()
    worker.wait_for(RunnerEventKind.CLAIMED, [suspect])
    later = rig.add_jobs(2)
    worker.offer(later)
    worker.wait_for(RunnerEventKind.ENDED, later)
    job = rig.job(suspect)
    assert (job.status, job.lane, job.num_suspicions, job.attempt) == (JobStatus.IN_PROGRESS, Lane.STANDARD, 0, 1)
    assert job.num_committed_tokens >= PROVEN_TOKENS


def test_an_engine_that_was_just_loaded_takes_a_suspect_before_all_others(rig: Rig) -> None:
    suspect, others = rig.add_job(lane=Lane.ISOLATED, num_suspicions=2, max_tokens=5), rig.add_jobs(3)
    worker = rig.start(wait=False)
    worker.offer(others)
    worker.wait_for(RunnerEventKind.ENDED, [suspect, *others])
    claimed = [event.job_id for event in worker.events if event.kind is RunnerEventKind.CLAIMED]
    assert claimed[0] == suspect


def test_long_jobs_make_room_for_a_suspect_and_go_on_after_it(rig: Rig) -> None:
    rig.write_catalog(step_seconds=0.02)
    running = rig.add_job(max_tokens=1000)
    worker = rig.start(rules=QuarantineRules(busy_trial_look_seconds=0.2))
    worker.offer([running])
    rig.wait_for_tokens([running])
    suspect = rig.add_job(lane=Lane.ISOLATED, num_suspicions=2, max_tokens=5)
    offer_when_released(worker, [running])
    worker.wait_for(RunnerEventKind.ENDED, [suspect])
    wait_until(lambda: 2 in rig.attempts_of_chunks(running), "the other one goes on")
    assert (rig.job(running).num_failures, rig.job(running).lane) == (0, Lane.STANDARD)


def test_a_kill_that_memory_explains_makes_suspects(rig: Rig, oom_counters: Path) -> None:
    job_ids = rig.add_jobs(2, max_tokens=400)
    worker = rig.start()
    worker.offer(job_ids)
    rig.wait_for_tokens(job_ids)
    oom_counters.write_text("nr_free_pages 7\noom_kill 1\n")
    worker.signal_engine(signal.SIGKILL)
    worker.wait_for(RunnerEventKind.RELEASED, job_ids)
    assert [rig.job(job_id).num_suspicions for job_id in job_ids] == [1, 1]


def test_a_busy_worker_serves_the_isolated_lane_too(rig: Rig) -> None:
    worker = rig.start(rules=QuarantineRules(busy_look_seconds=0.2))
    load = rig.add_jobs(60, max_tokens=60)
    worker.offer(load)
    rig.wait_for_tokens(load[:1])
    suspect = rig.add_job(lane=Lane.ISOLATED)
    worker.wait_for(RunnerEventKind.ENDED, [suspect])
    rig.assert_intact(suspect)
    assert not worker.has_let_go_of(load), "it did not have to wait for the load to end"


def test_an_engine_that_cannot_start_makes_the_worker_unhealthy_not_the_jobs(rig: Rig) -> None:
    rig.write_catalog(no_such_knob=1)
    job_id = rig.add_job()
    worker = rig.start(wait=False)
    worker.offer([job_id])
    wait_until(lambda: worker.unhealthy, "the worker gives up")
    (failure,) = worker.unhealthy
    assert failure.is_lasting
    assert MODEL in failure.reason
    assert "no_such_knob" in failure.reason
    assert worker.runner.num_free == 0
    assert (rig.job(job_id).status, rig.job(job_id).attempt) == (JobStatus.QUEUED, 0)
    wait_until(lambda: told_of(rig) == [Trouble.MODEL], "it tells why")
    worker.runner.stop(release=True)
    assert told_of(rig) == [Trouble.MODEL], "also after its end, as of one that ended by itself"


def test_a_worker_that_is_stopped_on_purpose_takes_along_why_it_gave_a_model_up(rig: Rig) -> None:
    rig.write_catalog(no_such_knob=1)
    worker = rig.start(wait=False)
    wait_until(lambda: told_of(rig) == [Trouble.MODEL], "it tells why")
    worker.runner.forget_failure()
    worker.runner.stop(release=True)
    assert told_of(rig) == []


def test_a_worker_whose_claims_fail_rests_longer_each_time_tells_why_and_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "FIRST_PAUSE_SECONDS", 0.02)
    worker = rig.start()
    with rig.sessions.begin() as session:
        session.execute(text("ALTER TABLE jobs ADD CONSTRAINT refused CHECK (status <> 'in_progress')"))
    job_id = rig.add_job()

    def is_told() -> bool:
        worker.offer([job_id])
        return told_of(rig) == [Trouble.CLAIMS]

    wait_until(is_told, "it tells why")
    wait_until(lambda: worker.runner.num_free == 0, "others have its room meanwhile")
    worker.runner.order_drain(release_after_seconds=0.0)
    wait_until(lambda: told_of(rig) == [], "nobody wants jobs from it")
    worker.runner.order_resume()
    with rig.sessions.begin() as session:
        session.execute(text("ALTER TABLE jobs DROP CONSTRAINT refused"))
    wait_until_all_completed(rig, [job_id])
    wait_until(lambda: told_of(rig) == [], "it is over")


def told_of(rig: Rig) -> list[str]:
    with rig.sessions() as session:
        return [told.code for told in troubles.told_troubles(session)]


def test_a_model_that_was_given_up_after_crashes_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.5)
    worker = rig.start(rules=QuarantineRules(max_crashes=2))
    worker.signal_engine(signal.SIGKILL)
    job_ids = rig.add_jobs(2)
    worker.offer(job_ids[:1])
    worker.wait_for(RunnerEventKind.ENDED, job_ids[:1])  # by another engine
    worker.signal_engine(signal.SIGKILL)
    wait_until(lambda: worker.unhealthy, "the model is given up")
    (failure,) = worker.unhealthy
    assert (failure.is_lasting, failure.is_of_model) == (False, True)
    assert MODEL in failure.reason
    wait_until(lambda: worker.runner.is_healthy and worker.runner.num_free, "it is served again")
    worker.offer(job_ids[1:])
    wait_until_all_completed(rig, job_ids)


def test_a_worker_that_wakes_up_late_is_fenced_off_and_writes_nothing_more(
    rig: Rig, start_process: StartProcess, session_factory: sessionmaker[Session]
) -> None:
    rig.write_catalog(step_seconds=SLOW_STEP_SECONDS)
    job_ids = rig.add_jobs(4, max_tokens=200)
    sleeper = start_process(job_ids)
    rig.wait_for_tokens(job_ids)
    sleeper.send_signal(signal.SIGSTOP)
    rescue_all(session_factory, job_ids)
    rig.write_catalog()
    successor = rig.start()
    successor.offer(job_ids)
    wait_until(lambda: all(2 in rig.attempts_of_chunks(job_id) for job_id in job_ids), "the successor writes")
    sleeper.send_signal(signal.SIGCONT)
    wait_until_all_completed(rig, job_ids)
    for job_id in job_ids:
        attempts = rig.attempts_of_chunks(job_id)
        assert attempts == sorted(attempts)
        assert rig.job(job_id).attempt == 2
    assert sleeper.stdout is not None
    lines = [sleeper.stdout.readline().split() for _ in range(2 * len(job_ids))]
    assert sorted(lines) == sorted([kind, str(id_)] for kind in ("claimed", "released") for id_ in job_ids)


def test_an_engine_does_not_outlive_its_killed_worker(
    rig: Rig, start_process: StartProcess, session_factory: sessionmaker[Session]
) -> None:
    rig.write_catalog(step_seconds=SLOW_STEP_SECONDS)
    job_ids = rig.add_jobs(2, max_tokens=200)
    worker = start_process(job_ids)
    rig.wait_for_tokens(job_ids)
    template, engine = psutil.Process(worker.pid).children(recursive=True)
    worker.kill()
    template.wait()
    engine.wait()
    rescue_all(session_factory, job_ids)
    rig.write_catalog()
    successor = rig.start()
    successor.offer(job_ids)
    wait_until_all_completed(rig, job_ids)


@pytest.fixture
def start_process(rig: Rig) -> Iterator[StartProcess]:
    """Start a runner in a process of its own, with a lease of one second, on the rig's database."""
    started: list[subprocess.Popen[str]] = []

    def start(job_ids: Sequence[UUID]) -> subprocess.Popen[str]:
        environment = os.environ | {
            "CELERIAC_DATABASE_URL": rig.settings.database_url,
            "CELERIAC_REDIS_URL": rig.settings.redis_url,
            "CELERIAC_MODELS_FILE": str(rig.settings.models_file),
            "CELERIAC_LEASE_SECONDS": "1",
        }
        command = [sys.executable, "-m", "tests.integration.runner_process", *map(str, job_ids)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rescue_all(session_factory: sessionmaker[Session], job_ids: Sequence[UUID]) -> None:
    """The janitor's part: give back what nobody renews."""
    rescued: set[UUID] = set()

    def rescue() -> bool:
        with session_factory.begin() as session:
            rescued.update(
                returned.job_id
                for returned in jobs.rescue(session, as_of=datetime.now(UTC), grace_seconds=0, quiet_seconds=0)
            )
        return rescued == set(job_ids)

    wait_until(rescue, "the leases have lapsed")
