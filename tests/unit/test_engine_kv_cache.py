"""Blocks: counted, shared, found again by content, and never another tenant's."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gpu_worker.engine.kv_cache import PADDING_BLOCK, BlockCopy, BlockPool
from gpu_worker.engine.sequence import Sequence
from tests.engine_parts import make_sequence, make_sequences

PROMPT = list(range(1, 11))  # ten tokens: two blocks of four and a half one


def compute(pool: BlockPool, sequence: Sequence) -> None:
    """What a step does to a sequence's accounts."""
    sequence.num_computed_tokens = len(sequence.token_ids)
    pool.publish(sequence)


def admitted(pool: BlockPool, prompt: list[int], **changes: object) -> Sequence:
    sequence = make_sequence(prompt, **changes)
    assert pool.admit(sequence, num_spare=0)
    return sequence


def test_a_sequence_holds_blocks_for_all_its_tokens_and_gives_them_back() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    sequence = admitted(pool, PROMPT)
    assert (len(sequence.block_ids), pool.num_free) == (3, 5)
    assert PADDING_BLOCK not in sequence.block_ids
    pool.free(sequence)
    assert (sequence.block_ids, sequence.num_computed_tokens, pool.num_free) == ([], 0, 8)


def test_growth_takes_a_block_only_when_the_last_one_is_full() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    sequence = admitted(pool, PROMPT)
    assert pool.grow(sequence, 12)
    assert pool.num_free == 1
    assert pool.grow(sequence, 13)
    assert pool.num_free == 0
    assert not pool.grow(sequence, 17)
    assert len(sequence.block_ids) == 4


def test_admission_leaves_the_spare_blocks_free() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    assert not pool.admit(make_sequence(PROMPT), num_spare=2)
    assert pool.num_free == 4
    assert pool.admit(make_sequence(PROMPT), num_spare=1)


def test_a_prefix_is_shared_while_its_first_reader_runs() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    first = admitted(pool, PROMPT)
    compute(pool, first)
    second = admitted(pool, PROMPT)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    assert second.num_computed_tokens == 8
    pool.free(first)
    assert second.block_ids[0] not in admitted(pool, [77] * 20).block_ids


def test_a_prefix_is_found_after_its_last_reader_left() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    first = admitted(pool, PROMPT)
    compute(pool, first)
    pool.free(first)
    assert admitted(pool, [*PROMPT[:8], 99]).num_computed_tokens == 8


def test_one_token_is_always_left_to_compute() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    first = admitted(pool, PROMPT[:8])
    compute(pool, first)
    assert admitted(pool, PROMPT[:8]).num_computed_tokens == 4


def test_nothing_is_found_before_it_is_computed() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    admitted(pool, PROMPT)
    assert admitted(pool, PROMPT).num_computed_tokens == 0


def test_tenants_share_nothing() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    first = admitted(pool, PROMPT, cache_salt="one")
    compute(pool, first)
    assert admitted(pool, PROMPT, cache_salt="two").num_computed_tokens == 0


def test_a_block_counts_only_behind_the_same_prefix() -> None:
    pool = BlockPool(num_blocks=12, block_size=4)
    first = admitted(pool, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    compute(pool, first)
    assert admitted(pool, [2, 2, 2, 2, 2, 2, 2, 2, 3]).num_computed_tokens == 0


def test_the_least_recently_used_block_is_given_up_first_and_its_end_before_its_start() -> None:
    pool = BlockPool(num_blocks=5, block_size=4)
    first = admitted(pool, PROMPT[:9])
    compute(pool, first)
    pool.free(first)
    taken = admitted(pool, [50] * 8)  # the untouched block, then the end of the old sequence
    pool.free(taken)
    assert admitted(pool, PROMPT[:9]).num_computed_tokens == 8


def test_a_fork_shares_full_blocks_and_copies_the_one_both_write_to() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    parent, child = make_sequences(PROMPT, n=2)
    assert pool.admit(parent, num_spare=0)
    compute(pool, parent)
    copies = pool.fork(parent, child, num_spare=0)
    assert copies == (BlockCopy(parent.block_ids[2], child.block_ids[2]),)
    assert child.block_ids[:2] == parent.block_ids[:2]
    assert child.num_computed_tokens == 9


def test_a_fork_at_a_block_boundary_copies_nothing() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    parent, child = make_sequences(PROMPT[:9], n=2)
    assert pool.admit(parent, num_spare=0)
    compute(pool, parent)
    assert pool.fork(parent, child, num_spare=0) == ()
    assert child.block_ids[2] != parent.block_ids[2]


def test_a_fork_that_does_not_fit_takes_nothing() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    parent, child = make_sequences(PROMPT, n=2)
    assert pool.admit(parent, num_spare=0)
    compute(pool, parent)
    assert pool.fork(parent, child, num_spare=0) is None
    assert child.block_ids == []


def test_distrusted_blocks_leave_the_prefix_cache_unless_somebody_else_reads_them() -> None:
    pool = BlockPool(num_blocks=9, block_size=4)
    first = admitted(pool, PROMPT[:9])
    compute(pool, first)
    second = admitted(pool, [*PROMPT[:4], 60, 61, 62, 63, 64])
    compute(pool, second)
    assert pool.forget(second) == second.block_ids[1:]
    pool.free(first)
    pool.free(second)
    assert admitted(pool, [*PROMPT[:4], 60, 61, 62, 63, 64]).num_computed_tokens == 4


class Blocks(RuleBasedStateMachine):
    """Any order of events keeps the books: every block is free or has its readers counted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=12, block_size=2)
        self.sequences: list[Sequence] = []

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9), spare=st.integers(0, 2))
    def admit(self, prompt: list[int], spare: int) -> None:
        sequence, sibling = make_sequences(prompt, n=2)
        if not self.pool.admit(sequence, num_spare=spare):
            return
        compute(self.pool, sequence)
        self.sequences.append(sequence)
        if self.pool.fork(sequence, sibling, num_spare=spare) is not None:
            self.sequences.append(sibling)

    @rule(number=st.integers(0, 20), token=st.integers(1, 2))
    def append(self, number: int, token: int) -> None:
        if self.sequences:
            sequence = self.sequences[number % len(self.sequences)]
            if self.pool.grow(sequence, len(sequence.token_ids) + 1):
                sequence.token_ids.append(token)
                compute(self.pool, sequence)

    @rule(number=st.integers(0, 20), is_distrusted=st.booleans())
    def leave(self, number: int, is_distrusted: bool) -> None:
        if self.sequences:
            sequence = self.sequences.pop(number % len(self.sequences))
            if is_distrusted:
                self.pool.forget(sequence)
            self.pool.free(sequence)

    @invariant()
    def every_block_is_free_or_read(self) -> None:
        read = {block for sequence in self.sequences for block in sequence.block_ids}
        assert PADDING_BLOCK not in read
        assert self.pool.num_free == self.pool.num_blocks - 1 - len(read)

    @invariant()
    def shared_blocks_hold_the_same_tokens(self) -> None:
        content: dict[int, list[int]] = {}
        for sequence in self.sequences:
            for number, block in enumerate(sequence.block_ids[: sequence.num_computed_tokens // 2]):
                tokens = sequence.token_ids[: (number + 1) * 2]
                assert content.setdefault(block, tokens) == tokens


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestBlocks = Blocks.TestCase
