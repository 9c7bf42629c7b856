"""The engine's GPU path on a CPU, with reference attention, and graphs that replay their Python function.

The stand-in for a graph behaves like a real one: its outputs are at fixed addresses in one pool that all graphs share,
and its tensors are its only inputs. So a number that was baked in, or a buffer that was reused too early, is noticed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_worker.engine.cuda.attention import ATTENTION_NAME, DeviceAttention, VarlenAttention, register
from gpu_worker.engine.cuda.backend import make_scheduler, pass_limits
from gpu_worker.engine.cuda.graphs import batch_sizes
from gpu_worker.engine.cuda.runner import DeviceRunner
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.loading import eos_token_ids, vocab_size
from gpu_worker.engine.lora import load_adapters
from gpu_worker.engine.probe import probe_layers
from gpu_worker.engine.scheduler import ModelLimits
from tests.engine_driver import CPU, make_spec, tiny_model
from tests.engine_parts import byte_tokenizer
from tests.reference_varlen import varlen_attn

BLOCK_SIZE = 16


class ReplayedFunction:
    """Captures a function by remembering it, and counts its replays."""

    def __init__(self) -> None:
        self.num_replays = 0
        self._pool = torch.zeros(0)

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        example = run()
        if self._pool.numel() < example.numel():
            assert not self._pool.numel(), "the largest is captured first"
            self._pool = torch.empty(example.numel())
        output = self._pool[: example.numel()].view_as(example)

        def replay() -> Tensor:
            self.num_replays += 1
            return output.copy_(run())

        return replay


def make_device_engine(
    model: Any = None,
    *,
    capture: ReplayedFunction | None = None,
    attention: DeviceAttention | None = None,
    runs_ahead: bool = True,
    **spec_changes: Any,
) -> Engine:
    model = model or tiny_model()
    spec = make_spec(**spec_changes)
    adapters = load_adapters(spec, model)
    shapes = probe_layers(model, spec.max_model_len, CPU)
    register()
    model.set_attn_implementation(ATTENTION_NAME)
    num_blocks = -(-(spec.kv_cache_tokens or 0) // BLOCK_SIZE) + 1
    layers = [shape.allocate(num_blocks * BLOCK_SIZE, CPU) for shape in shapes]
    attention = attention or VarlenAttention(varlen_attn)
    limits = pass_limits(spec, model)
    runner = DeviceRunner(model, layers, BLOCK_SIZE, CPU, attention, limits, adapters, runs_ahead=runs_ahead)
    with torch.inference_mode():
        sizes = batch_sizes(spec.max_num_seqs)
        runner.graphs.capture_all(runner.decode_pass, sizes, capture or ReplayedFunction(), lambda: True)
    assert runner.graphs.sizes == sizes
    return Engine(
        scheduler=make_scheduler(spec, BlockPool(num_blocks, BLOCK_SIZE), limits),
        runner=runner,
        tokenizer=byte_tokenizer(),
        limits=ModelLimits(vocab_size(model), spec.max_model_len, eos_token_ids(model), adapters.names),
    )
