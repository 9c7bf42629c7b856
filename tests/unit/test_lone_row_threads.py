"""How many threads a step of a single row gets."""

import pytest

from gpu_worker.engine.cpu.threads import PERIOD_STEPS, TRIAL_STEPS, LoneRowThreads


def run_period(threads: LoneRowThreads, seconds_by_threads: dict[int, float]) -> list[int]:
    """The number of threads of each step."""
    used = []
    for _ in range(PERIOD_STEPS):
        used.append(threads.num_threads)
        threads.note(seconds_by_threads[used[-1]])
    return used


@pytest.mark.parametrize(
    ("half_seconds", "chosen"), [pytest.param(1.05, 4, id="as-fast"), pytest.param(1.5, 8, id="slower")]
)
def test_half_of_the_threads_run_a_lone_row_where_that_is_as_fast(half_seconds: float, chosen: int) -> None:
    used = run_period(LoneRowThreads(8), {8: 1.0, 4: half_seconds})
    assert used[: 2 * TRIAL_STEPS] == [8] * TRIAL_STEPS + [4] * TRIAL_STEPS
    assert set(used[2 * TRIAL_STEPS :]) == {chosen}


def test_both_are_tried_again_after_a_while() -> None:
    threads = LoneRowThreads(2)
    assert run_period(threads, {2: 1.0, 1: 1.5})[-1] == 2
    assert run_period(threads, {2: 3.0, 1: 1.5})[-1] == 1


def test_one_thread_stays_one() -> None:
    assert set(run_period(LoneRowThreads(1), {1: 1.0})) == {1}
