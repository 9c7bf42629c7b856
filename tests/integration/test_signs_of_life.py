"""Silent processes, judged by what they do: real ones, which compute, sleep, wait, or are stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_worker.engine_process import signs_of_life
from gpu_worker.engine_process.signs_of_life import (
    NUM_IDLE_HEARTBEATS,
    NUM_SILENT_HEARTBEATS,
    RECORDER_BYTES,
    Pulse,
    SignsOfLife,
    create_memory,
    read_usage,
)
from settings import ROOT
from tests.waiting import wait_until

HEARTBEAT_SECONDS = 0.1
PROGRAM = """
import sys, time
from gpu_worker.engine_process.signs_of_life import RECORDER_BYTES
from gpu_worker.engine_process.signs_of_life import Pulse, start_beating
pulse = Pulse(int(sys.argv[1]), offset=RECORDER_BYTES)
pulse.count_step()
{start}
print("ready", flush=True)
{work}
"""
BEATING = f"start_beating(pulse, heartbeat_seconds={HEARTBEAT_SECONDS})"
SLEEPING = "time.sleep(3600)"
LOCKING = "sum(range(10**12))"  # the interpreter's lock is not given up while this runs, and nothing beats
COMPUTING = "while True: pass"


class Silent:
    """A process that never reports, and its judge."""

    def __init__(self, start: str, work: str) -> None:
        memory_fd = create_memory()
        program = PROGRAM.format(start=start, work=work)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(memory_fd)], pass_fds=[memory_fd], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        pulse = Pulse(memory_fd, offset=RECORDER_BYTES)
        self.signs = SignsOfLife(pulse, heartbeat_seconds=HEARTBEAT_SECONDS, now=0.0)
        os.close(memory_fd)
        self.report()

    def report(self, *, step_seconds: float = 0.0) -> None:
        """As if it had."""
        self.heard_at = time.monotonic()
        self.signs.hear(self.heard_at, step_seconds=step_seconds)

    def judge(self) -> str | None:
        time.sleep(0.02)  # as seldom as a runner looks
        return self.signs.judge(time.monotonic(), self.process.pid)

    def verdict(self) -> tuple[str, float]:
        """Why it is to be killed, and after how many heartbeats."""
        reasons: list[str] = []

        def is_judged() -> bool:
            reasons.extend(filter(None, [self.judge()]))
            return bool(reasons)

        wait_until(is_judged, "it is judged")
        return reasons[0], (time.monotonic() - self.heard_at) / HEARTBEAT_SECONDS


MakeSilent = Callable[[str, str], Silent]


@pytest.fixture
def make_silent() -> Iterator[MakeSilent]:
    made: list[Silent] = []

    def make(start: str, work: str) -> Silent:
        made.append(Silent(start, work))
        return made[-1]

    yield make
    for silent in made:
        silent.process.kill()
        silent.process.wait()
        assert silent.process.stdout is not None
        silent.process.stdout.close()


def test_one_that_neither_beats_nor_works_is_dead(make_silent: MakeSilent) -> None:
    reason, num_heartbeats = make_silent("", SLEEPING).verdict()
    assert "no sign of life" in reason
    assert num_heartbeats > NUM_SILENT_HEARTBEATS


def test_one_that_was_stopped_is_dead_whatever_it_did_before(make_silent: MakeSilent) -> None:
    silent = make_silent(BEATING, COMPUTING)
    silent.process.send_signal(signal.SIGSTOP)
    assert "no sign of life" in silent.verdict()[0]


def test_one_that_beats_but_stands_still_is_hung(make_silent: MakeSilent) -> None:
    reason, num_heartbeats = make_silent(BEATING, SLEEPING).verdict()
    assert "its step 1 has made no progress" in reason
    assert num_heartbeats > NUM_IDLE_HEARTBEATS


def test_the_longer_its_steps_were_the_longer_it_may_stand_still(make_silent: MakeSilent) -> None:
    silent = make_silent(BEATING, SLEEPING)
    silent.report(step_seconds=3 * HEARTBEAT_SECONDS)
    _, num_heartbeats = silent.verdict()
    assert num_heartbeats > 30


@pytest.mark.parametrize("start", ["", BEATING])
@pytest.mark.parametrize("work", [LOCKING, COMPUTING])
def test_one_that_computes_is_left_alone_for_long(
    make_silent: MakeSilent, monkeypatch: pytest.MonkeyPatch, start: str, work: str
) -> None:
    monkeypatch.setattr(signs_of_life, "NUM_BUSY_HEARTBEATS", 20)
    monkeypatch.setattr(signs_of_life, "NUM_IDLE_HEARTBEATS", 100)  # a host that takes its cores back is no idleness
    silent = make_silent(start, work)
    usage = read_usage(silent.process.pid)
    assert usage is not None
    reason, num_heartbeats = silent.verdict()
    assert "its step 1 has been computing for" in reason
    assert num_heartbeats > 20
    after = read_usage(silent.process.pid)
    assert after is not None
    assert after.main_run_seconds - usage.main_run_seconds > 15 * HEARTBEAT_SECONDS, "its own time, not that of others"


def test_waiting_for_a_core_is_work(make_silent: MakeSilent) -> None:
    """Of four that share one core, each waits three quarters of the time; idle it is none of it."""
    core = next(iter(os.sched_getaffinity(0)))
    silents = [make_silent("", COMPUTING) for _ in range(4)]
    for silent in silents:
        os.sched_setaffinity(silent.process.pid, {core})
        silent.report()
    deadline = time.monotonic() + 2 * NUM_IDLE_HEARTBEATS * HEARTBEAT_SECONDS
    while time.monotonic() < deadline:
        assert [silent.judge() for silent in silents] == [None] * 4


def test_a_kernel_that_does_not_tell_is_no_witness(tmp_path: Path) -> None:
    assert read_usage(os.getpid(), tmp_path) is None
