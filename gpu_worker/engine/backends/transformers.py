"""The back end for any causal language model of transformers, run by our own engine over a paged cache.

The fast path replaces the model's attention function. A model that fails the probe at load (because of custom attention
code or recurrent state) takes the slow path: one pass per sequence, with the same scheduler and sampler.
"""

import logging
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from domain.catalog import ModelSpec
from gpu_worker.engine.backends import LoadedModel, RecordStep
from gpu_worker.engine.backends.encoder import make_embedding_queue
from gpu_worker.engine.cpu.runner import PagedRunner
from gpu_worker.engine.cuda.backend import build_device_runner
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.families import turn_end_token_ids
from gpu_worker.engine.host_memory import anonymous_bytes, available_bytes
from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.loading import (
    check_length,
    choose_device,
    eos_token_ids,
    load_model,
    load_tokenizer,
    set_threads,
    store_weights_by_column,
    vocab_size,
)
from gpu_worker.engine.lora import Adapters, load_adapters
from gpu_worker.engine.probe import LayerShape, NotPageable, fuse, probe_layers
from gpu_worker.engine.quantization import quantise
from gpu_worker.engine.runner import ModelRunner
from gpu_worker.engine.sampling import max_num_scored_tokens
from gpu_worker.engine.scheduler import ModelLimits, Scheduler
from gpu_worker.engine.sequential import SequentialRunner
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, StepDone

log = logging.getLogger(__name__)

BLOCK_SIZE = 16  # tokens per block on a CPU
CPU_CACHE_SHARE = 0.25  # of the memory that the weights leave, since there may be other workers
MAX_CPU_CACHE_SHARE = 0.5  # if that share has no room for one text of full length
CPU = torch.device("cpu")
WHOLE_PROMPTS = 2**31  # a token budget that never splits a prompt


class TransformersBackend:
    def __init__(self, spec: ModelSpec) -> None:
        device = choose_device(spec)
        tokenizer = load_tokenizer(spec)
        model = load_model(spec, device)
        set_threads(model)
        self._engine = build_engine(spec, model, tokenizer, device)
        self._embeddings = make_embedding_queue(spec, model, device)
        pool = self._engine.scheduler.pool
        self._loaded = LoadedModel(str(device), pool.num_tokens, keeps_prefixes=pool.use_prefix_cache)

    @property
    def loaded(self) -> LoadedModel:
        return self._loaded

    @property
    def has_work(self) -> bool:
        return self._engine.has_work or self._embeddings.has_work

    def add(self, command: AddJob) -> None:
        self._engine.add(command)

    def embed(self, command: EmbedJob) -> None:
        self._embeddings.add(command)

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        self._embeddings.abort(job_id, attempt, reason)
        self._engine.abort(job_id, attempt, reason)

    def step(self, record: RecordStep) -> StepDone:
        if not self._embeddings.has_work:
            return self._engine.step(record)
        generate = self._engine.step if self._engine.has_work else None
        return self._embeddings.step(record, generate, self.stats)

    def stats(self) -> EngineStats:
        stats = self._engine.stats()
        return msgspec.structs.replace(stats, num_prompt_tokens=stats.num_prompt_tokens + self._embeddings.num_tokens)


def build_engine(spec: ModelSpec, model: Any, tokenizer: Tokenizer, device: torch.device) -> Engine:
    """An engine for a loaded model, which it takes over and may modify."""
    check_length(spec, model)
    if device.type == "cpu":
        store_weights_by_column(model)
    quantise(spec, model, device)
    config = model.config.get_text_config()
    end_token_ids = eos_token_ids(model) | turn_end_token_ids(config.model_type, tokenizer)
    adapters = load_adapters(spec, model)
    limits = ModelLimits(vocab_size(model), spec.max_model_len, end_token_ids, adapters.names)
    own_attention = model.config._attn_implementation
    runner: ModelRunner
    try:
        shapes = probe_layers(model, spec.max_model_len, device)
        if device.type == "cuda":
            runner, scheduler = build_device_runner(spec, model, shapes, device, adapters)
        else:
            runner, scheduler = _paged(spec, model, shapes, adapters)
    except NotPageable as exc:
        log.warning("model runs on the slow path", extra={"model": spec.id, "reason": str(exc)})
        model.set_attn_implementation(own_attention)
        runner, scheduler = _sequential(spec, model, device, adapters)
    return Engine(scheduler=scheduler, runner=runner, tokenizer=tokenizer, limits=limits)


def _paged(spec: ModelSpec, model: Any, shapes: list[LayerShape], adapters: Adapters) -> tuple[PagedRunner, Scheduler]:
    forward = fuse(model, shapes, spec.max_model_len, CPU, adapters)
    num_blocks = -(-_count_cache_tokens(spec, model, shapes) // BLOCK_SIZE) + 1  # plus the padding block
    layers = [shape.allocate_blocks(num_blocks, BLOCK_SIZE, CPU) for shape in shapes]
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_num_scored_tokens=max_num_scored_tokens(vocab_size(model)),
    )
    return PagedRunner(forward, layers, adapters), scheduler


def _sequential(
    spec: ModelSpec, model: Any, device: torch.device, adapters: Adapters
) -> tuple[SequentialRunner, Scheduler]:
    """A runner whose caches grow by themselves in transformers, and a pool that only counts blocks, so that admission
    and preemption work as usual."""
    num_tokens = max(spec.max_model_len, spec.kv_cache_tokens or spec.max_num_seqs * spec.max_model_len)
    pool = BlockPool(-(-num_tokens // 16) + 1, 16, use_prefix_cache=False)
    scheduler = Scheduler(pool, max_num_seqs=spec.max_num_seqs, max_num_batched_tokens=WHOLE_PROMPTS, can_fork=False)
    return SequentialRunner(model, device, adapters), scheduler


def _count_cache_tokens(spec: ModelSpec, model: Any, shapes: list[LayerShape]) -> int:
    """The size of the cache in tokens: kv_cache_tokens if set; else what all sequences together could use, limited to a
    share of the available memory."""
    bytes_per_token = sum(shape.bytes_per_token for shape in shapes)
    num_wanted = spec.max_num_seqs * spec.max_model_len
    if spec.kv_cache_tokens is not None:
        num_tokens, reason = spec.kv_cache_tokens, "as set by kv_cache_tokens"
    else:
        room = _cache_bytes(model, least_bytes=spec.max_model_len * bytes_per_token)
        num_tokens = min(num_wanted, room // bytes_per_token)
        reason = "enough for all sequences at full length" if num_tokens == num_wanted else "limited by memory"
    if num_tokens < spec.max_model_len:
        raise ValueError(
            f"the cache of model {spec.id!r} has room for {num_tokens} tokens, at {bytes_per_token} bytes each, but "
            f"max_model_len is {spec.max_model_len}; lower max_model_len, raise kv_cache_tokens, or free memory"
        )
    size = f"{num_tokens} tokens, {num_tokens * bytes_per_token / 2**20:.0f} MiB"
    log.info("key/value cache of %s: %s, %s", spec.id, size, reason, extra={"num_cache_tokens": num_tokens})
    return num_tokens


def _cache_bytes(model: Any, *, least_bytes: int) -> int:
    """How much memory the cache may take; `least_bytes` is the size of one text of full length.

    Weights in mapped files may not have been read yet. They count as used, even if the kernel reports their pages as
    available.
    """
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    available = available_bytes() - max(0, weight_bytes - anonymous_bytes())
    share = int(available * CPU_CACHE_SHARE)
    return least_bytes if share < least_bytes <= available * MAX_CPU_CACHE_SHARE else max(0, share)
