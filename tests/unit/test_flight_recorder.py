"""The memory that outlives the engine: who was in its last step."""

import os
from collections.abc import Iterator

import pytest

from gpu_worker.engine_process.signs_of_life import SLOT_BYTES, FlightRecorder, RecordedJob, create_memory


def recorded(job_id: str, *, is_prefill: bool = False, num_steps: int = 10) -> RecordedJob:
    return RecordedJob(job_id, 1, is_prefill, num_steps)


@pytest.fixture
def recorders() -> Iterator[tuple[FlightRecorder, FlightRecorder]]:
    """The engine's and the supervisor's side of one memory."""
    memory_fd = create_memory()
    writer, reader = FlightRecorder(memory_fd), FlightRecorder(memory_fd)
    os.close(memory_fd)
    yield writer, reader
    writer.close()
    reader.close()


def test_the_reader_sees_the_last_step(recorders: tuple[FlightRecorder, FlightRecorder]) -> None:
    writer, reader = recorders
    assert reader.read() == []
    for number in range(5):
        writer.record([recorded(f"job-{number}")])
    assert reader.read() == [recorded("job-4")]
    writer.record([])
    assert reader.read() == []


def test_a_death_in_the_middle_of_a_write_leaves_the_step_before(
    recorders: tuple[FlightRecorder, FlightRecorder],
) -> None:
    writer, reader = recorders
    writer.record([recorded("first")])
    writer.record([recorded("second")])
    writer._memory[20:24] = b"torn"  # step 2 lies in slot 0
    assert reader.read() == [recorded("first")]


def test_more_jobs_than_fit_are_cut_not_refused(recorders: tuple[FlightRecorder, FlightRecorder]) -> None:
    writer, reader = recorders
    jobs = [recorded(f"job_{number:026d}") for number in range(2 * SLOT_BYTES // 34)]
    writer.record(jobs)
    kept = reader.read()
    assert kept == jobs[: len(kept)]
    assert len(kept) > 10_000
