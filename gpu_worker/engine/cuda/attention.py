"""Paged attention on a CUDA device, for the decodes and prompt chunks of one pass, without waiting for the host.

There are two implementations of one protocol. At load, backend.py finds out which of them works for this device and
model. If neither does, the model runs one sequence at a time (SequentialRunner).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gpu_worker.engine.cpu.attention import Scoring


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, each (num_slots, num_kv_heads, head_dim); slot = block * block_size + offset."""

    keys: Tensor
    values: Tensor

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """`slots` is int64 (num_tokens,); `key` and `value` are (1, num_kv_heads, num_tokens, head_dim), as modules
        pass them."""
        self.keys.index_copy_(0, slots, key[0].transpose(0, 1))
        self.values.index_copy_(0, slots, value[0].transpose(0, 1))


ATTENTION_NAME = "celeriac_device"


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some rows of one pass, decodes or prompt chunks, which are its tokens token_start..token_stop."""

    token_start: int
    token_stop: int
    starts: Tensor  # int32 (num_rows + 1,): cumulative numbers of new tokens, from 0
    key_starts: Tensor  # int32 (num_rows + 1,): cumulative lengths, from 0
    lengths: Tensor  # int32 (num_rows,): tokens of each sequence, the new ones included
    block_tables: Tensor  # int32 (num_rows, max_blocks)
    max_new_tokens: int
    max_length: int  # an upper bound on `lengths`


@dataclass(frozen=True, slots=True)
class Span:
    """One prompt chunk, in numbers on the host: tokens start..stop of the pass, row `row` of the prefill group."""

    row: int
    start: int
    stop: int
    num_computed_tokens: int


class DeviceAttention(Protocol):
    name: str

    def write(self, layer: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None: ...

    def attend_decodes(
        self, query: Tensor, layer: LayerCache, group: RowGroup, block_size: int, scoring: Scoring
    ) -> Tensor:
        """Attend with one new token per row. `query` is (num_rows, num_heads, head_dim), the result (num_rows,
        num_heads, value_dim). Can be captured in a CUDA graph."""

    def attend_prefills(
        self, query: Tensor, layer: LayerCache, ctx: "DeviceContext", group: RowGroup, scoring: Scoring
    ) -> Tensor:
        """Attend with all prompt chunks. `query` is (num_tokens, num_heads, head_dim), the result (num_tokens,
        num_heads, value_dim)."""


@dataclass(slots=True)
class DeviceContext:
    """What every layer needs for one pass."""

    attention: DeviceAttention
    layers: list[LayerCache]
    block_size: int
    slots: Tensor  # int64 (num_tokens,): where each new token's key and value go
    decodes: RowGroup | None
    prefills: RowGroup | None
    spans: tuple[Span, ...] = ()


def device_attention(
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
    ctx: DeviceContext | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls. `query` is (1, num_heads, num_tokens, head_dim); the result is
    (1, num_tokens, num_heads, value_dim)."""
    assert ctx is not None
    assert attention_mask is None
    scale = scaling if scaling is not None else 1.0 / math.sqrt(query.shape[-1])
    scoring = Scoring(scale, sliding_window, softcap, s_aux)
    layer = ctx.layers[module.layer_idx]  # type: ignore[index]
    ctx.attention.write(layer, ctx.slots, key, value)
    rows = query[0].transpose(0, 1)
    outputs: list[Tensor] = []
    if ctx.decodes is not None:
        decodes = rows[ctx.decodes.token_start : ctx.decodes.token_stop]
        outputs.append(ctx.attention.attend_decodes(decodes, layer, ctx.decodes, ctx.block_size, scoring))
    if ctx.prefills is not None:
        prefills = rows[ctx.prefills.token_start : ctx.prefills.token_stop]
        outputs.append(ctx.attention.attend_prefills(prefills, layer, ctx, ctx.prefills, scoring))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


class VarlenAttention:
    """torch's variable-length flash attention over block tables: float16 and bfloat16 only, no softcap, no sinks."""

    name = "varlen"

    def __init__(self, varlen_attn: Callable[..., Any]) -> None:
        self._varlen_attn = varlen_attn

    def write(self, layer: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
        layer.write(slots, key, value)

    def attend_decodes(
        self, query: Tensor, layer: LayerCache, group: RowGroup, block_size: int, scoring: Scoring
    ) -> Tensor:
        return self._attend(query, layer, group, block_size, scoring)

    def attend_prefills(
        self, query: Tensor, layer: LayerCache, ctx: DeviceContext, group: RowGroup, scoring: Scoring
    ) -> Tensor:
        return self._attend(query, layer, group, ctx.block_size, scoring)

    def _attend(self, query: Tensor, layer: LayerCache, group: RowGroup, block_size: int, scoring: Scoring) -> Tensor:
        if not scoring.is_plain:
            raise NotImplementedError("flash attention supports neither softcap nor sinks")
        output: Tensor = self._varlen_attn(
            query,
            layer.keys.view(-1, block_size, *layer.keys.shape[1:]),
            layer.values.view(-1, block_size, *layer.values.shape[1:]),
            group.starts,
            group.key_starts,
            group.max_new_tokens,
            group.max_length,
            scale=scoring.scale,
            # Our window includes the query's own token; flash attention's counts only those before it.
            window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
            enable_gqa=True,
            seqused_k=group.lengths,
            block_table=group.block_tables,
        )
        return output


class TritonAttention:
    """Our own Triton kernels for decodes and writes; prompt chunks run one by one over gathered keys and values."""

    name = "triton"

    def __init__(self, num_processors: int) -> None:
        from gpu_worker.engine.cuda import kernels  # imports triton, which only CUDA builds have

        self._kernels = kernels
        self._num_processors = num_processors

    def write(self, layer: LayerCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
        for cache, new in ((layer.keys, key), (layer.values, value)):
            self._kernels.write(cache, slots, new if new.stride(-1) == 1 else new.contiguous())

    def attend_decodes(
        self, query: Tensor, layer: LayerCache, group: RowGroup, block_size: int, scoring: Scoring
    ) -> Tensor:
        num_kv_heads = layer.keys.shape[1]
        output: Tensor = self._kernels.decode(
            query if query.stride(-1) == 1 else query.contiguous(),
            layer.keys,
            layer.values,
            group.block_tables,
            group.lengths,
            block_size=block_size,
            num_splits=self._kernels.count_splits(
                query.shape[0], num_kv_heads, self._num_processors, scoring.window or group.max_length
            ),
            scale=scoring.scale,
            window=scoring.window,
            softcap=scoring.softcap,
            sinks=scoring.sinks,
        )
        return output

    def attend_prefills(
        self, query: Tensor, layer: LayerCache, ctx: DeviceContext, group: RowGroup, scoring: Scoring
    ) -> Tensor:
        outputs = []
        for span in ctx.spans:
            length = span.num_computed_tokens + span.stop - span.start
            blocks = group.block_tables[span.row, : -(-length // ctx.block_size)].long()
            keys = _gather(layer.keys, blocks, ctx.block_size, length)
            values = _gather(layer.values, blocks, ctx.block_size, length)
            begin = span.start - group.token_start
            chunk = query[begin : begin + span.stop - span.start]
            outputs.append(attend_span(chunk, keys, values, span.num_computed_tokens, scoring))
        return torch.cat(outputs)


def _gather(cache: Tensor, blocks: Tensor, block_size: int, length: int) -> Tensor:
    """One sequence's first `length` keys or values, (length, num_kv_heads, dim)."""
    return cache.view(-1, block_size, *cache.shape[1:])[blocks].flatten(0, 1)[:length]


def attend_span(query: Tensor, keys: Tensor, values: Tensor, num_before: int, scoring: Scoring) -> Tensor:
    """Attend with the new tokens of one sequence to all of its tokens. `query` is (num_new, num_heads, dim), `keys` and
    `values` are (length, num_kv_heads, dim), and the result is (num_new, num_heads, value_dim)."""
    query, keys, values = (tensor.transpose(0, 1)[None] for tensor in (query, keys, values))
    num_new, length = query.shape[2], keys.shape[2]
    mask = None
    if num_before or scoring.window is not None or not scoring.is_plain:
        mask = _mask(num_new, length, num_before, scoring.window, query.device)
    if scoring.is_plain:
        output = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scoring.scale, enable_gqa=True
        )
        return output[0].transpose(0, 1)
    assert mask is not None
    return _attend_by_hand(query, keys, values, mask, scoring)[0].transpose(0, 1)


def _mask(num_new: int, length: int, num_before: int, window: int | None, device: torch.device) -> Tensor:
    positions = torch.arange(num_before, num_before + num_new, device=device)[:, None]
    others = torch.arange(length, device=device)
    mask = others <= positions
    return mask if window is None else mask & (others > positions - window)


def _attend_by_hand(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = (query @ keys.transpose(-1, -2)).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1).to(query.dtype)
    return weights[..., : keys.shape[-2]] @ values


def register() -> None:
    AttentionInterface.register(ATTENTION_NAME, device_attention)
