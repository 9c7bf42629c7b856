"""Which of llama.cpp's sequences belongs to which of ours, on a memory that only writes down what it is told."""

import importlib
import os
from typing import Any

import pytest

from domain.jobs import FinishReason
from gpu_worker.engine import llama_cpp
from gpu_worker.engine.llama_cpp.slots import MAX_TURNS, SPARE_CELLS, SlotPool
from gpu_worker.engine.sequence import Sequence
from tests.engine_parts import extend, make_sequence, make_sequences


class Cells:
    """What each slot holds, as far as its owner says."""

    def __init__(self) -> None:
        self.lengths = [0] * 3

    def truncate(self, slot: int, num_tokens: int) -> None:
        assert num_tokens == 0 or num_tokens <= self.lengths[slot], "nothing grows by being cut"
        self.lengths[slot] = num_tokens

    def share(self, source: int, destination: int, num_tokens: int) -> None:
        assert self.lengths[destination] == 0
        assert num_tokens <= self.lengths[source]
        self.lengths[destination] = num_tokens


def make_pool(*, num_cells: int = 100, can_share: bool = True, num_at_once: int = 3) -> tuple[SlotPool, Cells]:
    cells = Cells()
    pool = SlotPool(cells, num_at_once=num_at_once, num_slots=3, num_cells=num_cells, can_share=can_share)
    return pool, cells


def enter(pool: SlotPool, cells: Cells, prompt: list[int], **changes: Any) -> Sequence:
    """Admitted, and computed up to its end."""
    sequence = make_sequence(prompt, **changes)
    assert pool.admit(sequence, num_spare=0)
    compute(cells, sequence)
    return sequence


def compute(cells: Cells, sequence: Sequence) -> None:
    sequence.num_computed_tokens = cells.lengths[sequence.block_ids[0]] = len(sequence.token_ids)


def test_the_next_text_takes_over_the_slot_of_one_that_began_like_it() -> None:
    pool, cells = make_pool()
    first, other = enter(pool, cells, [1, 2, 3, 4]), enter(pool, cells, [9, 9])
    slot = first.block_ids[0]
    pool.free(first)
    pool.free(other)
    next_one = make_sequence([1, 2, 7, 8])
    assert pool.admit(next_one, num_spare=0)
    assert (next_one.block_ids, next_one.num_computed_tokens) == ([slot], 2)
    assert cells.lengths[slot] == 2


def test_a_text_shares_the_beginning_of_one_that_runs_and_computes_its_last_token_itself() -> None:
    pool, cells = make_pool()
    first = enter(pool, cells, [1, 2, 3])
    same = make_sequence([1, 2, 3])
    assert pool.admit(same, num_spare=0)
    assert same.block_ids != first.block_ids
    assert same.num_computed_tokens == cells.lengths[same.block_ids[0]] == 2


def test_tenants_and_scored_prompts_share_nothing() -> None:
    pool, cells = make_pool()
    enter(pool, cells, [1, 2, 3], cache_salt="one")
    assert enter_fresh(pool, [1, 2, 3], cache_salt="another") == 0
    assert enter_fresh(pool, [1, 2, 3], cache_salt="one", prompt_logprobs=1) == 0


def enter_fresh(pool: SlotPool, prompt: list[int], **changes: Any) -> int:
    sequence = make_sequence(prompt, **changes)
    assert pool.admit(sequence, num_spare=0)
    return sequence.num_computed_tokens


def test_what_is_kept_gives_way_and_what_runs_does_not() -> None:
    pool, cells = make_pool(num_cells=10)
    kept, running = enter(pool, cells, [1, 2, 3, 4]), enter(pool, cells, [5, 6, 7, 8])
    pool.free(kept)
    assert pool.usage == 0.4
    assert not pool.admit(make_sequence([9] * 7), num_spare=0)
    assert sum(cells.lengths) == 8, "a text that does not fit drives nothing out"
    assert pool.grow(running, 10)
    assert sum(cells.lengths) == 4
    assert not pool.grow(running, 11)
    assert not pool.admit(make_sequence([1]), num_spare=0)


def test_an_admission_leaves_room_for_those_that_run() -> None:
    pool, cells = make_pool(num_cells=10 + SPARE_CELLS)
    enter(pool, cells, [1, 2])
    assert not pool.admit(make_sequence([9] * 9), num_spare=1)
    assert pool.admit(make_sequence([9] * 8), num_spare=1)


def test_a_slot_beyond_those_that_run_keeps_an_interrupted_text_and_no_finished_one() -> None:
    """Each cell in use makes steps slower."""
    pool, cells = make_pool(num_at_once=1)
    for number in range(4):
        done = enter(pool, cells, [number, number])
        done.finish(FinishReason.STOP)
        pool.free(done)
        assert sum(cells.lengths) == 2
    pool.free(enter(pool, cells, [7, 8, 9]))
    for number in range(4):
        done = enter(pool, cells, [number, number, number])
        done.finish(FinishReason.STOP)
        pool.free(done)
    assert sum(cells.lengths) == 6
    assert enter_fresh(pool, [7, 8, 9]) == 2


def test_an_interrupted_text_that_does_not_come_back_is_not_awaited_for_ever() -> None:
    pool, cells = make_pool(num_at_once=1)
    pool.free(enter(pool, cells, [7, 8, 9]))
    for number in range(3 * MAX_TURNS + 2):
        done = enter(pool, cells, [100 + number])
        done.finish(FinishReason.STOP)
        pool.free(done)
    assert sum(cells.lengths) == 1


def test_siblings_start_on_their_prompt_but_for_its_last_token() -> None:
    pool, cells = make_pool()
    parent, child = make_sequences([1, 2, 3], n=2)
    assert pool.admit(parent, num_spare=0)
    compute(cells, parent)
    extend(parent, [4, 5])
    assert pool.fork(parent, child, num_spare=0) == ()
    assert child.num_computed_tokens == cells.lengths[child.block_ids[0]] == 2


def test_what_cannot_be_trusted_or_cut_is_not_kept() -> None:
    pool, cells = make_pool()
    failed = enter(pool, cells, [1, 2, 3])
    assert pool.forget(failed) == []
    pool.free(failed)
    assert cells.lengths == [0, 0, 0]
    assert enter_fresh(pool, [1, 2, 3]) == 0
    pool, cells = make_pool(can_share=False)
    pool.free(enter(pool, cells, [1, 2, 3]))
    assert cells.lengths == [0, 0, 0]


def test_llama_cpps_threads_sleep_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or another process on one of their cores would stop them all."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    importlib.reload(llama_cpp)
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    importlib.reload(llama_cpp)
    assert os.environ["GOMP_SPINCOUNT"] == "5"
