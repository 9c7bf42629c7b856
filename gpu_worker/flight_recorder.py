"""Who was in the engine's last step: a small shared memory that outlives the engine process.

The engine writes before each step, in microseconds; the supervisor reads after the engine's death. Two slots are
written in turn, each with a checksum, so that death in the middle of a write leaves the slot of the step before.
"""

import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence

import msgspec

SHARED_MEMORY = "/dev/shm"  # noqa: S108  (never a name in it, only an unlinked file)
SLOT_BYTES = 512 * 1024
RECORDER_BYTES = 2 * SLOT_BYTES  # then comes a page with the engine's pulse, see signs_of_life.py
RECENT_STEPS = 3  # a job that was admitted this lately is the first suspect

_HEADER = struct.Struct(">QII")  # step number, payload bytes, checksum of the payload


class RecordedJob(msgspec.Struct, frozen=True, array_like=True):
    """A member of a recorded step. `num_steps` counts the steps it has been in, this one included."""

    job_id: str
    attempt: int
    is_prefill: bool
    num_steps: int

    @property
    def weight(self) -> int:
        """How strongly the job is suspected when this step was the last: 2 for newcomers, else 1."""
        return 2 if self.is_prefill or self.num_steps <= RECENT_STEPS else 1


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
