"""The paged cache of a CPU's attention: where new keys and values go, and how a sequence's blocks come together."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class BlockCache:
    """Keys and values of one layer, (num_blocks, num_kv_heads, block_size, dim): the tokens of a head lie side by side,
    so that gathered blocks are what a CPU's attention kernel reads fastest."""

    keys: Tensor
    values: Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]

    @property
    def num_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def bytes_per_token(self) -> int:
        return self.num_heads * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    def write(self, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """`key` and `value` are (1, num_kv_heads, num_tokens, dim), as the modules hand them over; `rows` are theirs,
        by token, then head."""
        for cache, new in ((self.keys, key), (self.values, value)):
            dim = cache.shape[3]
            cache.view(-1, dim).index_copy_(0, rows, new[0].transpose(0, 1).reshape(-1, dim))

    def gather(self, heads: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """(num_sequences, num_kv_heads, num_tokens, dim) of both; `heads` are those of the wanted blocks, in this
        order."""
        num_kv_heads = self.keys.shape[1]
        keys, values = (
            cache.view(-1, self.block_size * cache.shape[3])
            .index_select(0, heads)
            .view(num_sequences, num_kv_heads, -1, cache.shape[3])
            for cache in (self.keys, self.values)
        )
        return keys, values


def heads_of(block_table: Tensor, num_heads: int) -> Tensor:
    """Row numbers of BlockCache.gather for blocks (num_sequences, num_blocks)."""
    heads = torch.arange(num_heads, device=block_table.device)[:, None]
    return (block_table[:, None] * num_heads + heads).view(-1)
