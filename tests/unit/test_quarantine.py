"""Suspicion: who is accused of a crash, who runs alone and when, and what is the worker's own fault."""

import signal
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from domain.jobs import Lane, external_id
from gpu_worker.engine_process.signs_of_life import RecordedJob
from gpu_worker.engine_process.supervisor import EngineExit
from gpu_worker.job import RunningJob
from gpu_worker.quarantine import Action, OomKills, Quarantine, QuarantineRules
from storage.job_statements import PROVEN_TOKENS
from tests.runner_parts import make_output, make_running

OLD = 10  # steps


class Counter:
    """The kernel's, of OOM kills."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "vmstat"
        self.count = 0
        self.write()

    def write(self) -> None:
        self._file.write_text(f"oom_kill {self.count}\n")

    def kill(self) -> None:
        self.count += 1
        self.write()

    def kills(self) -> OomKills:
        return OomKills([self._file])


@pytest.fixture
def counter(tmp_path: Path) -> Counter:
    return Counter(tmp_path)


def recorded(job: RunningJob, *, is_prefill: bool = False, num_steps: int = OLD) -> RecordedJob:
    return RecordedJob(external_id(job.id), job.attempt, is_prefill, num_steps)


def crash(step: Sequence[RecordedJob] = (), *, exit_code: int = -signal.SIGSEGV, by_us: bool = False) -> EngineExit:
    return EngineExit(exit_code=exit_code, was_killed_by_us=by_us, was_ready=True, last_step=list(step))


KILL: dict[str, Any] = {"exit_code": -signal.SIGKILL}


def make_suspect() -> RunningJob:
    return make_running(lane=Lane.ISOLATED, num_suspicions=2)


def test_newcomers_are_accused_most_and_those_outside_the_step_not_at_all(counter: Counter) -> None:
    jobs = [make_running() for _ in range(4)]
    prefilling, recent, old, waiting = jobs
    step = [recorded(prefilling, is_prefill=True, num_steps=0), recorded(recent, num_steps=3), recorded(old)]
    verdict = Quarantine(oom_kills=counter.kills()).judge(crash(step), jobs)
    assert verdict.weight_by_job_id == {prefilling.id: 2, recent.id: 2, old.id: 1, waiting.id: 0}


def test_another_attempt_of_the_same_job_is_not_meant(counter: Counter) -> None:
    job = make_running(attempt=2)
    step = [RecordedJob(job.name, 1, is_prefill=False, num_steps=OLD)]
    assert Quarantine(oom_kills=counter.kills()).judge(crash(step), [job]).weight_by_job_id == {job.id: 0}


def test_a_hung_engine_that_we_kill_is_a_crash_like_any_other(counter: Counter) -> None:
    job = make_running()
    verdict = Quarantine(oom_kills=counter.kills()).judge(crash([recorded(job)], **KILL, by_us=True), [job])
    assert verdict.weight_by_job_id == {job.id: 1}


def test_nobody_is_accused_of_a_kill_from_outside_unless_memory_explains_it(counter: Counter) -> None:
    job = make_running()
    quarantine = Quarantine(oom_kills=counter.kills())
    killed = crash([recorded(job, is_prefill=True)], **KILL)
    verdict = quarantine.judge(killed, [job])
    assert (verdict.weight_by_job_id, verdict.how) == ({job.id: 0}, "killed by SIGKILL by somebody else")
    counter.kill()
    verdict = quarantine.judge(killed, [job])
    assert verdict.weight_by_job_id == {job.id: 1}, "lightly, even a newcomer"
    assert verdict.how == "killed by SIGKILL, probably by the kernel for want of memory"
    assert quarantine.judge(killed, [job]).weight_by_job_id == {job.id: 0}, "that one has been counted"


def test_a_trial_that_memory_ends_convicts_nobody(counter: Counter) -> None:
    quarantine, job = Quarantine(oom_kills=counter.kills()), make_suspect()
    quarantine.admit(job)
    counter.kill()
    assert quarantine.judge(crash([recorded(job)], **KILL), [job]).weight_by_job_id == {job.id: 0}


def test_crashes_that_no_two_of_which_accuse_one_job_are_the_workers(counter: Counter) -> None:
    quarantine = Quarantine(oom_kills=counter.kills())
    for _ in range(3):
        assert not quarantine.is_worker_at_fault
        jobs = [make_running(), make_running()]
        quarantine.judge(crash([recorded(job) for job in jobs]), jobs)
    assert quarantine.is_worker_at_fault


def test_crashes_that_one_job_may_have_made_are_not(counter: Counter) -> None:
    quarantine, poison = Quarantine(oom_kills=counter.kills()), make_running()
    for _ in range(3):
        jobs = [make_running(), poison]
        quarantine.judge(crash([recorded(job) for job in jobs]), jobs)
    assert not quarantine.is_worker_at_fault


def test_kills_from_outside_are_not_the_workers_until_they_are_many(counter: Counter) -> None:
    quarantine = Quarantine(oom_kills=counter.kills())
    for number in range(5):
        assert not quarantine.is_worker_at_fault
        assert quarantine.judge(crash(**KILL), []).num_crashes_before == number
    assert quarantine.is_worker_at_fault


def test_crashes_long_ago_are_forgotten(counter: Counter) -> None:
    rules = QuarantineRules(crash_seconds=0.0, unrelated_seconds=0.0)
    quarantine = Quarantine(rules, counter.kills())
    for _ in range(6):
        assert quarantine.judge(crash(), []).num_crashes_before == 0
    assert not quarantine.is_worker_at_fault


def test_trials_that_end_badly_say_nothing_against_the_worker(counter: Counter) -> None:
    quarantine = Quarantine(oom_kills=counter.kills())
    for _ in range(8):
        poison = make_suspect()
        quarantine.admit(poison)
        verdict = quarantine.judge(crash([recorded(poison)]), [poison])
        quarantine.discharge(poison)
        assert (verdict.weight_by_job_id, verdict.num_crashes_before) == ({poison.id: 1}, 0)
    assert not quarantine.is_worker_at_fault


@pytest.mark.parametrize(
    ("num_suspicions", "is_alone", "is_fresh", "is_ready", "expected"),
    [
        (2, False, True, True, Action.RELEASE_OTHERS),
        (0, False, True, True, Action.WAIT),
        (2, True, False, True, Action.REPLACE_ENGINE),
        (0, True, False, False, Action.REPLACE_ENGINE),
        (2, True, True, False, Action.WAIT),
        (2, True, True, True, Action.START),
        (0, True, True, True, Action.START),
    ],
)
def test_who_must_run_alone_gets_there_step_by_step(
    *, num_suspicions: int, is_alone: bool, is_fresh: bool, is_ready: bool, expected: Action
) -> None:
    rules = QuarantineRules(neighbour_seconds=5.0)
    quarantine, job = Quarantine(rules), make_running(lane=Lane.ISOLATED, num_suspicions=num_suspicions)
    state = {"is_alone": is_alone, "is_engine_fresh": is_fresh, "is_engine_ready": is_ready}
    assert quarantine.next_action(monotonic(), **state) is Action.WAIT, "nobody is here"
    quarantine.admit(job)
    assert quarantine.next_action(job.started_at + 6.0, **state) is expected
    if not is_alone:
        assert quarantine.next_action(job.started_at + 4.0, **state) is Action.WAIT, "the others may end first"
    job.is_in_engine = True
    assert quarantine.next_action(job.started_at + 6.0, **state) is Action.WAIT


def test_a_trial_ends_with_the_sixteenth_new_token_and_the_next_one_is_looked_for_at_once() -> None:
    quarantine, job = Quarantine(), make_suspect()
    assert quarantine.take_look(0.0, is_resting=False) == 0
    quarantine.admit(job)
    for _ in range(PROVEN_TOKENS - 1):
        job.absorb(make_output(job))
    quarantine.discharge_if_clear()
    assert quarantine.job is job
    job.absorb(make_output(job))
    quarantine.discharge_if_clear()
    assert quarantine.job is None
    assert quarantine.take_look(0.1, is_resting=False) == 1


def test_a_confined_job_runs_alone_to_its_end() -> None:
    quarantine, job = Quarantine(), make_running(lane=Lane.ISOLATED)
    quarantine.admit(job)
    job.absorb(make_output(job, token_ids=tuple(range(PROVEN_TOKENS))))
    quarantine.discharge_if_clear()
    assert quarantine.job is job
    quarantine.discharge(make_running())
    assert quarantine.job is job
    quarantine.discharge(job)
    assert quarantine.job is None


def test_a_busy_worker_looks_for_trials_more_often_than_for_the_confined() -> None:
    quarantine = Quarantine(QuarantineRules(idle_look_seconds=2, busy_look_seconds=30, busy_trial_look_seconds=10))
    looks = {second: quarantine.take_look(float(second), is_resting=False) for second in range(32)}
    assert {second: least for second, least in looks.items() if least is not None} == {0: 0, 10: 1, 20: 1, 30: 0}
    assert quarantine.take_look(31.5, is_resting=True) is None
    assert quarantine.take_look(32.0, is_resting=True) == 0
