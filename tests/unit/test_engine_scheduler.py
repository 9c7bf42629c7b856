"""Who runs in a step: decodes always, prompts within the budget, the last in rank gives way."""

from typing import Any

from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.scheduler import Scheduler, SchedulerOutput
from gpu_worker.engine.sequence import Sequence
from tests.engine_parts import make_sequence, make_sequences


def make_scheduler(*, num_blocks: int = 64, max_num_seqs: int = 8, budget: int = 16, **more: Any) -> Scheduler:
    pool = BlockPool(num_blocks, block_size=4)
    return Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, **more)


def add(scheduler: Scheduler, num_tokens: int, **changes: Any) -> Sequence:
    """A job with a prompt of its own."""
    sequence = make_sequence([changes.get("arrival", 0) + 1] * num_tokens, **changes)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> SchedulerOutput:
    """Schedule and pretend that the model ran: count what was computed, append a token where one was due."""
    output = scheduler.schedule()
    for row in output.rows:
        needs_token = row.needs_token
        row.sequence.num_computed_tokens += row.num_new_tokens
        scheduler.pool.publish(row.sequence)
        if needs_token:
            row.sequence.append(65)
    return output


def sizes(output: SchedulerOutput) -> dict[Sequence, int]:
    return {row.sequence: row.num_new_tokens for row in output.rows}


def test_prompts_share_the_budget_and_the_rest_comes_in_chunks() -> None:
    scheduler = make_scheduler(budget=16)
    first, second = add(scheduler, 10, arrival=0), add(scheduler, 10, arrival=1)
    assert sizes(step(scheduler)) == {first: 10, second: 6}
    assert sizes(step(scheduler)) == {first: 1, second: 4}
    assert sizes(step(scheduler)) == {first: 1, second: 1}


def test_a_long_prompt_never_stalls_a_decode() -> None:
    scheduler = make_scheduler(budget=8)
    decoding = add(scheduler, 3, arrival=0)
    step(scheduler)
    long = add(scheduler, 40, arrival=1)
    for _ in range(5):
        assert sizes(step(scheduler)) == {decoding: 1, long: 7}


def test_more_decodes_than_budget_neither_wait_nor_keep_others_waiting() -> None:
    scheduler = make_scheduler(budget=4)
    running = [add(scheduler, 1, arrival=number) for number in range(8)]
    for _ in range(5):
        step(scheduler)
    assert sizes(step(scheduler)) == dict.fromkeys(running, 1)


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    first, second, third = (add(scheduler, 2, arrival=number) for number in range(3))
    step(scheduler)
    assert scheduler.running == [first, second]
    scheduler.remove(first)
    step(scheduler)
    assert scheduler.running == [second, third]


def test_higher_priority_is_admitted_first_then_earlier_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for arrival, priority in enumerate((0, 5, 5)):
        add(scheduler, 2, arrival=arrival, priority=priority)
    assert [sequence.job.arrival for sequence in scheduler.waiting] == [1, 2, 0]


def test_the_last_in_rank_gives_way_and_comes_back_with_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=5, budget=64)
    first, last = add(scheduler, 4, arrival=0), add(scheduler, 4, arrival=1)
    outputs = [step(scheduler) for _ in range(6)]
    assert [output.preempted for output in outputs if output.preempted] == [[last]]
    assert scheduler.waiting == [last]
    assert last.num_output_tokens > 0
    tokens = list(last.token_ids)
    scheduler.remove(first)
    output = step(scheduler)
    assert last.token_ids[: len(tokens)] == tokens
    assert list(sizes(output)) == [last]


def test_priority_decides_who_gives_way() -> None:
    scheduler = make_scheduler(num_blocks=5, budget=64)
    add(scheduler, 4, arrival=0, priority=0)
    important = add(scheduler, 4, arrival=1, priority=1)
    for _ in range(6):
        step(scheduler)
    assert scheduler.running == [important]


def test_what_does_not_fit_holds_those_behind_it() -> None:
    scheduler = make_scheduler(num_blocks=9, budget=64)
    add(scheduler, 16, arrival=0)
    step(scheduler)
    large, small = add(scheduler, 20, arrival=1), add(scheduler, 2, arrival=2)
    step(scheduler)
    assert scheduler.waiting == [large, small]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=5, budget=64)
    first, last = add(scheduler, 4, arrival=0), add(scheduler, 4, arrival=1)
    while not step(scheduler).preempted:
        pass
    num_tokens = len(last.token_ids)
    scheduler.remove(first)
    assert sizes(scheduler.schedule())[last] < num_tokens


def test_siblings_wait_for_the_prompt_and_then_fork() -> None:
    scheduler = make_scheduler(budget=8)
    siblings = make_sequences([7] * 10, n=3)
    for sequence in siblings:
        scheduler.add(sequence)
    first, second, third = siblings
    assert sizes(step(scheduler)) == {first: 8}
    assert sizes(step(scheduler)) == {first: 2}
    assert sizes(output := step(scheduler)) == {first: 1, second: 1, third: 1}
    assert len(output.copies) == 2
    assert second.block_ids[:2] == third.block_ids[:2] == first.block_ids[:2]


def test_a_sibling_whose_parent_is_gone_computes_the_prompt_itself() -> None:
    scheduler = make_scheduler(budget=64, max_num_seqs=1)
    first, second = make_sequences([7] * 10, n=2)
    scheduler.add(first)
    scheduler.add(second)
    step(scheduler)
    scheduler.remove(first)
    assert sizes(step(scheduler)) == {second: 2}  # the rest came from the prefix cache


def test_siblings_that_go_on_find_their_own_output_in_the_cache() -> None:
    """Not only the prompt, which is all that they have in common."""
    scheduler = make_scheduler(budget=64)
    siblings = make_sequences([7] * 8, n=2)
    for sequence in siblings:
        scheduler.add(sequence)
    step(scheduler)
    siblings[0].append(66)  # from here on they differ
    siblings[0].num_computed_tokens += 1
    for _ in range(8):
        step(scheduler)
    for sequence in siblings:
        scheduler.preempt(sequence)
    assert all(size <= 4 for size in sizes(step(scheduler)).values()), "less than a block of each is computed again"


def test_without_forks_every_sibling_computes_the_prompt() -> None:
    scheduler = make_scheduler(budget=2**31, can_fork=False)
    siblings = make_sequences([7] * 10, n=2)
    for sequence in siblings:
        scheduler.add(sequence)
    assert sizes(step(scheduler)) == dict.fromkeys(siblings, 10)


def test_cached_tokens_are_counted_once_per_job() -> None:
    scheduler = make_scheduler(budget=64)
    before = add(scheduler, 12, arrival=0)
    step(scheduler)
    siblings = make_sequences(before.token_ids[:12], arrival=1, n=2)
    for sequence in siblings:
        scheduler.add(sequence)
    step(scheduler)
    step(scheduler)
    assert [sequence.num_cached_tokens for sequence in siblings] == [8, 0]
    assert scheduler.num_prefix_cache_hits == 8
