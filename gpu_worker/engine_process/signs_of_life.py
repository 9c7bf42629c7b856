"""Whether a silent engine is dead, hung or slow, and who was in its last step.

Who was in the engine's last step: a small shared memory that outlives the engine process.

The engine writes before each step, in microseconds; the supervisor reads after the engine's death. Two slots are
written in turn, each with a checksum, so that death in the middle of a write leaves the slot of the step before.

Whether an engine that reports nothing is dead, hung or only slow: on a busy host all of them are silent.

The engine's side is a thread that beats into shared memory, also while a step or a load keeps the main thread. What the
process does is read from Linux' /proc (https://docs.kernel.org/filesystems/proc.html,
https://docs.kernel.org/scheduler/sched-stats.html): whoever computes, waits for a core or waits for a disk is at work,
though the beats may stop with the interpreter's lock. Where there is no /proc the beats are all that is known.
"""

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import msgspec

SHARED_MEMORY = "/dev/shm"  # noqa: S108  (never a name in it, only an unlinked file)

SLOT_BYTES = 512 * 1024

RECORDER_BYTES = 2 * SLOT_BYTES  # then comes a page with the engine's pulse, see signs_of_life.py

_HEADER = struct.Struct(">QII")  # step number, payload bytes, checksum of the payload


class RecordedJob(msgspec.Struct, frozen=True, array_like=True):
    """A member of a recorded step. `num_steps` counts the steps it has been in, this one included."""

    job_id: str
    attempt: int
    is_prefill: bool
    num_steps: int


_encode = msgspec.msgpack.Encoder().encode

_decode = msgspec.msgpack.Decoder(list[RecordedJob]).decode


def create_memory() -> int:
    """A file descriptor of fresh shared memory, for both sides; nameless, so that nothing is left behind."""
    folder = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(RECORDER_BYTES + mmap.PAGESIZE)
        return os.dup(file.fileno())


class FlightRecorder:
    """Either side of the memory; the descriptor may be closed once this exists."""

    def __init__(self, memory_fd: int) -> None:
        self._memory = mmap.mmap(memory_fd, RECORDER_BYTES)
        self._step_number = 0

    def record(self, jobs: Sequence[RecordedJob]) -> None:
        """Write the jobs of the step that comes next; an empty list says that the engine is at rest."""
        self._step_number += 1
        payload = _encode(jobs)
        if len(payload) > SLOT_BYTES - _HEADER.size:
            payload = _encode(jobs[: len(jobs) * (SLOT_BYTES - _HEADER.size) // len(payload)])
        start = self._step_number % 2 * SLOT_BYTES
        self._memory[start + _HEADER.size : start + _HEADER.size + len(payload)] = payload
        self._memory[start : start + _HEADER.size] = _HEADER.pack(self._step_number, len(payload), zlib.crc32(payload))

    def read(self) -> list[RecordedJob]:
        """The jobs of the last recorded step."""
        slots = [self._read_slot(0), self._read_slot(SLOT_BYTES)]
        return max(slots, key=lambda slot: slot[0])[1]

    def close(self) -> None:
        self._memory.close()

    def _read_slot(self, start: int) -> tuple[int, list[RecordedJob]]:
        step_number, length, checksum = _HEADER.unpack_from(self._memory, start)
        payload = self._memory[start + _HEADER.size : start + _HEADER.size + min(length, SLOT_BYTES)]
        if step_number == 0 or zlib.crc32(payload) != checksum:
            return 0, []
        return step_number, _decode(payload)


NUM_SILENT_HEARTBEATS = 3  # without any sign: it is stopped or gone

NUM_IDLE_HEARTBEATS = 12  # of a main thread that neither reports nor works, while the process lives: it is hung

NUM_BUSY_HEARTBEATS = 60  # of computing without a report: it goes round in circles

IDLE_STEPS, BUSY_STEPS = 10, 20  # the same, in steps as long as the longest so far

LEAST_WORK = 0.05  # of the time: less is the beats' own

BEATS_PER_HEARTBEAT = 4

_NUMBERS = struct.Struct("=QQ")  # beats, steps begun


class Pulse:
    """Either side of the shared memory, whose start is this object's; the descriptor may be closed once this exists."""

    def __init__(self, memory_fd: int, *, offset: int) -> None:
        self._memory = mmap.mmap(memory_fd, mmap.PAGESIZE, offset=offset)

    def read(self) -> tuple[int, int]:
        """How often it has beaten, and how many steps were begun."""
        num_beats, num_steps = _NUMBERS.unpack_from(self._memory)
        return num_beats, num_steps

    def count_beat(self) -> None:
        self._count(0)

    def count_step(self) -> None:
        self._count(8)

    def close(self) -> None:
        self._memory.close()

    def _count(self, place: int) -> None:
        (number,) = struct.unpack_from("=Q", self._memory, place)
        struct.pack_into("=Q", self._memory, place, number + 1)


def start_beating(pulse: Pulse, *, heartbeat_seconds: float) -> None:
    """From a thread of its own, for as long as the process lives."""

    def beat() -> None:
        never = Event()
        while not never.wait(heartbeat_seconds / BEATS_PER_HEARTBEAT):
            pulse.count_beat()

    Thread(target=beat, name="heartbeat", daemon=True).start()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used since it started: all its threads together, where it is not said otherwise."""

    main_run_seconds: float  # of the main thread, on a core
    run_seconds: float
    wait_seconds: float  # for a core
    is_waiting_for_disk: bool  # the main thread, now
    num_major_faults: int


@dataclass(slots=True)
class Look:
    """The last one at a silent engine."""

    at: float
    usage: Usage | None
    num_beats: int


class SignsOfLife:
    """Of one engine, as its supervisor sees them. All times are of its monotonic clock."""

    def __init__(self, pulse: Pulse, *, heartbeat_seconds: float, now: float) -> None:
        self._pulse = pulse
        self._heartbeat_seconds = heartbeat_seconds
        self._longest_step_seconds = 0.0
        self.hear(now)

    def hear(self, now: float, *, step_seconds: float = 0.0) -> None:
        """It has reported."""
        self._longest_step_seconds = max(self._longest_step_seconds, step_seconds)
        self._heard_at = self._sign_at = now
        self._idle_seconds = self._busy_seconds = 0.0
        self._look: Look | None = None

    def judge(self, now: float, pid: int | None) -> str | None:
        """Why it is to be killed; None where it is not. To be asked a few times a second."""
        if now - self._heard_at <= self._heartbeat_seconds:
            return None
        num_beats, num_steps = self._pulse.read()
        last, self._look = self._look, Look(now, None if pid is None else read_usage(pid), num_beats)
        if last is None:
            return None  # what it does is known from two looks on
        self._compare(last, self._look)
        if now - self._sign_at > NUM_SILENT_HEARTBEATS * self._heartbeat_seconds:
            return f"it has given no sign of life for {now - self._sign_at:.1f} s"
        if self._idle_seconds > self._bound(NUM_IDLE_HEARTBEATS, IDLE_STEPS):
            return f"it lives, but its step {num_steps} has stood still for {self._idle_seconds:.1f} s"
        if self._busy_seconds > self._bound(NUM_BUSY_HEARTBEATS, BUSY_STEPS):
            return f"its step {num_steps} has computed for {self._busy_seconds:.1f} s"
        return None

    def _bound(self, num_heartbeats: int, num_steps: int) -> float:
        return max(num_heartbeats * self._heartbeat_seconds, num_steps * self._longest_step_seconds)

    def _compare(self, last: Look, look: Look) -> None:
        """Add what happened between two looks to the time it was idle or busy."""
        seconds = look.at - last.at
        work_seconds = min(seconds, _work_seconds(last, look))
        self._idle_seconds += seconds - work_seconds
        if look.usage is not None and last.usage is not None:
            self._busy_seconds += min(seconds, look.usage.main_run_seconds - last.usage.main_run_seconds)
        if look.num_beats != last.num_beats or work_seconds > LEAST_WORK * seconds:
            self._sign_at = look.at


def _work_seconds(last: Look, look: Look) -> float:
    """Between two looks: all of the time where it waits for a disk."""
    before, after = last.usage, look.usage
    if before is None or after is None:
        return 0.0
    if after.num_major_faults != before.num_major_faults or after.is_waiting_for_disk:
        return look.at - last.at
    return after.run_seconds - before.run_seconds + after.wait_seconds - before.wait_seconds


def read_usage(pid: int, proc: Path = Path("/proc")) -> Usage | None:
    """None where the kernel does not tell, or the process is gone."""
    try:
        state, *numbers = (proc / str(pid) / "stat").read_text().rpartition(") ")[2].split()
        times = dict(_thread_times(proc / str(pid) / "task"))
        main_run_seconds = times[pid][0]
    except (OSError, KeyError, ValueError):
        return None
    return Usage(
        main_run_seconds=main_run_seconds,
        run_seconds=sum(run for run, _ in times.values()),
        wait_seconds=sum(wait for _, wait in times.values()),
        is_waiting_for_disk=state == "D",
        num_major_faults=int(numbers[8]),
    )


def _thread_times(tasks: Path) -> Iterator[tuple[int, tuple[float, float]]]:
    """By thread: seconds on a core, and seconds in the queue for one."""
    for task in tasks.iterdir():
        with suppress(FileNotFoundError):  # it has just ended
            run, wait, _ = (task / "schedstat").read_text().split()
            yield int(task.name), (int(run) / 1e9, int(wait) / 1e9)
