"""Paged attention for unmodified transformers modules, attached through AttentionInterface and forward kwargs.

One forward pass holds the new tokens of all scheduled sequences in one row, [1, num_tokens]: first the decodes, one
token each, then the prompt chunks. The function below writes their keys and values into the paged cache and lets every
token attend to its own sequence only.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gpu_worker.engine.block_cache import BlockCache, heads_of
from gpu_worker.engine.decode_groups import DecodeGroup, as_scores

ATTENTION_NAME = "celeriac"


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer: (num_slots, num_kv_heads, head_dim), slot = block * block_size + offset."""

    keys: Tensor
    values: Tensor

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """`key` and `value` are (1, num_kv_heads, num_tokens, head_dim), as the modules hand them over."""
        self.keys.index_copy_(0, slots, key[0].transpose(0, 1))
        self.values.index_copy_(0, slots, value[0].transpose(0, 1))


@dataclass(slots=True)
class PrefillSpan:
    """One chunk of one prompt: rows start..stop of the pass, positions num_computed.. of the sequence."""

    start: int
    stop: int
    num_computed_tokens: int
    block_table: Tensor  # int64 (1, num_blocks): of all the sequence's tokens up to the end of this chunk
    _heads: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.num_computed_tokens + self.stop - self.start

    def heads(self, num_heads: int) -> Tensor:
        if num_heads not in self._heads:
            self._heads[num_heads] = heads_of(self.block_table, num_heads)
        return self._heads[num_heads]


@dataclass(slots=True)
class AttentionContext:
    """What one pass tells every layer. Masks and row numbers are made once, by the first layer that needs them."""

    layers: list[BlockCache]
    slots: Tensor  # int64 (num_tokens,): block * block_size + offset, where each new token's key and value go
    decodes: list[DecodeGroup]
    prefills: list[PrefillSpan]
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)
    _rows: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, num_heads: int) -> Tensor:
        """Where BlockCache.write puts the new tokens."""
        if num_heads not in self._rows:
            block_size = self.layers[0].block_size
            block, offset = self.slots // block_size, self.slots % block_size
            heads = torch.arange(num_heads, device=self.slots.device)
            self._rows[num_heads] = (block[:, None] * num_heads + heads).mul_(block_size).add_(offset[:, None]).view(-1)
        return self._rows[num_heads]

    def prefill_mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(num_new, length) of prompt chunk `number`, 0 and -inf; None where plain causal attention says the same."""
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
    """How a layer turns queries and keys into weights."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # (num_heads,)

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
    """`query` is (1, num_heads, num_tokens, head_dim); the result is (1, num_tokens, num_heads, value_dim)."""
    assert ctx is not None
    assert attention_mask is None
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    scoring = Scoring(scale, sliding_window, softcap, s_aux)
    outputs = attend(ctx.layers[module.layer_idx], query, key, value, ctx, scoring)  # type: ignore[index]
    return outputs[None], None


def attend(
    layer: BlockCache, query: Tensor, key: Tensor, value: Tensor, ctx: AttentionContext, scoring: Scoring
) -> Tensor:
    """Write the new keys and values, then look: (num_tokens, num_heads, value_dim). Shapes as the modules have them."""
    layer.write(ctx.rows(key.shape[1]), key, value)
    outputs = [_attend_decodes(layer, query, key, value, group, scoring) for group in ctx.decodes]
    for number, span in enumerate(ctx.prefills):
        outputs.append(_attend_prefill(layer, query, key, value, ctx, number, span, scoring))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_decodes(
    layer: BlockCache, query: Tensor, key: Tensor, value: Tensor, group: DecodeGroup, scoring: Scoring
) -> Tensor:
    """One query per sequence over its gathered blocks: (num_sequences, num_heads, value_dim)."""
    keys, values = group.read(layer, key, value)
    num_sequences, num_kv_heads = keys.shape[:2]
    # The query heads that share a key head become query positions of it: nothing is repeated in memory.
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
    """One prompt chunk over its own sequence: (num_new, num_heads, value_dim)."""
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
    """Softcapped scores and attention sinks, which the fused kernels do not know. A sink takes part in the softmax and
    is then dropped."""
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
    """Make the function known to transformers. No mask function is registered, so that no mask is ever made."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
