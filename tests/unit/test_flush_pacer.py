"""When the pacer flushes: by a clock that the test turns."""

import pytest

from gpu_worker.commits import FlushOutcome, FlushPacer
from gpu_worker.job import RunningJob
from settings import Settings
from tests.runner_parts import make_output, make_running

NOW = 1000.0


@pytest.fixture
def pacer() -> FlushPacer:
    return FlushPacer(Settings(flush_min_seconds=0.1, flush_max_seconds=0.5, lease_seconds=15))


def flush(pacer: FlushPacer, jobs: list[RunningJob], now: float, *, cost_seconds: float = 0.001) -> list[RunningJob]:
    """The jobs of the flush that is due; it succeeds."""
    taken = pacer.take_due(jobs, now)
    if taken:
        pacer.finish(FlushOutcome(cost_seconds=cost_seconds))
    return [flush.job for flush in taken]


def test_the_first_chunk_goes_out_at_once_and_the_next_after_the_interval(pacer: FlushPacer) -> None:
    job = make_running(claimed_at=NOW)
    job.absorb(make_output(job, "a"))
    assert pacer.seconds_until_due([job], NOW) == 0
    assert flush(pacer, [job], NOW) == [job]
    job.absorb(make_output(job, "b"))
    assert flush(pacer, [job], NOW + 0.09) == []
    assert pacer.seconds_until_due([job], NOW + 0.09) == pytest.approx(0.01)
    assert flush(pacer, [job], NOW + 0.1) == [job]


def test_an_end_goes_out_at_once_with_its_finalisation(pacer: FlushPacer) -> None:
    job = make_running(claimed_at=NOW)
    job.absorb(make_output(job, "a"))
    flush(pacer, [job], NOW)
    job.absorb(make_output(job, "b", finish_reason="stop"))
    (taken,) = pacer.take_due([job], NOW + 0.01)
    assert taken.commit is not None
    assert taken.finalisation is not None
    assert taken.finalisation.last_sequence_number == taken.commit.chunks[-1].sequence_number == 2


def test_a_job_that_is_ending_is_not_taken_again(pacer: FlushPacer) -> None:
    job = make_running(claimed_at=NOW)
    job.absorb(make_output(job, "a", finish_reason="stop"))
    assert flush(pacer, [job], NOW) == [job]
    assert flush(pacer, [job], NOW + 100) == []
    assert pacer.seconds_until_due([job], NOW + 100) is None


def test_outputs_gather_while_a_flush_is_under_way(pacer: FlushPacer) -> None:
    job = make_running(claimed_at=NOW)
    job.absorb(make_output(job, "a"))
    pacer.take_due([job], NOW)
    job.absorb(make_output(job, "b"))
    job.absorb(make_output(job, "c"))
    assert pacer.take_due([job], NOW + 100) == []
    pacer.finish(FlushOutcome())
    (taken,) = pacer.take_due([job], NOW + 100)
    assert taken.commit is not None
    assert [chunk.text for chunk in taken.commit.chunks] == ["bc"]


def test_an_urgent_flush_takes_along_what_would_be_due_soon_but_not_what_was_just_flushed(pacer: FlushPacer) -> None:
    steady = make_running(claimed_at=NOW)
    steady.absorb(make_output(steady, "a"))
    flush(pacer, [steady], NOW)
    for delay, expected in ((0.03, 1), (0.07, 2)):
        urgent = make_running(claimed_at=NOW)
        urgent.absorb(make_output(urgent, "x"))
        steady.absorb(make_output(steady, "b"))
        assert len(flush(pacer, [steady, urgent], NOW + delay)) == expected


def test_a_job_without_chunks_renews_its_lease_after_a_third_of_it(pacer: FlushPacer) -> None:
    job = make_running(claimed_at=NOW)
    assert pacer.seconds_until_due([job], NOW) == pytest.approx(5)
    assert flush(pacer, [job], NOW + 4.9) == []
    (taken,) = pacer.take_due([job], NOW + 5)
    assert (taken.commit, taken.finalisation) == (None, None)


def test_the_interval_follows_what_commits_cost_within_its_bounds(pacer: FlushPacer) -> None:
    assert pacer.interval_seconds == 0.1
    for _ in range(50):
        pacer.finish(FlushOutcome(cost_seconds=0.03))
    assert pacer.interval_seconds == pytest.approx(0.3, rel=0.01)
    for _ in range(50):
        pacer.finish(FlushOutcome(cost_seconds=2.0))
    assert pacer.interval_seconds == 0.5


def test_everything_is_taken_on_demand(pacer: FlushPacer) -> None:
    job, quiet = make_running(claimed_at=NOW), make_running(claimed_at=NOW)
    job.absorb(make_output(job, "a"))
    flush(pacer, [job], NOW)
    job.absorb(make_output(job, "b"))
    assert [flush.job for flush in pacer.take([job, quiet], NOW + 0.01)] == [job]
