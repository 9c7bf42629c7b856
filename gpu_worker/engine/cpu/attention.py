"""Paged attention on a CPU for unmodified transformers models.

It is installed through transformers' AttentionInterface and gets its context as a keyword argument of `forward`. One
forward pass holds the new tokens of all scheduled sequences in one row, (1, num_tokens): first the decodes, one token
each, then the prompt chunks. `paged_attention` writes their keys and values to the paged cache and lets each token
attend only to its own sequence.

Gathering a sequence's blocks copies everything that attention reads, and takes longer than attention itself. Decoding
sequences of similar length therefore form groups. If a group is the same in the next pass, one token later, it only
appends the new tokens to the keys and values that it has gathered before.
"""

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gpu_worker.engine.kv_cache import PADDING_BLOCK
from gpu_worker.engine.sequence import Sequence


@dataclass(slots=True)
class BlockCache:
    """Keys and values of one layer, (num_blocks, num_kv_heads, block_size, dim). The tokens of a head are adjacent in
    memory, which is the layout that torch's CPU attention kernel reads fastest."""

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
        """Write new keys and values. `key` and `value` are (1, num_kv_heads, num_tokens, dim), as modules pass them;
        `rows` is int64 (num_tokens * num_kv_heads,): see AttentionContext.rows."""
        for cache, new in ((self.keys, key), (self.values, value)):
            dim = cache.shape[3]
            cache.view(-1, dim).index_copy_(0, rows, new[0].transpose(0, 1).reshape(-1, dim))

    def gather(self, heads: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Copies of keys and values, each (num_sequences, num_kv_heads, num_tokens, dim), padding included. `heads` are
        the sequences' GatheredBlocks.heads."""
        num_kv_heads = self.keys.shape[1]
        keys, values = (
            cache.view(-1, self.block_size * cache.shape[3])
            .index_select(0, heads)
            .view(num_sequences, num_kv_heads, -1, cache.shape[3])
            for cache in (self.keys, self.values)
        )
        return keys, values


MAX_PADDING = 512  # padding tokens that one attention call may read; costs about as much as another call

MAX_KEPT_BYTES = 2**28  # of gathered keys and values; groups that exceed it are gathered anew in every pass


@dataclass(slots=True)
class GatheredBlocks:
    """The blocks that attention gathers for one or more sequences, in every layer of a pass."""

    block_table: Tensor  # int64 (num_sequences, num_blocks), padded with block 0
    _heads_by_count: dict[int, Tensor] = field(default_factory=dict, init=False)

    def heads(self, num_heads: int) -> Tensor:
        """The row numbers for BlockCache.gather, computed once for all layers with this number of heads."""
        if num_heads not in self._heads_by_count:
            heads = torch.arange(num_heads, device=self.block_table.device)[:, None]
            self._heads_by_count[num_heads] = (self.block_table[:, None] * num_heads + heads).view(-1)
        return self._heads_by_count[num_heads]


@dataclass(slots=True)
class DecodeGroup(GatheredBlocks):
    """Rows start..stop of the pass: one new token of each of the group's sequences."""

    start: int
    stop: int
    lengths: list[int]  # tokens of each sequence, the new one included; the longest comes first
    kept: dict[int, tuple[Tensor, Tensor]] | None = None  # gathered keys and values, by id(layer); None: do not keep
    _rows: dict[int, Tensor] = field(default_factory=dict)
    _mask_by_window: dict[int | None, Tensor | None] = field(default_factory=dict)

    def read(self, layer: BlockCache, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The group's keys and values, each (num_sequences, num_kv_heads, longest, dim). `key` and `value` are those of
        the whole pass, as modules pass them, and must already be in the layer's blocks."""
        gathered = None if self.kept is None else self.kept.get(id(layer))
        if gathered is None:
            gathered = layer.gather(self.heads(layer.num_heads), len(self.lengths))
            if self.kept is not None:
                self.kept[id(layer)] = gathered
        else:
            for tensor, new in zip(gathered, (key, value), strict=True):
                self._write(tensor, new[0, :, self.start : self.stop])
        keys, values = gathered
        return keys[:, :, : self.lengths[0]], values[:, :, : self.lengths[0]]

    def _write(self, gathered: Tensor, new: Tensor) -> None:
        """Append each sequence's new token to what was gathered. `new` is (num_kv_heads, num_sequences, dim)."""
        num_kv_heads, num_tokens, dim = gathered.shape[1:]
        if num_kv_heads not in self._rows:
            lasts = torch.tensor(self.lengths, device=gathered.device)[:, None] - 1
            heads = torch.arange(len(self.lengths) * num_kv_heads, device=gathered.device).view(-1, num_kv_heads)
            self._rows[num_kv_heads] = (heads * num_tokens + lasts).view(-1)
        gathered.view(-1, dim).index_copy_(0, self._rows[num_kv_heads], new.transpose(0, 1).reshape(-1, dim))

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """An additive mask, (num_sequences, 1, 1, longest): 0 for tokens that the new token sees, else -inf. None if
        every new token sees all tokens."""
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
    """Turn a boolean mask into an additive one. Given a boolean mask, torch would do this again in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


class DecodeGroups:
    """Makes the decode groups of each pass, continuing those of the previous pass where it can."""

    def __init__(self, layers: Rows[BlockCache]) -> None:
        self._block_size = layers[0].block_size
        self._bytes_per_token = sum(layer.bytes_per_token for layer in layers)
        self._kept: dict[tuple[Sequence, ...], DecodeGroup] = {}

    def take(self, sequences: Rows[Sequence]) -> dict[tuple[Sequence, ...], DecodeGroup]:
        """Groups for these sequences, which must be given longest first.

        The groups are kept for the next pass only once `keep` is called, since a pass that fails halfway leaves groups
        that have advanced in some layers but not in others.
        """
        before, self._kept = self._kept, {}
        lengths = [sequence.num_computed_tokens + 1 for sequence in sequences]
        groups: dict[tuple[Sequence, ...], DecodeGroup] = {}
        num_bytes = 0
        for start, stop in group_by_length(lengths):
            members = tuple(sequences[start:stop])
            group = self._extended(before.get(members), start, lengths[start:stop]) or DecodeGroup(
                self._block_table(members), start, stop, lengths[start:stop], {}
            )
            num_bytes += group.block_table.numel() * self._block_size * self._bytes_per_token
            if num_bytes > MAX_KEPT_BYTES:
                group.kept = None
            groups[members] = group
        return groups

    def keep(self, groups: dict[tuple[Sequence, ...], DecodeGroup]) -> None:
        self._kept = groups

    def discard(self, sequence: Sequence) -> None:
        self._kept = {members: group for members, group in self._kept.items() if sequence not in members}

    def _extended(self, before: DecodeGroup | None, start: int, lengths: list[int]) -> DecodeGroup | None:
        """The group advanced by one token; None unless all its sequences have advanced by one and there is room."""
        if before is None or before.kept is None or lengths != [length + 1 for length in before.lengths]:
            return None
        if lengths[0] > before.block_table.shape[1] * self._block_size:
            return None
        return DecodeGroup(before.block_table, start, start + len(lengths), lengths, before.kept)

    def _block_table(self, sequences: Rows[Sequence]) -> Tensor:
        """The sequences' block table, padded to one block more than the first and longest one has, as room to grow."""
        num_blocks = sequences[0].num_computed_tokens // self._block_size + 2
        return torch.tensor([self._padded_blocks(s, num_blocks) for s in sequences])

    def _padded_blocks(self, sequence: Sequence, num_blocks: int) -> list[int]:
        blocks = sequence.block_ids[: sequence.num_computed_tokens // self._block_size + 1]
        return blocks + [PADDING_BLOCK] * (num_blocks - len(blocks))


def group_by_length(lengths: Rows[int]) -> list[tuple[int, int]]:
    """Split descending lengths into runs (start, stop), each of which will be padded to its longest. A new run begins
    where more padding would cost more than another call."""
    groups: list[tuple[int, int]] = []
    start = num_padding = 0
    for number, length in enumerate(lengths):
        num_padding += lengths[start] - length
        if num_padding > MAX_PADDING:
            groups.append((start, number))
            start, num_padding = number, 0
    return [*groups, (start, len(lengths))] if lengths else []


ATTENTION_NAME = "celeriac"


@dataclass(slots=True)
class PrefillSpan(GatheredBlocks):
    """One chunk of one prompt: rows start..stop of the pass. Its block table covers the sequence up to its end."""

    start: int
    stop: int
    num_computed_tokens: int  # tokens of the sequence before this chunk

    @property
    def length(self) -> int:
        """Tokens of the sequence up to the end of this chunk."""
        return self.num_computed_tokens + self.stop - self.start


@dataclass(slots=True)
class AttentionContext:
    """What every layer needs for one pass. Masks and row numbers are computed once, for the first layer that needs
    them."""

    layers: list[BlockCache]
    slots: Tensor  # int64 (num_tokens,): block * block_size + offset, where each new token's key and value go
    decodes: list[DecodeGroup]
    prefills: list[PrefillSpan]
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _rows: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, num_heads: int) -> Tensor:
        """The row numbers for BlockCache.write, ordered by token, then head."""
        if num_heads not in self._rows:
            block_size = self.layers[0].block_size
            block, offset = self.slots // block_size, self.slots % block_size
            heads = torch.arange(num_heads, device=self.slots.device)
            self._rows[num_heads] = (block[:, None] * num_heads + heads).mul_(block_size).add_(offset[:, None]).view(-1)
        return self._rows[num_heads]

    def prefill_mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """The additive mask of prompt chunk `number`, (num_new, length); None if plain causal attention is
        equivalent."""
        if (number, window) not in self._masks:
            self._masks[number, window] = _causal_mask(self.prefills[number], window, dtype)
        return self._masks[number, window]


def _causal_mask(span: PrefillSpan, window: int | None, dtype: torch.dtype) -> Tensor | None:
    device = span.block_table.device
    if not span.num_computed_tokens and (window is None or span.length <= window):
        return None
    query = torch.arange(span.num_computed_tokens, span.length, device=device)[:, None]
    key = torch.arange(span.length, device=device)
    mask = key <= query
    return as_scores(mask if window is None else mask & (key > query - window), dtype)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer computes attention weights from queries and keys."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # (num_heads,): logits of attention sinks, as in gpt-oss

    @property
    def is_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ctx: AttentionContext | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. `query` is (1, num_heads, num_tokens, head_dim); the result is
    (1, num_tokens, num_heads, value_dim)."""
    assert ctx is not None
    assert attention_mask is None
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    scoring = Scoring(scale, sliding_window, softcap, s_aux)
    outputs = attend(ctx.layers[module.layer_idx], query, key, value, ctx, scoring)  # type: ignore[index]
    return outputs[None], None


def attend(
    layer: BlockCache, query: Tensor, key: Tensor, value: Tensor, ctx: AttentionContext, scoring: Scoring
) -> Tensor:
    """Write the new keys and values to the cache, then attend. `query`, `key` and `value` have the shapes that modules
    pass; the result is (num_tokens, num_heads, value_dim)."""
    layer.write(ctx.rows(key.shape[1]), key, value)
    outputs = [_attend_decodes(layer, query, key, value, group, scoring) for group in ctx.decodes]
    for number, span in enumerate(ctx.prefills):
        outputs.append(_attend_prefill(layer, query, key, value, ctx, number, span, scoring))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_decodes(
    layer: BlockCache, query: Tensor, key: Tensor, value: Tensor, group: DecodeGroup, scoring: Scoring
) -> Tensor:
    """Attend with one query per sequence to its gathered blocks: (num_sequences, num_heads, value_dim)."""
    keys, values = group.read(layer, key, value)
    num_sequences, num_kv_heads = keys.shape[:2]
    # Query heads that share a key head become query positions of that head, so keys need not be repeated in memory.
    rows = query[0, :, group.start : group.stop].transpose(0, 1)
    grouped = rows.reshape(num_sequences, num_kv_heads, -1, query.shape[-1])
    mask = group.mask(scoring.window, query.dtype)
    if scoring.is_plain:
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scoring.scale)
    else:
        sinks = None if scoring.sinks is None else scoring.sinks.view(num_kv_heads, -1, 1)
        output = _attend_by_hand(grouped, keys, values, mask, scoring, sinks)
    return output.reshape(num_sequences, -1, values.shape[-1])


def _attend_prefill(
    layer: BlockCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ctx: AttentionContext,
    number: int,
    span: PrefillSpan,
    scoring: Scoring,
) -> Tensor:
    """Attend with one prompt chunk to its own sequence: (num_new, num_heads, value_dim)."""
    query = query[:, :, span.start : span.stop]
    if span.num_computed_tokens:
        key, value = layer.gather(span.heads(key.shape[1]), 1)
        key, value = key[:, :, : span.length], value[:, :, : span.length]
    else:
        key, value = key[:, :, span.start : span.stop], value[:, :, span.start : span.stop]
    mask = ctx.prefill_mask(number, scoring.window, query.dtype)
    if scoring.is_plain:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=True
        )
    else:
        num_groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
        if mask is None:
            sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            mask = as_scores(sees, query.dtype)
        sinks = None if scoring.sinks is None else scoring.sinks.view(-1, 1, 1)
        output = _attend_by_hand(query, key, value, mask, scoring, sinks)
    return output[0].transpose(0, 1)


def _attend_by_hand(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring, sinks: Tensor | None
) -> Tensor:
    """Attention with softcapped scores or attention sinks, which torch's fused kernels do not support. A sink takes
    part in the softmax, and its weight is then dropped."""
    scores = query @ key.transpose(-1, -2) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is not None:
        scores = scores + mask
    scores = scores.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1).to(query.dtype)
    return weights[..., : key.shape[-2]] @ value


def register() -> None:
    """Register `paged_attention` with transformers. Without a mask function for it, transformers builds no masks."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
