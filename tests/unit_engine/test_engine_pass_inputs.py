"""What a pass on a device reads: the numbers of its rows, its padding, and buffers that stay where they are."""

import torch

from gpu_worker.engine.cuda.graphs import DecodeGraphs, batch_sizes
from gpu_worker.engine.cuda.runner import FROM_HOST, PassInputs
from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.scheduler import STEPS_PER_RISE, ScheduledRow, TokenBudget
from gpu_worker.engine.sequence import Sequence
from tests.engine_parts import make_sequence

BLOCK = 4


def make_inputs() -> PassInputs:
    return PassInputs(max_tokens=32, max_rows=8, max_blocks=5, block_size=BLOCK, device=torch.device("cpu"))


def seated(pool: BlockPool, num_tokens: int, num_computed: int) -> Sequence:
    """A sequence with blocks for its tokens and one more."""
    sequence = make_sequence(list(range(100, 100 + num_tokens)))
    assert pool.grow(sequence, num_tokens + 1)
    sequence.num_computed_tokens = num_computed
    return sequence


def test_decodes_and_chunks_are_laid_out_in_one_pass() -> None:
    pool = BlockPool(20, BLOCK)
    decode, chunk = seated(pool, 6, 5), seated(pool, 11, 3)  # blocks 1 and 2; 3, 4 and 5
    tensors = make_inputs().load([ScheduledRow(decode, 1), ScheduledRow(chunk, 4)], [FROM_HOST] * 2)
    assert tensors.token_ids.tolist() == [105, 103, 104, 105, 106]
    assert tensors.positions.tolist() == [5, 3, 4, 5, 6]
    assert tensors.slots.tolist() == [2 * BLOCK + 1, 3 * BLOCK + 3, 4 * BLOCK, 4 * BLOCK + 1, 4 * BLOCK + 2]
    assert tensors.lengths.tolist() == [6, 7]
    assert tensors.starts.tolist() == [0, 1, 5]
    assert tensors.key_starts.tolist() == [0, 6, 13]
    assert tensors.block_tables.tolist() == [[1, 2, 0, 0, 0], [3, 4, 0, 0, 0]]


def test_padding_rows_read_and_write_the_padding_block_only() -> None:
    decode = seated(BlockPool(20, BLOCK), 6, 5)
    tensors = make_inputs().load([ScheduledRow(decode, 1)], [FROM_HOST], num_padding_rows=3)
    assert tensors.slots.tolist() == [2 * BLOCK + 1, 0, 0, 0]
    assert tensors.lengths.tolist() == [6, 1, 1, 1]
    assert tensors.starts.tolist() == [0, 1, 2, 3, 4]
    assert tensors.block_tables[1:].sum() == 0
    assert tensors.sources.tolist() == [FROM_HOST] * 4


def test_a_row_that_is_ahead_stands_behind_its_last_token_and_takes_it_from_the_device() -> None:
    sequence = seated(BlockPool(20, BLOCK), 8, 7)
    tensors = make_inputs().load([ScheduledRow(sequence, 1, is_ahead=True)], [3])
    assert tensors.positions.tolist() == [8]
    assert tensors.lengths.tolist() == [9]
    assert tensors.slots.tolist() == [sequence.block_ids[2] * BLOCK]
    assert tensors.sources.tolist() == [3]


def test_passes_of_one_size_lie_at_one_place() -> None:
    inputs, pool = make_inputs(), BlockPool(20, BLOCK)
    first = inputs.load([ScheduledRow(seated(pool, 6, 5), 1)], [FROM_HOST], num_padding_rows=1)
    second = inputs.load([ScheduledRow(seated(pool, 3, 2), 1)], [FROM_HOST], num_padding_rows=1)
    for name in ("token_ids", "positions", "slots", "sources", "lengths", "starts", "key_starts", "block_tables"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
    assert first.lengths.tolist() == [3, 1]


def test_a_batch_runs_in_the_smallest_graph_that_holds_it() -> None:
    assert batch_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert batch_sizes(1) == [1]
    graphs = DecodeGraphs()
    output = torch.zeros(1)
    graphs.capture_all(lambda size: lambda: output, [1, 2, 4, 8], lambda run: run, lambda: True)
    assert [graphs.size_for(count) for count in (1, 3, 8, 9)] == [1, 4, 8, None]


def test_what_cannot_be_captured_runs_eagerly() -> None:
    def refuse(run: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs()
    graphs.capture_all(lambda size: lambda: torch.zeros(1), [1, 2], refuse, lambda: True)  # type: ignore[arg-type]
    assert graphs.sizes == []
    graphs.capture_all(lambda size: lambda: torch.zeros(1), [1, 2], lambda run: run, lambda: False)
    assert graphs.sizes == []


def test_the_token_budget_falls_at_once_and_rises_slowly() -> None:
    budget = TokenBudget(512)
    budget.shrink()
    budget.shrink()
    assert budget.tokens == 128
    for _ in range(STEPS_PER_RISE):
        budget.count_good_step()
    assert budget.tokens == 128 + 32
    for _ in range(10):
        budget.shrink()
    assert budget.is_least
    for _ in range(STEPS_PER_RISE * 16):
        budget.count_good_step()
    assert budget.tokens == 512
