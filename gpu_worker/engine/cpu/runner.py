"""Forward passes on a CPU, and a fused version of Llama and similar models with a third of the operations.

Fewer operations pay off for small models, where the overhead of each call matters. No weights are duplicated:
projections of the same input are joined into one matrix, of which the modules keep views. The arithmetic is that of
transformers' modules. At load, probe.py compares the results; if they differ, or if the model has an unknown part, the
unfused modules run.
"""

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gpu_worker.engine.cpu.attention import (
    AttentionContext,
    BlockCache,
    DecodeGroup,
    DecodeGroups,
    PrefillSpan,
    Scoring,
    attend,
)
from gpu_worker.engine.cpu.threads import LoneRowThreads
from gpu_worker.engine.kv_cache import BlockCopy
from gpu_worker.engine.lora import Adapters, LoraPart
from gpu_worker.engine.quantization import QuantisedLinear
from gpu_worker.engine.sampling import Drawn, results_of, split_scores
from gpu_worker.engine.scheduler import ScheduledRow
from gpu_worker.engine.sequence import Sequence
from gpu_worker.engine.torch_runner import TorchAtOnce, score_tokens

CPU = torch.device("cpu")

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2"})

#: Types of rotary embeddings whose frequencies do not depend on the length of the text.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class Projection:
    weight: Tensor  # (num_out, num_in)
    bias: Tensor | None
    lora: tuple[LoraPart, ...] = ()

    def __call__(self, rows: Tensor) -> Tensor:
        outputs = linear(rows, self.weight, self.bias)
        for part in self.lora:
            part.add_to(outputs, rows)
        return outputs

    def add_to(self, residual: Tensor, rows: Tensor) -> None:
        residual.addmm_(rows, self.weight.t())
        if self.bias is not None:
            residual.add_(self.bias)
        for part in self.lora:
            part.add_to(residual, rows)


@dataclass(frozen=True, slots=True)
class QuantisedProjection:
    """Layers that read the same rows, some of them quantised. They stay apart, as packed weights cannot be joined, and
    run with their hooks, which apply adapters."""

    layers: tuple[nn.Module, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        outputs = [layer(rows) for layer in self.layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def add_to(self, residual: Tensor, rows: Tensor) -> None:
        residual.add_(self(rows))


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm computed with a sum instead of a mean; the divisor is folded into the weight and epsilon."""

    weight: Tensor
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        exact = rows.float()
        squares = (exact * exact).sum(-1, keepdim=True)
        return (exact * squares.add_(self.epsilon).rsqrt_()).mul_(self.weight).to(rows.dtype)


@dataclass(frozen=True, slots=True)
class FusedLayer:
    attention_norm: Norm
    qkv: Projection | QuantisedProjection
    output: Projection | QuantisedProjection
    mlp_norm: Norm
    gate_up: Projection | QuantisedProjection
    down: Projection | QuantisedProjection
    activation: nn.Module
    scoring: Scoring


@dataclass(frozen=True, slots=True)
class FusedOutput:
    logits: Tensor


class FusedLlama:
    """A fused model that PagedRunner can call like the transformers model it was made from."""

    def __init__(self, model: Any, windows: Rows[int | None], max_model_len: int, adapters: Adapters) -> None:
        config = model.config
        attention = model.model.layers[0].self_attn
        self._embedding = model.model.embed_tokens.weight
        self._num_kv_heads = config.num_key_value_heads
        self._num_heads = config.num_attention_heads
        self._head_dim = attention.head_dim
        layers = zip(model.model.layers, windows, strict=True)
        self._layers = [_fuse_layer(layer, window, adapters) for layer, window in layers]
        self._norm = _norm(model.model.norm)
        self._head = _fuse(adapters, model.lm_head)
        self._cosines, self._sines = self._rotations(model.model.rotary_emb, max_model_len)

    def _rotations(self, rotary: nn.Module, max_model_len: int) -> tuple[Tensor, Tensor]:
        """Cosines, (max_model_len, 1, 1, head_dim / 2), and sines for both halves of a head, (max_model_len, 1, 2,
        head_dim / 2)."""
        positions = torch.arange(max_model_len, device=self._embedding.device)[None]
        cosines, sines = (
            table[0, :, None, None, : self._head_dim // 2] for table in rotary(self._embedding, positions)
        )
        return cosines.contiguous(), torch.cat((-sines, sines), 2)

    def __call__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_to_keep: Tensor,
        ctx: AttentionContext,
        use_cache: bool = False,
    ) -> FusedOutput:
        """`input_ids` and `position_ids` are (1, num_tokens); the logits are (1, num_kept, vocab_size)."""
        assert not use_cache
        hidden = self._embedding.index_select(0, input_ids[0])
        rotation = self._cosines.index_select(0, position_ids[0]), self._sines.index_select(0, position_ids[0])
        for number, layer in enumerate(self._layers):
            self._run_layer(layer, ctx, number, hidden, rotation)
        return FusedOutput(self._head(self._norm(hidden.index_select(0, logits_to_keep)))[None])

    def _run_layer(
        self, layer: FusedLayer, ctx: AttentionContext, number: int, hidden: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> None:
        """Run one layer and add its output to `hidden`, in place."""
        num_tokens = hidden.shape[0]
        qkv = layer.qkv(layer.attention_norm(hidden)).view(num_tokens, -1, self._head_dim)
        turned = self._rotate(qkv[:, : self._num_heads + self._num_kv_heads], *rotation)
        parts = (
            turned[:, : self._num_heads],
            turned[:, self._num_heads :],
            qkv[:, self._num_heads + self._num_kv_heads :],
        )
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        attended = attend(ctx.layers[number], query, key, value, ctx, layer.scoring)
        layer.output.add_to(hidden, attended.reshape(num_tokens, -1))
        gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, -1)
        layer.down.add_to(hidden, layer.activation(gate).mul_(up))

    def _rotate(self, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Apply rotary embeddings to `heads`, (num_tokens, num_heads, head_dim): each dimension is paired with the one
        half a head away."""
        halves = heads.view(*heads.shape[:2], 2, -1)
        return (halves * cosines).addcmul_(halves.flip(2), sines).view(heads.shape)


def can_fuse(model: Any) -> bool:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type in MODEL_TYPES and rope.get("rope_type") in ROPE_TYPES


@torch.no_grad()
def _fuse_layer(layer: Any, window: int | None, adapters: Adapters) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return FusedLayer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_fuse(adapters, attention.q_proj, attention.k_proj, attention.v_proj),
        output=_fuse(adapters, attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_fuse(adapters, mlp.gate_proj, mlp.up_proj),
        down=_fuse(adapters, mlp.down_proj),
        activation=mlp.act_fn,
        scoring=Scoring(attention.scaling, window),
    )


def _norm(module: Any) -> Norm:
    size = module.weight.shape[0]
    return Norm(module.weight.detach().float() * math.sqrt(size), module.variance_epsilon * size)


def _fuse(adapters: Adapters, *modules: Any) -> Projection | QuantisedProjection:
    """Join the modules' weights into one matrix of the same memory layout (by row, or by column: see loading.py). The
    modules keep views of it."""
    if any(isinstance(module, QuantisedLinear) for module in modules):
        return QuantisedProjection(modules)
    if len(modules) == 1:
        return Projection(modules[0].weight, modules[0].bias, adapters.parts(modules[0]))
    is_by_row = modules[0].weight.is_contiguous()
    weight = torch.cat([module.weight for module in modules]) if is_by_row else _cat_by_column(modules)
    start = 0
    for module in modules:
        module.weight = nn.Parameter(weight[start : start + module.out_features], requires_grad=False)
        start += module.out_features
    biases = [module.bias for module in modules]
    return Projection(weight, None if biases[0] is None else torch.cat(biases), adapters.parts(*modules))


def _cat_by_column(modules: Rows[Any]) -> Tensor:
    return torch.cat([module.weight.t() for module in modules], 1).t()


class PagedRunner(TorchAtOnce):
    def __init__(self, model: Any, layers: list[BlockCache], adapters: Adapters) -> None:
        self._model = model
        self._adapters = adapters
        self._layers = layers
        self._block_size = layers[0].block_size
        self._decode_groups = DecodeGroups(layers)
        self._num_threads = torch.get_num_threads()
        self._lone_row_threads = LoneRowThreads(self._num_threads)

    def copy_blocks(self, copies: Rows[BlockCopy]) -> None:
        if not copies:
            return
        sources = torch.tensor([copy.source for copy in copies])
        destinations = torch.tensor([copy.destination for copy in copies])
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[destinations] = cache[sources]

    def wipe_blocks(self, blocks: Rows[int]) -> None:
        """Zero blocks that may contain infinities or NaNs: padding is multiplied by zero, and 0 * inf is NaN."""
        for layer in self._layers:
            for cache in (layer.keys, layer.values):
                cache[list(blocks)] = 0

    def discard(self, sequence: Sequence) -> None:
        self._decode_groups.discard(sequence)

    @torch.inference_mode()
    def run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]:
        if sum(row.num_new_tokens for row in rows) > 1:
            return self._run(rows)
        torch.set_num_threads(self._lone_row_threads.num_threads)
        started = perf_counter()
        try:
            return self._run(rows)
        finally:
            self._lone_row_threads.note(perf_counter() - started)
            torch.set_num_threads(self._num_threads)

    def _run(self, rows: Rows[ScheduledRow]) -> list[Drawn | None]:
        decodes = [number for number, row in enumerate(rows) if row.num_new_tokens == 1]
        decodes.sort(key=lambda number: rows[number].sequence.num_computed_tokens, reverse=True)
        prefills = [number for number, row in enumerate(rows) if row.num_new_tokens > 1]
        ordered = [rows[number] for number in decodes + prefills]
        scores, logits = split_scores(self._forward(ordered, len(decodes)), ordered, score_tokens)
        results = dict(zip(decodes + prefills, results_of(ordered, scores, logits.numpy()), strict=True))
        return [results[number] for number in range(len(rows))]

    def _forward(self, rows: Rows[ScheduledRow], num_decodes: int) -> Tensor:
        """Float32 logits, (num_kept, vocab_size): for each row in order, the positions that score its prompt, then its
        last position if it needs a token."""
        token_ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        for row in rows:
            start = row.sequence.num_computed_tokens
            first = len(token_ids)
            kept += range(first, first + row.num_scored_tokens)
            token_ids += row.sequence.token_ids[start : start + row.num_new_tokens]
            positions += range(start, start + row.num_new_tokens)
            if row.needs_token:
                kept.append(len(token_ids) - 1)
        groups = self._decode_groups.take([row.sequence for row in rows[:num_decodes]])
        with self._adapters.applied(rows, CPU):
            output = self._model(
                input_ids=torch.tensor([token_ids]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=torch.tensor(kept, dtype=torch.int64),
                ctx=self._context(rows, list(groups.values())),
            )
        self._decode_groups.keep(groups)
        logits: Tensor = output.logits[0]
        return logits.float()

    def _context(self, rows: Rows[ScheduledRow], decodes: list[DecodeGroup]) -> AttentionContext:
        slots: list[int] = []
        prefills: list[PrefillSpan] = []
        for row in rows:
            sequence, start, num_rows = row.sequence, row.sequence.num_computed_tokens, len(slots)
            stop = start + row.num_new_tokens
            slots += [self._slot(sequence, position) for position in range(start, stop)]
            if row.num_new_tokens > 1:
                blocks = torch.tensor([sequence.block_ids[: -(-stop // self._block_size)]])
                prefills.append(PrefillSpan(blocks, num_rows, len(slots), start))
        return AttentionContext(
            layers=self._layers,
            slots=torch.tensor(slots),
            decodes=decodes,
            prefills=prefills,
        )

    def _slot(self, sequence: Sequence, position: int) -> int:
        number, offset = divmod(position, self._block_size)
        return sequence.block_ids[number] * self._block_size + offset
