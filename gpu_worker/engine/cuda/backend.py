"""Builds the model runner for a GPU: chooses an attention implementation, sizes the cache, captures decode passes.

The implementations are tried in order of preference, on random data of the model's own shapes. The first whose results
agree with plain arithmetic is used.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from domain.catalog import ModelSpec
from gpu_worker.engine.cpu.attention import Scoring
from gpu_worker.engine.cuda.attention import (
    ATTENTION_NAME,
    DeviceAttention,
    DeviceContext,
    RowGroup,
    Span,
    TritonAttention,
    VarlenAttention,
    attend_span,
    register,
)
from gpu_worker.engine.cuda.graphs import CudaCapture, batch_sizes
from gpu_worker.engine.cuda.runner import DeviceRunner, PassLimits
from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.lora import Adapters
from gpu_worker.engine.probe import LayerShape, NotPageable
from gpu_worker.engine.sampling import max_num_scored_tokens
from gpu_worker.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

#: The rows of a trial: decodes on both sides of a block boundary (and of a short window's), then prompt chunks.
DECODE_BLOCKS = (0.02, 0.999, 1.01, 2.5)  # lengths, in blocks

CHUNK_BLOCKS = ((0.0, 0.3), (0.9, 0.6))  # (tokens computed before, new tokens), in blocks

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class WrongResult(Exception):
    """An attention implementation failed its trial; the message says how."""


def choose_attention(shapes: Iterable[LayerShape], block_size: int, device: torch.device) -> DeviceAttention:
    """The preferred implementation that works for these layers. Raises NotPageable if none does."""
    for make in (_make_varlen, _make_triton):
        attention = _try(make, set(shapes), block_size, device)
        if attention is not None:
            log.info("attention chosen", extra={"attention": attention.name, "device": str(device)})
            return attention
    raise NotPageable(f"no attention kernel supports its layers on {device}; the log has the reason for each kernel")


def _make_varlen(device: torch.device) -> DeviceAttention:
    from torch.nn.attention.varlen import varlen_attn

    return VarlenAttention(varlen_attn)


def _make_triton(device: torch.device) -> DeviceAttention:
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError("triton is not installed")
    return TritonAttention(torch.cuda.get_device_properties(device).multi_processor_count)


def _try(
    make: Callable[[torch.device], DeviceAttention], shapes: set[LayerShape], block_size: int, device: torch.device
) -> DeviceAttention | None:
    name = make.__name__.removeprefix("_make_")
    try:
        attention = make(device)
        for shape in shapes:
            check_attention(attention, shape, block_size, device)
    except torch.AcceleratorError:
        raise  # the CUDA context is lost
    except Exception as exc:
        # A kernel may raise anything if it does not support this device, type or head size: try the next one.
        log.info("attention not usable", extra={"attention": name, "reason": f"{type(exc).__name__}: {exc}"[:500]})
        return None
    return attention


@torch.inference_mode()
def check_attention(attention: DeviceAttention, shape: LayerShape, block_size: int, device: torch.device) -> None:
    """Write and attend as a layer of this shape would, and compare with plain arithmetic. Raises WrongResult, or
    whatever the kernels raise."""
    trial = _Trial(shape, block_size, device)
    attention.write(trial.layer, trial.slots, trial.new_keys, trial.new_values)
    for cache, new in ((trial.layer.keys, trial.new_keys), (trial.layer.values, trial.new_values)):
        if not torch.equal(cache[trial.slots], new[0].transpose(0, 1)):
            raise WrongResult("the cache does not contain what was written to it")
    ctx = trial.context(attention)
    assert ctx.decodes is not None
    assert ctx.prefills is not None
    num_decodes = ctx.decodes.token_stop
    decoded = attention.attend_decodes(trial.query[:num_decodes], trial.layer, ctx.decodes, block_size, trial.scoring)
    prefilled = attention.attend_prefills(trial.query[num_decodes:], trial.layer, ctx, ctx.prefills, trial.scoring)
    expected = trial.expected()
    difference = (torch.cat([decoded, prefilled]).float() - expected).abs().max().item()
    if not difference <= TOLERANCE[shape.dtype] * max(1.0, expected.abs().max().item()):
        raise WrongResult(f"its results differ by up to {difference:.2g}")


class _Trial:
    """A cache of random numbers and a pass over it. Blocks are allocated in reverse order."""

    def __init__(self, shape: LayerShape, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        lengths = [max(1, int(blocks * block_size)) for blocks in DECODE_BLOCKS]
        chunks = [(int(before * block_size), max(2, int(new * block_size))) for before, new in CHUNK_BLOCKS]
        self.rows = [(length - 1, 1) for length in lengths] + chunks  # (tokens computed before, new tokens)
        self._num_decodes = len(lengths)
        num_blocks = [-(-(before + new) // block_size) for before, new in self.rows]
        self._tables = torch.zeros(len(self.rows), max(num_blocks), dtype=torch.int32)
        free = sum(num_blocks)
        for row, count in enumerate(num_blocks):
            self._tables[row, :count] = torch.arange(free, free - count, -1)
            free -= count
        generator = torch.Generator().manual_seed(0)

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, shape.dtype)

        self.layer = shape.allocate((sum(num_blocks) + 1) * block_size, device)
        self.layer.keys.copy_(numbers(*self.layer.keys.shape))
        self.layer.values.copy_(numbers(*self.layer.values.shape))
        num_tokens = sum(new for _, new in self.rows)
        # As modules pass them: the shape has heads before tokens, but memory has tokens before heads.
        self.query = numbers(num_tokens, shape.num_heads, shape.key_shape[1])
        self.new_keys = numbers(1, num_tokens, *shape.key_shape).transpose(1, 2)
        self.new_values = numbers(1, num_tokens, *shape.value_shape).transpose(1, 2)
        sinks = numbers(shape.num_heads) if shape.has_sinks else None
        self.scoring = Scoring(shape.scale, shape.window, shape.softcap, sinks)
        self.slots = torch.cat([self._slots(row)[before:] for row, (before, _) in enumerate(self.rows)]).to(device)
        self._device = device

    def _slots(self, row: int) -> Tensor:
        before, new = self.rows[row]
        slots = self._tables[row].long()[:, None] * self._block_size + torch.arange(self._block_size)
        return slots.flatten()[: before + new]

    def context(self, attention: DeviceAttention) -> DeviceContext:
        count = self._num_decodes
        decodes, prefills = self._group(0, count), self._group(count, len(self.rows))
        spans, start = [], prefills.token_start
        for row, (before, new) in enumerate(self.rows[count:]):
            spans.append(Span(row, start, start + new, before))
            start += new
        return DeviceContext(attention, [self.layer], self._block_size, self.slots, decodes, prefills, tuple(spans))

    def _group(self, first: int, last: int) -> RowGroup:
        token_start = sum(new for _, new in self.rows[:first])
        new = torch.tensor([0, *(new for _, new in self.rows[first:last])], dtype=torch.int32)
        lengths = torch.tensor([0, *(before + new for before, new in self.rows[first:last])], dtype=torch.int32)
        return RowGroup(
            token_start=token_start,
            token_stop=token_start + int(new.sum()),
            starts=new.cumsum(0, dtype=torch.int32).to(self._device),
            key_starts=lengths.cumsum(0, dtype=torch.int32).to(self._device),
            lengths=lengths[1:].to(self._device),
            block_tables=self._tables[first:last].to(self._device),
            max_new_tokens=int(new.max()),
            max_length=int(lengths.max()),
        )

    def expected(self) -> Tensor:
        """The correct result, computed in float32, row by row."""
        sinks = None if self.scoring.sinks is None else self.scoring.sinks.float()
        scoring = Scoring(self.scoring.scale, self.scoring.window, self.scoring.softcap, sinks)
        outputs, start = [], 0
        for row, (before, new) in enumerate(self.rows):
            slots = self._slots(row).to(self._device)
            keys, values = self.layer.keys[slots].float(), self.layer.values[slots].float()
            outputs.append(attend_span(self.query[start : start + new].float(), keys, values, before, scoring))
            start += new
        return torch.cat(outputs)


BLOCK_SIZE = 256  # flash attention's paged kernels need a multiple of this

CACHE_SHARE = 0.92  # the cache's share of the memory left by weights, passes and graphs

GRAPH_SHARE = 0.03  # the most that captured passes may take of the device's memory


def build_device_runner(
    spec: ModelSpec, model: Any, shapes: list[LayerShape], device: torch.device, adapters: Adapters
) -> tuple[DeviceRunner, Scheduler]:
    """The runner and a scheduler with a cache that fits the device. Raises NotPageable if no attention kernel works."""
    attention = choose_attention(shapes, BLOCK_SIZE, device)
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    limits = pass_limits(spec, model)
    num_tokens = _count_cache_tokens(spec, model, shapes, attention, limits, device)
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1  # plus the padding block
    layers = [shape.allocate(num_blocks * BLOCK_SIZE, device) for shape in shapes]
    runner = DeviceRunner(model, layers, BLOCK_SIZE, device, attention, limits, adapters)
    if spec.decode_graphs:
        capture_decodes(runner, spec.max_num_seqs, device)
    return runner, make_scheduler(spec, BlockPool(num_blocks, BLOCK_SIZE), limits)


def make_scheduler(spec: ModelSpec, pool: BlockPool, limits: PassLimits) -> Scheduler:
    return Scheduler(
        pool,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_num_scored_tokens=max_num_scored_tokens(limits.vocab_size),
    )


def pass_limits(spec: ModelSpec, model: Any) -> PassLimits:
    """The largest possible pass. It has room for every sequence to decode, whatever the token budget."""
    vocab_size = model.get_output_embeddings().weight.shape[0]
    max_tokens = spec.max_num_seqs + spec.max_num_batched_tokens
    return PassLimits(max_tokens, spec.max_num_seqs, spec.max_model_len, vocab_size)


@torch.inference_mode()
def capture_decodes(runner: DeviceRunner, max_num_seqs: int, device: torch.device) -> None:
    free, total = torch.cuda.mem_get_info(device)
    least = free - int(total * GRAPH_SHARE)

    def has_room() -> bool:
        return torch.cuda.mem_get_info(device)[0] > max(0, least)

    runner.graphs.capture_all(runner.decode_pass, batch_sizes(max_num_seqs), CudaCapture(), has_room)


def _count_cache_tokens(
    spec: ModelSpec,
    model: Any,
    shapes: list[LayerShape],
    attention: DeviceAttention,
    limits: PassLimits,
    device: torch.device,
) -> int:
    """The size of the cache in tokens: kv_cache_tokens if set; else what all sequences together could use, limited by
    the memory that the largest pass leaves."""
    bytes_per_token = sum(shape.bytes_per_token for shape in shapes)
    num_tokens = spec.kv_cache_tokens
    if num_tokens is None:
        pass_bytes = _measure_pass(model, shapes, attention, limits, device)
        free, total = torch.cuda.mem_get_info(device)
        free_bytes = int((free - pass_bytes - total * GRAPH_SHARE) * CACHE_SHARE)
        num_tokens = min(spec.max_num_seqs * spec.max_model_len, free_bytes // bytes_per_token)
        log.info("cache sized", extra={"pass_bytes": pass_bytes, "free_bytes": free, "num_cache_tokens": num_tokens})
    if num_tokens < spec.max_model_len:
        raise ValueError(
            f"the cache of model {spec.id!r} has room for {num_tokens} tokens, but max_model_len is "
            f"{spec.max_model_len}; lower max_model_len or raise kv_cache_tokens"
        )
    return num_tokens


def _measure_pass(
    model: Any, shapes: list[LayerShape], attention: DeviceAttention, limits: PassLimits, device: torch.device
) -> int:
    """Bytes that the largest pass and its logits need in addition to weights and cache, measured on a cache of one
    block."""
    layers = [shape.allocate(BLOCK_SIZE, device) for shape in shapes]
    runner = DeviceRunner(model, layers, BLOCK_SIZE, device, attention, limits, Adapters())
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        runner.trial_pass()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner, layers
    torch.cuda.empty_cache()
    return peak
