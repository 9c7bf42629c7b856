"""Triton kernels: paged attention for decoding sequences (Flash-Decoding, Dao et al. 2023), and writes to the cache.

Each program handles one sequence, one key head with all query heads that share it, and one part of the sequence's
tokens, so that even a single long sequence occupies the whole device. A second kernel combines the parts. This module
needs triton, which comes with PyTorch's CUDA builds.
"""

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

TILE = 64  # tokens read at a time
MIN_DOT_ROWS = 16  # the fewest rows that tl.dot accepts
MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 4


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write_kernel(  # type: ignore[no-untyped-def]
    new,
    cache,
    slots,
    new_stride_head,
    new_stride_token,
    cache_stride_slot,
    cache_stride_head,
    DIM,
    PADDED: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    dims = tl.arange(0, PADDED)
    values = tl.load(new + head * new_stride_head + token * new_stride_token + dims, mask=dims < DIM)
    tl.store(cache + slot * cache_stride_slot + head * cache_stride_head + dims, values, mask=dims < DIM)


def write(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    """Write one new token to each of `slots`, int64 (num_tokens,). `cache` is (num_slots, num_heads, dim); `new` is
    (1, num_heads, num_tokens, dim), contiguous in its last dimension."""
    _, num_heads, num_tokens, dim = new.shape
    _write_kernel[(num_tokens, num_heads)](
        new,
        cache,
        slots,
        new.stride(1),
        new.stride(2),
        cache.stride(0),
        cache.stride(1),
        dim,
        PADDED=triton.next_power_of_2(dim),
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _part_kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    block_tables,
    lengths,
    outputs,
    maxima,
    sums,
    scale,
    softcap,
    table_width,
    query_stride_row,
    query_stride_head,
    slot_stride_key,
    slot_stride_value,
    KEY_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    first_tile = first // TILE_TOKENS
    num_tiles = tl.cdiv(length, TILE_TOKENS) - first_tile
    per_split = tl.cdiv(num_tiles, NUM_SPLITS)
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, first_tile + num_tiles)

    members = tl.arange(0, GROUP_PADDED)
    key_dims = tl.arange(0, KEY_PADDED)
    value_dims = tl.arange(0, VALUE_PADDED)
    query_at = row * query_stride_row + (head * GROUP + members[:, None]) * query_stride_head + key_dims[None, :]
    q = tl.load(query + query_at, mask=(members[:, None] < GROUP) & (key_dims[None, :] < KEY_DIM), other=0.0)

    top = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    output = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for tile in range(begin, end):
        start = tile * TILE_TOKENS
        block = tl.load(block_tables + row * table_width + start // BLOCK_SIZE).to(tl.int64)
        positions = start + tl.arange(0, TILE_TOKENS)
        slots = block * BLOCK_SIZE + start % BLOCK_SIZE + tl.arange(0, TILE_TOKENS)
        seen = (positions < length) & (positions >= first)
        key_at = slots[:, None] * slot_stride_key + head * KEY_DIM + key_dims[None, :]
        k = tl.load(keys + key_at, mask=seen[:, None] & (key_dims[None, :] < KEY_DIM), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A window may start beyond its first tile's tokens, so that all of them are masked: avoid -inf - -inf = NaN.
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - safe_top[:, None])
        fade = tl.exp(top - safe_top)
        value_at = slots[:, None] * slot_stride_value + head * VALUE_DIM + value_dims[None, :]
        v = tl.load(values + value_at, mask=seen[:, None] & (value_dims[None, :] < VALUE_DIM), other=0.0)
        output = output * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        top = new_top

    part = (row * tl.num_programs(1) + head) * NUM_SPLITS + split
    tl.store(maxima + part * GROUP_PADDED + members, top)
    tl.store(sums + part * GROUP_PADDED + members, total)
    at = (part * GROUP_PADDED + members[:, None]) * VALUE_PADDED + value_dims[None, :]
    tl.store(outputs + at, output)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _join_kernel(  # type: ignore[no-untyped-def]
    outputs,
    maxima,
    sums,
    sinks,
    result,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row, query_head = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(1)
    head, member = query_head // GROUP, query_head % GROUP
    splits = tl.arange(0, SPLITS_PADDED)
    is_split = splits < NUM_SPLITS
    dims = tl.arange(0, VALUE_PADDED)
    parts = ((row * (num_heads // GROUP) + head) * NUM_SPLITS + splits) * GROUP_PADDED + member
    tops = tl.load(maxima + parts, mask=is_split, other=float("-inf"))
    totals = tl.load(sums + parts, mask=is_split, other=0.0)
    parted = tl.load(outputs + parts[:, None] * VALUE_PADDED + dims[None, :], mask=is_split[:, None], other=0.0)
    top = tl.max(tops, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + query_head).to(tl.float32)
        top = tl.maximum(top, sink)
    weights = tl.exp(tops - top)
    total = tl.sum(totals * weights, 0)
    if HAS_SINKS:
        total += tl.exp(sink - top)
    output = tl.sum(parted * weights[:, None], 0) / total
    at = (row * num_heads + query_head) * VALUE_DIM + dims
    tl.store(result + at, output.to(result.dtype.element_ty), mask=dims < VALUE_DIM)


def count_splits(num_rows: int, num_kv_heads: int, num_processors: int, max_length: int) -> int:
    """How many parts to split each sequence into: enough to use the whole device's memory bandwidth, but no more than
    the longest sequence has tiles."""
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // (num_rows * num_kv_heads))
    return max(1, min(wanted, MAX_SPLITS, -(-max_length // TILE)))


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    block_size: int,
    num_splits: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with one new token per row. `query` is (num_rows, num_heads, key_dim); `keys` and `values` are (num_slots,
    num_kv_heads, dim), contiguous. Every length is at least 1. The result is (num_rows, num_heads, value_dim)."""
    num_rows, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = values.shape[1:]
    group = num_heads // num_kv_heads
    group_padded = max(MIN_DOT_ROWS, triton.next_power_of_2(group))
    value_padded = max(16, triton.next_power_of_2(value_dim))
    parts = (num_rows, num_kv_heads, num_splits, group_padded)
    outputs = torch.empty(*parts, value_padded, dtype=torch.float32, device=query.device)
    maxima = torch.empty(parts, dtype=torch.float32, device=query.device)
    sums = torch.empty(parts, dtype=torch.float32, device=query.device)
    _part_kernel[(num_rows, num_kv_heads, num_splits)](
        query,
        keys,
        values,
        block_tables,
        lengths,
        outputs,
        maxima,
        sums,
        scale,
        softcap or 1.0,
        block_tables.stride(0),
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        values.stride(0),
        KEY_DIM=key_dim,
        KEY_PADDED=max(16, triton.next_power_of_2(key_dim)),
        VALUE_DIM=value_dim,
        VALUE_PADDED=value_padded,
        GROUP=group,
        GROUP_PADDED=group_padded,
        BLOCK_SIZE=block_size,
        TILE_TOKENS=min(TILE, block_size),
        NUM_SPLITS=num_splits,
        WINDOW=window or 0,
        HAS_SOFTCAP=softcap is not None,
    )
    result = query.new_empty(num_rows, num_heads, value_dim)
    _join_kernel[(num_rows, num_heads)](
        outputs,
        maxima,
        sums,
        result if sinks is None else sinks,
        result,
        VALUE_DIM=value_dim,
        VALUE_PADDED=value_padded,
        GROUP=group,
        GROUP_PADDED=group_padded,
        NUM_SPLITS=num_splits,
        SPLITS_PADDED=triton.next_power_of_2(num_splits),
        HAS_SINKS=sinks is not None,
    )
    return result
