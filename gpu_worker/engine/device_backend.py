"""A runner for a device, fitted to its memory: attention chosen, cache sized, decode passes captured."""

import logging
from typing import Any

import torch

from domain.catalog import ModelSpec
from gpu_worker.engine.attention_choice import choose_attention
from gpu_worker.engine.decode_graphs import CudaCapture, batch_sizes
from gpu_worker.engine.device_attention import ATTENTION_NAME, DeviceAttention, register
from gpu_worker.engine.device_runner import DeviceRunner, PassLimits
from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.probe import LayerShape
from gpu_worker.engine.prompt_scoring import max_num_scored_tokens
from gpu_worker.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

BLOCK_SIZE = 256  # flash attention's paged kernels want multiples of it
CACHE_SHARE = 0.92  # of what weights, passes and graphs leave free
GRAPH_SHARE = 0.03  # of the device's memory, at most, for captured passes


def build_device_runner(
    spec: ModelSpec, model: Any, shapes: list[LayerShape], device: torch.device
) -> tuple[DeviceRunner, Scheduler]:
    """Raises NotPageable where no attention kernel of this device takes the model."""
    attention = choose_attention(shapes, BLOCK_SIZE, device)
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    limits = pass_limits(spec, model)
    num_tokens = _count_cache_tokens(spec, model, shapes, attention, limits, device)
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 1  # and the one that pads
    layers = [shape.allocate(num_blocks * BLOCK_SIZE, device) for shape in shapes]
    runner = DeviceRunner(model, layers, BLOCK_SIZE, device, attention, limits)
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
    """Every sequence may decode, whatever the token budget."""
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
    """As the entry says; else what all sequences could ever use, within what a full pass leaves of the memory."""
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
            f"model {spec.id!r} has room for {num_tokens} tokens in its cache and max_model_len = "
            f"{spec.max_model_len}; lower max_model_len or raise kv_cache_tokens"
        )
    return num_tokens


def _measure_pass(
    model: Any, shapes: list[LayerShape], attention: DeviceAttention, limits: PassLimits, device: torch.device
) -> int:
    """Bytes that the largest pass and its logits take beside weights and cache, tried on a cache of one block."""
    layers = [shape.allocate(BLOCK_SIZE, device) for shape in shapes]
    runner = DeviceRunner(model, layers, BLOCK_SIZE, device, attention, limits)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        runner.trial_pass()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del runner, layers
    torch.cuda.empty_cache()
    return peak
