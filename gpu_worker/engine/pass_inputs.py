"""What one pass on a device reads besides weights and cache: laid out on the host, copied over in two transfers.

The tensors on the device keep their addresses, so that a captured pass finds the next step's numbers where it looked
for the last one's. Rows are the decodes, one token each, and then the prompt chunks.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.engine.kv_cache import PADDING_BLOCK
from gpu_worker.engine.scheduler import ScheduledRow

NUM_STAGES = 2  # the host fills one while the device may still be reading the other
FROM_HOST = -1


@dataclass(frozen=True, slots=True)
class PassTensors:
    """Views of two flat buffers, whose addresses depend on `num_tokens` and `num_rows` alone."""

    token_ids: Tensor  # int64 (num_tokens,)
    positions: Tensor  # int64 (num_tokens,)
    slots: Tensor  # int64 (num_tokens,): where each token's key and value go
    sources: Tensor  # int32 (num_rows,): which of the last step's draws is the row's token, or FROM_HOST
    lengths: Tensor  # int32 (num_rows,): tokens of each sequence, the new ones included
    starts: Tensor  # int32 (num_rows + 1,): row i is the tokens starts[i]..starts[i + 1] of the pass
    key_starts: Tensor  # int32 (num_rows + 1,): the same for all tokens of the sequences
    block_tables: Tensor  # int32 (num_rows, max_blocks), padded with the padding block


@dataclass(frozen=True, slots=True)
class FlatBuffers:
    wide: Tensor  # int64
    narrow: Tensor  # int32

    def lay_out(self, num_tokens: int, num_rows: int, max_blocks: int) -> PassTensors:
        token_ids, positions, slots = self.wide[: 3 * num_tokens].view(3, num_tokens)
        sizes = [num_rows, num_rows, num_rows + 1, num_rows + 1, num_rows * max_blocks]
        parts = torch.split(self.narrow[: sum(sizes)], sizes)
        sources, lengths, starts, key_starts = parts[:4]
        table = parts[4].view(num_rows, max_blocks)
        return PassTensors(token_ids, positions, slots, sources, lengths, starts, key_starts, table)


class PassInputs:
    """For passes of up to `max_tokens` tokens of `max_rows` sequences of `max_blocks` blocks."""

    def __init__(self, max_tokens: int, max_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._max_blocks = max_blocks
        self._block_size = block_size
        wide, narrow = 3 * max_tokens, 4 * max_rows + 2 + max_rows * max_blocks
        self._on_device = FlatBuffers(
            torch.zeros(wide, dtype=torch.int64, device=device), torch.zeros(narrow, dtype=torch.int32, device=device)
        )
        is_pinned = device.type == "cuda"
        self._stages = [
            FlatBuffers(
                torch.zeros(wide, dtype=torch.int64, pin_memory=is_pinned),
                torch.zeros(narrow, dtype=torch.int32, pin_memory=is_pinned),
            )
            for _ in range(NUM_STAGES)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * NUM_STAGES
        self._turn = 0

    def tensors(self, num_tokens: int, num_rows: int) -> PassTensors:
        """Those on the device."""
        return self._on_device.lay_out(num_tokens, num_rows, self._max_blocks)

    def load(self, rows: Rows[ScheduledRow], sources: Rows[int], *, num_padding_rows: int = 0) -> PassTensors:
        """The pass over `rows`, decodes first, on its way to the device. Padding rows are one token of the padding
        block, and write to it."""
        self._turn = (self._turn + 1) % NUM_STAGES
        self._wait_for_stage()
        num_rows = len(rows) + num_padding_rows
        num_tokens = sum(row.num_new_tokens for row in rows) + num_padding_rows
        stage = self._stages[self._turn]
        host = stage.lay_out(num_tokens, num_rows, self._max_blocks)
        self._fill(host, rows, sources, num_padding_rows)
        self._copy(stage, 3 * num_tokens, 4 * num_rows + 2 + num_rows * self._max_blocks)
        return self.tensors(num_tokens, num_rows)

    def _wait_for_stage(self) -> None:
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()  # of two steps ago: long done

    def _copy(self, stage: FlatBuffers, num_wide: int, num_narrow: int) -> None:
        self._on_device.wide[:num_wide].copy_(stage.wide[:num_wide], non_blocking=True)
        self._on_device.narrow[:num_narrow].copy_(stage.narrow[:num_narrow], non_blocking=True)
        if self._on_device.wide.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._turn] = event

    def _fill(self, host: PassTensors, rows: Rows[ScheduledRow], sources: Rows[int], num_padding_rows: int) -> None:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for row, source in zip(rows, sources, strict=True):
            start, stop = row.start, row.start + row.num_new_tokens
            token_ids += row.sequence.token_ids[start:stop] if source == FROM_HOST else [0]
            positions += range(start, stop)
            slots += self._slots(row.sequence.block_ids, start, stop)
        padding = [0] * num_padding_rows
        host.token_ids.numpy()[:] = token_ids + padding
        host.positions.numpy()[:] = positions + padding
        host.slots.numpy()[:] = slots + [PADDING_BLOCK * self._block_size] * num_padding_rows
        host.sources.numpy()[:] = [*sources, *[FROM_HOST] * num_padding_rows]
        self._fill_rows(host, rows, num_padding_rows)

    def _fill_rows(self, host: PassTensors, rows: Rows[ScheduledRow], num_padding_rows: int) -> None:
        num_new = [row.num_new_tokens for row in rows] + [1] * num_padding_rows
        lengths = [row.start + row.num_new_tokens for row in rows] + [1] * num_padding_rows
        host.lengths.numpy()[:] = lengths
        for starts, counts in ((host.starts.numpy(), num_new), (host.key_starts.numpy(), lengths)):
            starts[0] = 0
            starts[1:] = counts
            starts.cumsum(out=starts)
        tables = host.block_tables.numpy()
        tables[:] = PADDING_BLOCK
        for table, row, length in zip(tables, rows, lengths, strict=False):
            blocks = row.sequence.block_ids[: -(-length // self._block_size)]
            table[: len(blocks)] = blocks

    def _slots(self, block_ids: list[int], start: int, stop: int) -> list[int]:
        size = self._block_size
        return [block_ids[position // size] * size + position % size for position in range(start, stop)]
