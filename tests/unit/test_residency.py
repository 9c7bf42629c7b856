"""Which of a worker's models are loaded, as decided from what their runners tell; times are given, nothing waits."""

from dataclasses import replace

from gpu_worker.residency import ModelMemory, ModelUse

RESIDENCY_SECONDS = 10.0
IDLE = ModelUse(is_allowed=True, has_engine=True, is_ready=True)
BUSY = replace(IDLE, is_busy=True)
GONE = ModelUse(is_allowed=True)


def waiting(since: float, use: ModelUse = GONE) -> ModelUse:
    return replace(use, waiting_since=since)


def memory_of(budget_bytes: int = 10, **need_bytes: int) -> ModelMemory:
    return ModelMemory(need_bytes, budget_bytes=budget_bytes, residency_seconds=RESIDENCY_SECONDS)


def load(memory: ModelMemory, model: str, *, begun_at: float, ready_at: float) -> None:
    """Its engine starts and becomes ready, as its runner would tell."""
    assert memory.update(model, GONE, begun_at)
    memory.update(model, replace(GONE, has_engine=True), begun_at)
    memory.update(model, IDLE, ready_at)


def test_at_the_start_those_are_loaded_that_fit_in_their_order() -> None:
    memory = memory_of(a=6, b=6, c=4)
    assert [memory.update(model, GONE, 0.0) for model in "abc"] == [True, False, True]


def test_a_model_alone_is_always_loaded_whatever_it_needs() -> None:
    memory = memory_of(budget_bytes=10, a=99)
    assert memory.update("a", GONE, 0.0)
    assert memory.update("a", IDLE, 1000.0)


def test_a_model_that_needs_no_memory_is_always_loaded_and_has_no_room_to_make() -> None:
    memory = memory_of(big=99, b=10, remote=0)
    load(memory, "big", begun_at=0.0, ready_at=1.0)
    load(memory, "remote", begun_at=0.0, ready_at=0.5)
    memory.update("big", BUSY, 50.0)
    memory.update("b", waiting(51.0), 51.0)
    assert memory.update("remote", IDLE, 52.0), "the least recently used"
    assert not memory.update("big", BUSY, 53.0)


def test_an_idle_model_makes_room_at_once_and_the_other_waits_until_its_engine_is_gone() -> None:
    memory = memory_of(a=10, b=10)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    assert not memory.update("b", waiting(2.0), 2.0)
    assert not memory.update("a", IDLE, 2.1)  # it is to leave
    assert not memory.update("b", waiting(2.0), 2.2)  # and still takes its memory
    memory.update("a", GONE, 2.3)
    assert memory.update("b", waiting(2.0), 2.4)


def test_a_busy_model_stays_for_its_residency_and_then_until_its_jobs_have_ended() -> None:
    memory = memory_of(a=10, b=10)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    memory.update("a", BUSY, 1.5)
    memory.update("b", waiting(2.0), 2.0)
    assert memory.update("a", BUSY, 1.0 + RESIDENCY_SECONDS - 0.1)
    assert not memory.update("a", BUSY, 1.0 + RESIDENCY_SECONDS + 0.1)
    assert not memory.update("b", waiting(2.0), 50.0)  # however long its jobs run
    memory.update("a", GONE, 60.0)
    assert memory.update("b", waiting(2.0), 60.1)


def test_a_model_stays_at_least_as_long_as_its_load_took() -> None:
    memory = memory_of(a=10, b=10)
    load(memory, "a", begun_at=0.0, ready_at=60.0)
    memory.update("a", BUSY, 60.5)
    memory.update("b", waiting(5.0), 61.0)
    assert memory.update("a", BUSY, 60.0 + RESIDENCY_SECONDS + 1)
    assert not memory.update("a", BUSY, 121.0)


def test_a_model_that_has_left_gets_in_line_behind_the_one_that_it_left_for() -> None:
    """Even if its own waiting jobs are older; otherwise it would take its place back at once."""
    memory = memory_of(a=10, b=10)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    memory.update("b", waiting(5.0), 5.0)
    assert not memory.update("a", waiting(0.5, BUSY), 20.0)
    memory.update("a", waiting(0.5), 21.0)
    assert not memory.update("a", waiting(0.5), 21.1)
    assert memory.update("b", waiting(5.0), 21.2)


def test_a_model_that_was_to_leave_stays_if_nobody_waits_any_more() -> None:
    memory = memory_of(a=10, b=10)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    memory.update("b", waiting(5.0), 5.0)
    assert not memory.update("a", waiting(2.0, BUSY), 20.0)
    memory.update("b", GONE, 20.1)  # its job was cancelled
    assert memory.update("a", waiting(2.0, BUSY), 20.2)


def test_the_least_recently_used_of_the_idle_makes_room() -> None:
    memory = memory_of(a=5, b=5, c=5)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    load(memory, "b", begun_at=0.0, ready_at=1.0)
    memory.update("b", BUSY, 2.0)
    memory.update("a", BUSY, 3.0)
    memory.update("a", IDLE, 4.0)
    memory.update("b", IDLE, 4.0)
    memory.update("c", waiting(5.0), 5.0)
    assert memory.update("a", IDLE, 5.1)
    assert not memory.update("b", IDLE, 5.1)


def test_a_smaller_model_does_not_take_the_room_that_the_first_in_line_needs() -> None:
    memory = memory_of(a=6, b=10, c=4)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    load(memory, "c", begun_at=0.0, ready_at=1.0)
    memory.update("a", BUSY, 2.0)
    memory.update("b", waiting(3.0), 3.0)  # not both may leave yet
    memory.update("b", waiting(3.0), 30.0)
    assert not memory.update("c", IDLE, 30.0)
    memory.update("c", waiting(30.0), 31.0)  # it has left, and would fit
    assert not memory.update("c", waiting(30.0), 31.1)
    memory.update("a", GONE, 40.0)
    assert memory.update("b", waiting(3.0), 40.1)


def test_nobody_leaves_in_vain() -> None:
    memory = memory_of(a=6, b=10, c=4)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    load(memory, "c", begun_at=0.0, ready_at=1.0)
    memory.update("a", BUSY, 2.0)
    memory.update("b", waiting(3.0), 3.0)
    assert memory.update("c", IDLE, 3.1)  # its 4 bytes would not help as long as a stays


def test_a_model_that_an_operator_has_unloaded_takes_no_memory_and_returns_if_there_is_room() -> None:
    memory = memory_of(a=10, b=10)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    unloaded = ModelUse(is_allowed=False)
    assert not memory.update("a", unloaded, 2.0)
    assert memory.update("a", GONE, 3.0)
    memory.update("a", unloaded, 4.0)
    assert memory.update("b", waiting(4.0), 4.1)
    assert not memory.update("a", GONE, 5.0)  # nobody waits for it


def test_what_an_engine_has_measured_replaces_a_lower_estimate() -> None:
    memory = memory_of(a=4, b=4)
    load(memory, "a", begun_at=0.0, ready_at=1.0)
    memory.measure("a", 8)
    memory.update("b", ModelUse(is_allowed=False), 1.0)
    assert not memory.update("b", GONE, 2.0)


def test_the_time_until_a_model_is_ready_counts_the_residency_of_the_other_and_its_load() -> None:
    memory = memory_of(a=10, b=10)
    assert memory.seconds_until_ready("a", 0.0) is None  # nothing has been measured
    load(memory, "a", begun_at=0.0, ready_at=4.0)
    assert memory.seconds_until_ready("a", 4.0) == 0.0
    memory.update("a", BUSY, 5.0)
    memory.update("b", waiting(6.0), 6.0)
    assert memory.seconds_until_ready("b", 6.0) == 4.0 + RESIDENCY_SECONDS - 6.0 + 4.0  # as long as the other's load
    memory.update("a", BUSY, 20.0)
    memory.update("a", GONE, 21.0)
    assert memory.update("b", waiting(6.0), 21.0)
    memory.update("b", replace(GONE, has_engine=True), 22.0)
    assert memory.seconds_until_ready("b", 23.0) == 3.0
