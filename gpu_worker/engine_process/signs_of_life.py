"""Tells whether an engine that reports nothing is dead, hung or just slow, and which jobs were in its last step.

On a busy host, all three are equally silent. A thread in the engine therefore counts beats in shared memory, even while
a step or the loading of the model occupies the main thread. In addition, Linux' /proc shows what the process is doing
(https://docs.kernel.org/filesystems/proc.html, https://docs.kernel.org/scheduler/sched-stats.html). A process that
computes, or that waits for a core or a disk, is at work, even if the beats stop because a step holds the interpreter's
lock. Without /proc, only the beats are used.

The same memory holds the flight recorder. Before each step, the engine writes down its jobs, which takes microseconds;
after the engine's death, the supervisor reads them. Two slots are written in turn, each with a checksum, so that a
crash in the middle of a write leaves the previous step readable.
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

RECORDER_BYTES = 2 * SLOT_BYTES  # followed in memory by a page for the Pulse

_HEADER = struct.Struct(">QII")  # step number, payload bytes, checksum of the payload


class RecordedJob(msgspec.Struct, frozen=True, array_like=True):
    """A job in a recorded step. `num_steps` counts the steps that it has been in, this one included."""

    job_id: str
    attempt: int
    is_prefill: bool
    num_steps: int


_encode = msgspec.msgpack.Encoder().encode

_decode = msgspec.msgpack.Decoder(list[RecordedJob]).decode


def create_memory() -> int:
    """A file descriptor of new shared memory for both processes. The file has no name, so nothing is left behind."""
    folder = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(RECORDER_BYTES + mmap.PAGESIZE)
        return os.dup(file.fileno())


class FlightRecorder:
    """The jobs of the last steps in shared memory: the engine records, the supervisor reads. The descriptor is mapped
    and may then be closed."""

    def __init__(self, memory_fd: int) -> None:
        self._memory = mmap.mmap(memory_fd, RECORDER_BYTES)
        self._step_number = 0

    def record(self, jobs: Sequence[RecordedJob]) -> None:
        """Record the jobs of the next step; an empty list means that the engine is idle. A list that is too long is
        cut."""
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


NUM_SILENT_HEARTBEATS = 3  # no sign of life for this long: the process is stopped or dead

NUM_IDLE_HEARTBEATS = 12  # beats, but the main thread neither reports nor works for this long: it is hung

NUM_BUSY_HEARTBEATS = 60  # the main thread computes for this long without a report: an endless loop

IDLE_STEPS, BUSY_STEPS = 10, 20  # the last two bounds in multiples of the longest step so far; the larger bound applies

DOUBT_SECONDS = 2.0  # without work, after a heartbeat without a report

LEAST_WORK = 0.05  # share of the time that counts as work; the beats themselves cost less

BEATS_PER_HEARTBEAT = 4

_NUMBERS = struct.Struct("=QQ")  # number of beats, number of steps begun


class Pulse:
    """Two counters in shared memory at `offset`: the engine counts, the supervisor reads. The descriptor is mapped and
    may then be closed."""

    def __init__(self, memory_fd: int, *, offset: int) -> None:
        self._memory = mmap.mmap(memory_fd, mmap.PAGESIZE, offset=offset)

    def read(self) -> tuple[int, int]:
        """The number of beats and the number of steps begun."""
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
    """Start a thread that counts beats for as long as the process lives."""

    def beat() -> None:
        never = Event()
        while not never.wait(heartbeat_seconds / BEATS_PER_HEARTBEAT):
            pulse.count_beat()

    Thread(target=beat, name="heartbeat", daemon=True).start()


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """The time that a process has used since its start, summed over its threads unless stated otherwise."""

    main_run_seconds: float  # the main thread's time on a core
    run_seconds: float  # time on a core
    wait_seconds: float  # time waiting for a core
    is_waiting_for_disk: bool  # whether the main thread is waiting for a disk now
    num_major_faults: int


@dataclass(slots=True)
class Look:
    """One observation of a silent engine."""

    at: float
    usage: ProcessUsage | None
    num_beats: int


class SignsOfLife:
    """Watches one engine on behalf of its supervisor. All times are from the monotonic clock."""

    def __init__(self, pulse: Pulse, *, heartbeat_seconds: float, now: float) -> None:
        self._pulse = pulse
        self._heartbeat_seconds = heartbeat_seconds
        self._longest_step_seconds = 0.0
        self.hear(now)

    def hear(self, now: float, *, step_seconds: float = 0.0) -> None:
        """Call when the engine has reported."""
        self._longest_step_seconds = max(self._longest_step_seconds, step_seconds)
        self._heard_at = self._sign_at = now
        self._idle_seconds = self._busy_seconds = 0.0
        self._look: Look | None = None

    def judge(self, now: float, pid: int | None) -> str | None:
        """The reason to kill the engine; None if there is none. Call this a few times a second."""
        if now - self._heard_at <= self._heartbeat_seconds:
            return None
        num_beats, num_steps = self._pulse.read()
        last, self._look = self._look, Look(now, None if pid is None else read_usage(pid), num_beats)
        if last is None:
            return None  # it takes two observations to see what the engine is doing
        self._compare(last, self._look)
        if now - self._sign_at > NUM_SILENT_HEARTBEATS * self._heartbeat_seconds:
            return f"it has shown no sign of life for {now - self._sign_at:.1f} s"
        if self._idle_seconds > self._bound(NUM_IDLE_HEARTBEATS, IDLE_STEPS):
            return f"it is alive, but its step {num_steps} has made no progress for {self._idle_seconds:.1f} s"
        if self._busy_seconds > self._bound(NUM_BUSY_HEARTBEATS, BUSY_STEPS):
            return f"its step {num_steps} has been computing for {self._busy_seconds:.1f} s"
        return None

    @property
    def doubt(self) -> str | None:
        """What looks wrong so far, before it is a reason to kill it."""
        if self._idle_seconds > DOUBT_SECONDS:
            return "it neither reports nor works"
        if self._busy_seconds > self._bound(NUM_BUSY_HEARTBEATS, BUSY_STEPS) / 2:
            return "one step takes far longer than all before it"
        return None

    def _bound(self, num_heartbeats: int, num_steps: int) -> float:
        return max(num_heartbeats * self._heartbeat_seconds, num_steps * self._longest_step_seconds)

    def _compare(self, last: Look, look: Look) -> None:
        """Add the time between two observations to the idle time or the busy time."""
        seconds = look.at - last.at
        work_seconds = min(seconds, _work_seconds(last, look))
        self._idle_seconds += seconds - work_seconds
        if look.usage is not None and last.usage is not None:
            self._busy_seconds += min(seconds, look.usage.main_run_seconds - last.usage.main_run_seconds)
        if look.num_beats != last.num_beats or work_seconds > LEAST_WORK * seconds:
            self._sign_at = look.at


def _work_seconds(last: Look, look: Look) -> float:
    """The process's working time between two observations. Waiting for a disk counts as work."""
    before, after = last.usage, look.usage
    if before is None or after is None:
        return 0.0
    if after.num_major_faults != before.num_major_faults or after.is_waiting_for_disk:
        return look.at - last.at
    return after.run_seconds - before.run_seconds + after.wait_seconds - before.wait_seconds


def read_usage(pid: int, proc: Path = Path("/proc")) -> ProcessUsage | None:
    """The usage of a process; None if the kernel does not report it or the process is gone."""
    try:
        state, *numbers = (proc / str(pid) / "stat").read_text().rpartition(") ")[2].split()
        times = dict(_thread_times(proc / str(pid) / "task"))
        main_run_seconds = times[pid][0]
    except (OSError, KeyError, ValueError):
        return None
    return ProcessUsage(
        main_run_seconds=main_run_seconds,
        run_seconds=sum(run for run, _ in times.values()),
        wait_seconds=sum(wait for _, wait in times.values()),
        is_waiting_for_disk=state == "D",
        num_major_faults=int(numbers[8]),
    )


def _thread_times(tasks: Path) -> Iterator[tuple[int, tuple[float, float]]]:
    """For each thread id: seconds on a core, and seconds waiting for one."""
    for task in tasks.iterdir():
        with suppress(FileNotFoundError):  # the thread has just ended
            run, wait, _ = (task / "schedstat").read_text().split()
            yield int(task.name), (int(run) / 1e9, int(wait) / 1e9)
