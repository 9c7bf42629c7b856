"""Decoding sequences of about one length, whose gathered keys and values are kept from pass to pass.

Gathering copies all that attention reads, and takes longer than the reading. So a group that goes on as it was, each
sequence one token further, only writes the new tokens behind the ones that it gathered before.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.engine.block_cache import BlockCache, heads_of
from gpu_worker.engine.kv_cache import PADDING_BLOCK
from gpu_worker.engine.sequence import Sequence

MAX_PADDING = 512  # tokens read for nothing by one attention call on a CPU; about the price of another call
MAX_KEPT_BYTES = 2**28  # of gathered keys and values; groups beyond it are gathered in every pass


@dataclass(slots=True)
class DecodeGroup:
    """Rows start..stop of the pass, one new token each."""

    start: int
    stop: int
    block_table: Tensor  # int64 (num_sequences, num_blocks), padded with block 0
    lengths: list[int]  # tokens of each sequence, the new one included; the longest comes first
    kept: dict[int, tuple[Tensor, Tensor]] | None = None  # what is gathered already, by the id of the layer's cache
    _heads: dict[int, Tensor] = field(default_factory=dict)
    _rows: dict[int, Tensor] = field(default_factory=dict)
    _mask_by_window: dict[int | None, Tensor | None] = field(default_factory=dict)

    def read(self, layer: BlockCache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(num_sequences, num_kv_heads, longest, dim) of both. `key` and `value` are those of the pass, as the modules
        hand them over, and in the layer's blocks already."""
        gathered = None if self.kept is None else self.kept.get(id(layer))
        if gathered is None:
            gathered = layer.gather(self._heads_of(layer.num_heads), len(self.lengths))
            if self.kept is not None:
                self.kept[id(layer)] = gathered
        else:
            for tensor, new in zip(gathered, (key, value), strict=True):
                self._write(tensor, new[0, :, self.start : self.stop])
        keys, values = gathered
        return keys[:, :, : self.lengths[0]], values[:, :, : self.lengths[0]]

    def _write(self, gathered: Tensor, new: Tensor) -> None:
        """`new` is (num_kv_heads, num_sequences, dim)."""
        num_kv_heads, num_tokens, dim = gathered.shape[1:]
        if num_kv_heads not in self._rows:
            lasts = torch.tensor(self.lengths, device=gathered.device)[:, None] - 1
            heads = torch.arange(len(self.lengths) * num_kv_heads, device=gathered.device).view(-1, num_kv_heads)
            self._rows[num_kv_heads] = (heads * num_tokens + lasts).view(-1)
        gathered.view(-1, dim).index_copy_(0, self._rows[num_kv_heads], new.transpose(0, 1).reshape(-1, dim))

    def _heads_of(self, num_heads: int) -> Tensor:
        if num_heads not in self._heads:
            self._heads[num_heads] = heads_of(self.block_table, num_heads)
        return self._heads[num_heads]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(num_sequences, 1, 1, max_length), 0 for what each new token sees and -inf; None where it sees all."""
        if window not in self._mask_by_window:
            self._mask_by_window[window] = self._make_mask(window, dtype)
        return self._mask_by_window[window]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        longest = self.lengths[0]
        if min(self.lengths) == longest and (window is None or longest <= window):
            return None
        lengths = torch.tensor(self.lengths, device=self.block_table.device)[:, None]
        positions = torch.arange(longest, device=self.block_table.device)
        mask = positions < lengths
        if window is not None:
            mask &= positions >= lengths - window
        return as_scores(mask[:, None, None], dtype)


def as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernels would make of a mask of booleans, again in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class DecodeGroups:
    """Makes the groups of a pass, and remembers them for the next one to go on with."""

    def __init__(self, layers: Rows[BlockCache]) -> None:
        self._block_size = layers[0].block_size
        self._bytes_per_token = sum(layer.bytes_per_token for layer in layers)
        self._kept: dict[tuple[Sequence, ...], DecodeGroup] = {}

    def take(self, sequences: Rows[Sequence]) -> dict[tuple[Sequence, ...], DecodeGroup]:
        """Groups for these sequences, in this order, the longest first. Nothing is kept from here on until `keep`: a
        pass that fails half way leaves groups that are further in some layers than in others."""
        before, self._kept = self._kept, {}
        lengths = [sequence.num_computed_tokens + 1 for sequence in sequences]
        groups: dict[tuple[Sequence, ...], DecodeGroup] = {}
        num_bytes = 0
        for start, stop in group_by_length(lengths):
            members = tuple(sequences[start:stop])
            group = self._go_on(before.get(members), start, lengths[start:stop]) or DecodeGroup(
                start, stop, self._block_table(members), lengths[start:stop], {}
            )
            num_bytes += group.block_table.numel() * self._block_size * self._bytes_per_token
            if num_bytes > MAX_KEPT_BYTES:
                group.kept = None
            groups[members] = group
        return groups

    def keep(self, groups: dict[tuple[Sequence, ...], DecodeGroup]) -> None:
        self._kept = groups

    def release(self, sequence: Sequence) -> None:
        self._kept = {members: group for members, group in self._kept.items() if sequence not in members}

    def _go_on(self, before: DecodeGroup | None, start: int, lengths: list[int]) -> DecodeGroup | None:
        """The group one token further, where that is what the sequences are and there is room for it."""
        if before is None or before.kept is None or lengths != [length + 1 for length in before.lengths]:
            return None
        if lengths[0] > before.block_table.shape[1] * self._block_size:
            return None
        return DecodeGroup(start, start + len(lengths), before.block_table, lengths, before.kept)

    def _block_table(self, sequences: Rows[Sequence]) -> Tensor:
        """Padded to one more than the blocks of the first sequence, the longest: room to go on."""
        num_blocks = sequences[0].num_computed_tokens // self._block_size + 2
        return torch.tensor([self._padded_blocks(s, num_blocks) for s in sequences])

    def _padded_blocks(self, sequence: Sequence, num_blocks: int) -> list[int]:
        blocks = sequence.block_ids[: sequence.num_computed_tokens // self._block_size + 1]
        return blocks + [PADDING_BLOCK] * (num_blocks - len(blocks))


def group_by_length(lengths: Rows[int]) -> list[tuple[int, int]]:
    """Cut descending lengths into runs, (start, stop), each padded to its longest: a new run begins where going on
    would read more padding than a call of its own costs."""
    groups: list[tuple[int, int]] = []
    start = num_padding = 0
    for number, length in enumerate(lengths):
        num_padding += lengths[start] - length
        if num_padding > MAX_PADDING:
            groups.append((start, number))
            start, num_padding = number, 0
    return [*groups, (start, len(lengths))] if lengths else []
