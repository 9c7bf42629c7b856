"""The supervisor and a real engine process: how it ends is told once, and the next one starts in time."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from domain.catalog import ModelSpec
from gpu_worker.engine_process import supervisor
from gpu_worker.engine_process.frames import AddJob, Report, StepDone, StillAlive
from gpu_worker.engine_process.supervisor import EngineExit, Supervisor
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


class Crank:
    """Turns a supervisor as the runner's thread does."""

    def __init__(self, heartbeat_seconds: float = 5.0, engine_load_seconds: float = 600.0, **knobs: Any) -> None:
        fake = {"step_seconds": 0.005} | knobs
        spec = ModelSpec(id="fake", path="none", backend="fake", max_model_len=4096, fake=fake)
        self.supervisor = Supervisor(spec, heartbeat_seconds=heartbeat_seconds, load_seconds=engine_load_seconds)
        self.reports: list[Report] = []
        self.exits: list[EngineExit] = []

    def turn(self) -> None:
        self.supervisor.flush()
        self.reports += self.supervisor.receive()
        exit_ = self.supervisor.watch(time.monotonic())
        if exit_ is not None:
            self.exits.append(exit_)
            self.supervisor.plan_restart(num_crashes_before=len(self.exits) - 1)

    def turn_until(self, is_true: Callable[[], Any], what: str) -> None:
        def turn() -> Any:
            self.turn()
            return is_true()

        wait_until(turn, what)

    def turn_until_ready(self) -> int:
        """The engine's pid."""
        self.turn_until(lambda: self.supervisor.ready, "the engine is ready")
        assert self.supervisor.ready is not None
        return self.supervisor.ready.pid

    def template_of(self, engine_pid: int) -> psutil.Process:
        template = psutil.Process(engine_pid).parent()
        assert template is not None
        assert template.ppid() == os.getpid()
        return template

    def add(self, job_id: str = "job", *, max_tokens: int = 1000) -> None:
        self.supervisor.send(
            AddJob(
                job_id=job_id,
                attempt=1,
                prompt_token_ids=[1],
                params={},
                max_tokens=max_tokens,
                seed=0,
                priority=0,
                cache_salt="",
                committed_token_ids=[[]],
                num_emitted_chars=[0],
                finished_indexes=[],
            )
        )

    @property
    def num_tokens(self) -> int:
        steps = [report for report in self.reports if isinstance(report, StepDone)]
        return sum(len(output.token_ids) for done in steps for output in done.outputs)


MakeCrank = Callable[..., Crank]


@pytest.fixture
def make_crank() -> Iterator[MakeCrank]:
    cranks: list[Crank] = []

    def make(**options: Any) -> Crank:
        cranks.append(Crank(**options))
        return cranks[-1]

    yield make
    for crank in cranks:
        crank.supervisor.stop()


@pytest.mark.parametrize(
    ("how", "exit_code", "words"),
    [
        ("segv", -signal.SIGSEGV, "SIGSEGV"),
        ("kill", -signal.SIGKILL, "SIGKILL"),
        ("exit", 137, "exit code 137"),
        ("raise", 1, "exit code 1"),
    ],
)
def test_a_crash_tells_how_it_came_and_who_was_in_the_step(
    make_crank: MakeCrank, how: str, exit_code: int, words: str
) -> None:
    crank = make_crank(crash_at_token=8, crash_how=how)
    crank.turn_until_ready()
    crank.add()
    crank.turn_until(lambda: crank.exits, "the engine has crashed")
    (exit_,) = crank.exits
    assert (exit_.exit_code, exit_.was_killed_by_us, exit_.was_ready) == (exit_code, False, True)
    assert words in exit_.description
    assert exit_.is_outside_kill == (how == "kill")
    assert [(job.job_id, job.is_prefill, job.num_steps) for job in exit_.last_step] == [("job", False, 9)]
    assert crank.num_tokens == 8, "everything sent before the crash has been received"


def test_a_crash_at_rest_accuses_nobody(make_crank: MakeCrank) -> None:
    crank = make_crank()
    pid = crank.turn_until_ready()
    crank.add(max_tokens=3)
    crank.turn_until(lambda: crank.num_tokens == 3, "the job is done")
    os.kill(pid, signal.SIGSEGV)
    crank.turn_until(lambda: crank.exits, "the engine has crashed")
    assert crank.exits[0].last_step == []


def test_an_engine_rests_while_nobody_reads_and_goes_on_where_it_was(make_crank: MakeCrank) -> None:
    crank = make_crank(step_seconds=0.01)
    crank.turn_until_ready()
    crank.add(max_tokens=250)
    crank.turn_until(lambda: crank.num_tokens, "the job runs")
    time.sleep(2)  # as a frozen worker does; the engine's patience is an eighth of it
    num_before = crank.num_tokens
    crank.turn()
    assert crank.num_tokens - num_before < 100, "200 steps of work"
    crank.turn_until(lambda: crank.num_tokens == 250, "the job is done")
    assert not crank.exits


def test_an_engine_that_stands_still_in_a_step_is_killed_after_twelve_heartbeats(make_crank: MakeCrank) -> None:
    crank = make_crank(heartbeat_seconds=0.2, hang_at_token=2)
    crank.turn_until_ready()
    crank.add()
    started_at = time.monotonic()
    crank.turn_until(lambda: crank.supervisor.doubt, "it is told before it is killed")
    crank.turn_until(lambda: crank.exits, "the engine is killed")
    assert crank.supervisor.doubt is None
    assert crank.exits[0].was_killed_by_us
    assert not crank.exits[0].is_outside_kill
    assert [job.job_id for job in crank.exits[0].last_step] == ["job"]
    assert time.monotonic() - started_at > 12 * 0.2
    assert "it is alive, but its step 3 has made no progress for" in crank.exits[0].description


def test_an_engine_that_gives_no_sign_of_life_is_killed_after_three_heartbeats(make_crank: MakeCrank) -> None:
    crank = make_crank(heartbeat_seconds=0.2)
    pid = crank.turn_until_ready()
    crank.add()
    crank.turn_until(lambda: crank.num_tokens, "the job runs")
    stopped_at = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    crank.turn_until(lambda: crank.exits, "the engine is killed")
    assert time.monotonic() - stopped_at > 3 * 0.2
    assert "it has shown no sign of life for" in crank.exits[0].description


def test_a_step_of_ten_heartbeats_is_no_death(make_crank: MakeCrank) -> None:
    """Nor are those after it; from the second on, ten times the longest so far is the bound."""
    crank = make_crank(heartbeat_seconds=0.1, step_seconds=1.0)
    pid = crank.turn_until_ready()
    crank.add(max_tokens=3)
    crank.turn_until(lambda: crank.num_tokens == 3, "the job is done")
    assert crank.exits == []
    assert crank.turn_until_ready() == pid


def test_a_load_of_many_heartbeats_is_no_death_but_has_an_end(make_crank: MakeCrank) -> None:
    crank = make_crank(heartbeat_seconds=0.1, load_seconds=3.0)
    crank.turn_until_ready()
    assert crank.exits == []
    hung = make_crank(heartbeat_seconds=0.1, engine_load_seconds=2.0, load_seconds=3600.0)
    hung.turn_until(lambda: hung.exits, "the load is given up")
    assert "it had not loaded its model after 2 s" in hung.exits[0].description
    assert not hung.exits[0].was_ready


def test_an_engine_at_rest_beats_and_is_left_alone(make_crank: MakeCrank) -> None:
    crank = make_crank(heartbeat_seconds=0.1)
    pid = crank.turn_until_ready()
    crank.turn_until(lambda: sum(isinstance(report, StillAlive) for report in crank.reports) >= 8, "eight beats")
    assert crank.exits == []
    assert crank.turn_until_ready() == pid


def test_a_supervisor_that_was_away_itself_does_not_blame_the_engine(make_crank: MakeCrank) -> None:
    crank = make_crank(heartbeat_seconds=0.1)
    pid = crank.turn_until_ready()
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.5)  # as if our own process had been stopped with it
    os.kill(pid, signal.SIGCONT)
    crank.turn()
    beats = len(crank.reports)
    crank.turn_until(lambda: len(crank.reports) > beats, "it beats again")
    assert crank.exits == []


def test_the_next_engine_starts_by_itself_and_is_fresh(make_crank: MakeCrank) -> None:
    crank = make_crank()
    first = crank.turn_until_ready()
    crank.add()
    assert not crank.supervisor.is_fresh
    os.kill(first, signal.SIGKILL)
    crank.turn_until(lambda: crank.exits, "the engine has ended")
    second = crank.turn_until_ready()
    assert second != first
    assert crank.supervisor.is_fresh


def test_crashes_in_a_row_slow_each_other_down(make_crank: MakeCrank) -> None:
    crank = make_crank(load_seconds=3600.0, engine_load_seconds=0.1)
    ended_at: list[float] = []
    for number in range(1, 5):
        crank.turn_until(lambda number=number: len(crank.exits) == number, "a load was given up")  # type: ignore[misc]
        ended_at.append(time.monotonic())
    assert not any(exit_.was_ready for exit_ in crank.exits)
    pauses = [later - earlier for earlier, later in pairwise(ended_at)]
    assert pauses[1] > 0.1 + 0.2
    assert pauses[2] > 0.1 + 0.4


def test_an_engine_that_says_why_it_cannot_load_is_not_tried_again(make_crank: MakeCrank) -> None:
    crank = make_crank(no_such_knob="x" * 5000 + "\n" * 3)
    crank.turn_until(lambda: crank.exits, "the load has failed")
    (exit_,) = crank.exits
    assert not exit_.was_ready
    assert exit_.why_not_loaded is not None
    assert "no_such_knob" in exit_.why_not_loaded
    assert "\n" not in exit_.why_not_loaded
    assert len(exit_.why_not_loaded) <= 520
    assert crank.supervisor.watch(time.monotonic() + 3600) is None
    assert not crank.supervisor.has_engine


def test_a_load_that_is_killed_is_tried_again(make_crank: MakeCrank) -> None:
    crank = make_crank(load_seconds=1.0)
    crank.turn()
    engine = crank.supervisor._engine
    assert engine is not None
    crank.turn_until(lambda: engine.pid, "it is forked")
    os.kill(engine.pid or 0, signal.SIGKILL)
    crank.turn_until(lambda: crank.exits, "it has ended")
    assert crank.exits[0].why_not_loaded is None
    crank.turn_until_ready()


def test_an_import_that_fails_is_told_like_a_load(
    make_crank: MakeCrank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    crank = make_crank()
    crank.supervisor = Supervisor(ModelSpec(id="any", path="none", max_model_len=64), heartbeat_seconds=5.0)
    crank.turn_until(lambda: crank.exits, "the load has failed")
    assert crank.exits[0].why_not_loaded is not None
    assert "cannot import: this torch is broken" in crank.exits[0].why_not_loaded


def test_a_restart_on_purpose_is_no_crash(make_crank: MakeCrank) -> None:
    crank = make_crank()
    first = crank.turn_until_ready()
    crank.supervisor.restart()
    assert not psutil.pid_exists(first)
    assert crank.turn_until_ready() != first
    assert crank.exits == []


def test_engines_are_forked_from_one_template_that_has_one_thread_and_no_torch(make_crank: MakeCrank) -> None:
    crank = make_crank()
    first = crank.turn_until_ready()
    template = crank.template_of(first)
    os.kill(first, signal.SIGSEGV)
    crank.turn_until(lambda: crank.exits, "the engine has crashed")
    assert crank.template_of(crank.turn_until_ready()) == template
    assert template.num_threads() == 1
    assert not any("torch" in mapped.path for mapped in template.memory_maps())


def test_an_engine_ends_with_its_template_and_both_are_replaced(make_crank: MakeCrank) -> None:
    crank = make_crank()
    engine = psutil.Process(crank.turn_until_ready())
    template = crank.template_of(engine.pid)
    template.kill()
    crank.turn_until(lambda: crank.exits, "the engine has ended")
    assert crank.exits[0].is_outside_kill
    engine.wait()
    assert crank.template_of(crank.turn_until_ready()) != template


def test_a_template_that_dies_at_rest_is_replaced_without_a_crash(make_crank: MakeCrank) -> None:
    crank = make_crank()
    first = crank.turn_until_ready()
    template = crank.template_of(first)
    os.kill(first, signal.SIGSEGV)
    wait_until(lambda: not psutil.pid_exists(first), "the template has buried it")
    template.kill()
    wait_until(lambda: template.status() == psutil.STATUS_ZOMBIE, "it is dead")
    assert crank.template_of(crank.turn_until_ready()) != template
    assert [exit_.exit_code for exit_ in crank.exits] == [-signal.SIGSEGV]


def test_a_template_that_cannot_tell_of_its_engines_end_is_replaced(
    make_crank: MakeCrank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LINGER_SECONDS", 0.1)
    crank = make_crank()
    engine_pid = crank.turn_until_ready()
    template = crank.template_of(engine_pid)
    template.suspend()
    os.kill(engine_pid, signal.SIGKILL)
    crank.turn_until(lambda: crank.exits, "the engine is given up")
    assert crank.template_of(crank.turn_until_ready()) != template


def test_stopping_leaves_nobody_behind(make_crank: MakeCrank) -> None:
    crank = make_crank()
    template = crank.template_of(crank.turn_until_ready())
    crank.supervisor.stop()
    assert not template.is_running()


def test_stopping_ends_the_process_even_in_a_frozen_step(make_crank: MakeCrank) -> None:
    crank = make_crank(hang_at_token=0)
    pid = crank.turn_until_ready()
    crank.add()
    crank.supervisor.flush()
    crank.supervisor.stop()
    assert not psutil.pid_exists(pid)


def test_the_engine_does_not_inherit_what_it_must_not_know(
    make_crank: MakeCrank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELERIAC_DATABASE_URL", "postgresql://user:secret@host/name")
    monkeypatch.setenv("CELERIAC_REDIS_URL", "redis://:secret@host/0")
    crank = make_crank()
    environment = psutil.Process(crank.turn_until_ready()).environ()
    assert not any("secret" in value for value in environment.values())
    assert environment["PATH"] == os.environ["PATH"]
