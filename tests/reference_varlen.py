"""torch.nn.attention.varlen.varlen_attn in plain arithmetic, with its signature, for any device and dtype."""

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """`key` and `value` are pages, (num_pages, page_size, num_kv_heads, dim), and the queries of a row are the last of
    its `seqused_k` tokens, as in the original's docstring and flash attention's causal alignment."""
    assert cu_seq_k is not None
    assert seqused_k is not None
    assert block_table is not None
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, cu_seq_k, seqused_k, block_table))
    assert len(cu_seq_q) == len(cu_seq_k) == len(seqused_k) + 1 == len(block_table) + 1
    assert query.shape[0] == int(cu_seq_q[-1])
    left, right = window_size
    assert right == 0, "causal"
    page_size = key.shape[1]
    outputs = []
    for row, length in enumerate(seqused_k.tolist()):
        assert int(cu_seq_k[row + 1] - cu_seq_k[row]) == length
        rows = query[int(cu_seq_q[row]) : int(cu_seq_q[row + 1])].float()
        assert len(rows) <= max_q
        assert length <= max_k
        pages = block_table[row, : -(-length // page_size)].long()
        keys, values = (cache[pages].flatten(0, 1)[:length].float() for cache in (key, value))
        group = query.shape[1] // key.shape[2]
        assert enable_gqa or group == 1
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", rows, keys) * (scale if scale is not None else query.shape[-1] ** -0.5)
        ends = torch.arange(length - len(rows), length, device=query.device)[:, None]
        others = torch.arange(length, device=query.device)
        seen = others <= ends
        if left >= 0:
            seen &= others >= ends - left
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs).to(query.dtype)
