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


@dataclass(frozen=True, slots=True)
class PrefillSpan:
    """One chunk of one prompt: rows start..stop of the pass, positions num_computed.. of the sequence."""

    start: int
    stop: int
    num_computed_tokens: int
    slots: Tensor  # of all the sequence's tokens up to the end of this chunk


@dataclass(slots=True)
class DecodeGroup:
    """Decoding sequences of about one length, rows start..stop of the pass, one new token each."""

    start: int
    stop: int
    block_table: Tensor  # int64 (num_sequences, num_blocks), padded with block 0
    lengths: list[int]  # tokens of each sequence, the new one included
    _mask_by_window: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor | None:
        """bool (num_sequences, 1, 1, max_length): what each new token sees; None where it sees all."""
        if window not in self._mask_by_window:
            self._mask_by_window[window] = self._make_mask(window)
        return self._mask_by_window[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        longest = max(self.lengths)
        if min(self.lengths) == longest and (window is None or longest <= window):
            return None
        lengths = torch.tensor(self.lengths, device=self.block_table.device)[:, None]
        positions = torch.arange(longest, device=self.block_table.device)
        mask = positions < lengths
        if window is not None:
            mask &= positions >= lengths - window
        return mask[:, None, None]


@dataclass(slots=True)
class AttentionContext:
    """What one pass tells every layer. The masks are made once, by the first layer that needs them."""

    layers: list[LayerCache]
    block_size: int
    slots: Tensor  # int64 (num_tokens,): where each new token's key and value go
    decodes: list[DecodeGroup]
    prefills: list[PrefillSpan]
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    def prefill_mask(self, number: int, window: int | None) -> Tensor | None:
        """bool (num_new, length) of prompt chunk `number`; None where plain causal attention says the same."""
        if (number, window) not in self._masks:
            self._masks[number, window] = _causal_mask(self.prefills[number], window, self.slots.device)
        return self._masks[number, window]


def _causal_mask(span: PrefillSpan, window: int | None, device: torch.device) -> Tensor | None:
    length = span.num_computed_tokens + span.stop - span.start
    if not span.num_computed_tokens and (window is None or length <= window):
        return None
    query = torch.arange(span.num_computed_tokens, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    mask = key <= query
    return mask if window is None else mask & (key > query - window)


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
    layer = ctx.layers[module.layer_idx]  # type: ignore[index]
    layer.write(ctx.slots, key, value)
    outputs = [_attend_decodes(layer, query, ctx, group, scoring) for group in ctx.decodes]
    for number, span in enumerate(ctx.prefills):
        outputs.append(_attend_prefill(layer, query, key, value, ctx, number, span, scoring))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _attend_decodes(
    layer: LayerCache, query: Tensor, ctx: AttentionContext, group: DecodeGroup, scoring: Scoring
) -> Tensor:
    """One query per sequence over its gathered blocks: (num_sequences, num_heads, value_dim)."""
    keys = _gather_blocks(layer.keys, ctx, group)
    values = _gather_blocks(layer.values, ctx, group)
    num_sequences, num_kv_heads = keys.shape[:2]
    # The query heads that share a key head become query positions of it: nothing is repeated in memory.
    rows = query[0, :, group.start : group.stop].transpose(0, 1)
    grouped = rows.reshape(num_sequences, num_kv_heads, -1, query.shape[-1])
    mask = group.mask(scoring.window)
    if scoring.is_plain:
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scoring.scale)
    else:
        sinks = None if scoring.sinks is None else scoring.sinks.view(num_kv_heads, -1, 1)
        output = _attend_by_hand(grouped, keys, values, mask, scoring, sinks)
    return output.reshape(num_sequences, -1, values.shape[-1])


def _gather_blocks(cache: Tensor, ctx: AttentionContext, group: DecodeGroup) -> Tensor:
    """(num_sequences, num_kv_heads, max_length, dim), a view of gathered memory."""
    num_sequences, num_blocks = group.block_table.shape
    blocks = cache.view(-1, ctx.block_size * cache.shape[1] * cache.shape[2])
    gathered = blocks.index_select(0, group.block_table.view(-1))
    by_sequence = gathered.view(num_sequences, num_blocks * ctx.block_size, *cache.shape[1:])
    return by_sequence[:, : max(group.lengths)].transpose(1, 2)


def _attend_prefill(
    layer: LayerCache,
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
        key = layer.keys.index_select(0, span.slots).transpose(0, 1)[None]
        value = layer.values.index_select(0, span.slots).transpose(0, 1)[None]
    else:
        key, value = key[:, :, span.start : span.stop], value[:, :, span.start : span.stop]
    mask = ctx.prefill_mask(number, scoring.window)
    if scoring.is_plain:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=True
        )
    else:
        num_groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
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
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    scores = scores.float()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1).to(query.dtype)
    return weights[..., : key.shape[-2]] @ value


def register() -> None:
    """Make the function known to transformers. No mask function is registered, so that no mask is ever made."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
