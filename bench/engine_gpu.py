"""Measures the engine on one GPU in one run of about eight minutes; nothing is downloaded.

    python -m bench.engine_gpu [--layers 32] [--seconds 480] [--skip tests,peer]

First comes the ceiling: the memory bandwidth of copies. Then come these parts, each run even if another fails:

    kernels    varlen_attn with block tables, also captured; whether the Triton kernels agree; how fast
    tests      tests/gpu
    decode     a Llama of 8B's shape in bfloat16 with random weights, 1,000 tokens of context, batches 1, 8, 64 and 256:
               tokens/s and the share of the ceiling: eager; captured; captured and one step ahead
    sampling   the cost of a draw in a batch of 64: greedy, plain, top-k, top-p, penalties
    peer       transformers' generate_batch on the same 64 prompts, and the engine on the same

The last line is one JSON object. The ceiling of a step is the bytes of the weights and of the batch's keys and values,
divided by the bandwidth.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

from gpu_worker.engine.backends.transformers import build_engine
from gpu_worker.engine.cuda.attention import TritonAttention, VarlenAttention
from gpu_worker.engine.cuda.backend import check_attention
from gpu_worker.engine.cuda.graphs import CudaCapture, DecodeGraphs
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.probe import LayerShape
from observability import configure_logging
from settings import ROOT
from tests.engine_driver import make_add, make_spec, step
from tests.engine_parts import byte_tokenizer

CUDA = torch.device("cuda")
CONTEXT = 1000
BATCHES = (1, 8, 64, 256)
NUM_STEPS = 24
VOCAB_SIZE = 128_256
SHAPE = LayerShape((8, 128), (8, 128), torch.bfloat16, None, 32, 128**-0.5, None, False)
BLOCK_SIZE = 256


def seconds_of(run: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds of one call, by the device's clock, after a warm-up."""
    for _ in range(3):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def measure_bandwidth() -> float:
    """Bytes per second, reads and writes counted."""
    source = torch.empty(2**31, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def kernels() -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn

    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    candidates: dict[str, Callable[[], Any]] = {
        "varlen": lambda: VarlenAttention(varlen_attn),
        "triton": lambda: TritonAttention(processors),
    }
    return {name: guarded(lambda make=make: _try_kernel(make())) for name, make in candidates.items()}  # type: ignore[misc]


def _try_kernel(attention: Any) -> dict[str, Any]:
    check_attention(attention, SHAPE, BLOCK_SIZE, CUDA)
    found: dict[str, Any] = {"agrees": True}
    for batch in (1, 16, 64, 256):
        run, num_bytes = _decode_call(attention, batch)
        found[f"eager_gb_s_{batch}"] = round(num_bytes / seconds_of(run) / 1e9)
        found[f"captured_gb_s_{batch}"] = guarded(lambda: round(num_bytes / seconds_of(CudaCapture()(run)) / 1e9))  # noqa: B023
    return found


def _decode_call(attention: Any, batch: int) -> tuple[Callable[[], torch.Tensor], int]:
    from gpu_worker.engine.cpu.attention import Scoring
    from gpu_worker.engine.cuda.attention import RowGroup

    blocks_each = -(-CONTEXT // BLOCK_SIZE)
    layer = SHAPE.allocate((batch * blocks_each + 1) * BLOCK_SIZE, CUDA)
    edges = torch.arange(batch + 1, dtype=torch.int32, device=CUDA)
    group = RowGroup(
        token_start=0,
        token_stop=batch,
        starts=edges,
        key_starts=edges * CONTEXT,
        lengths=torch.full((batch,), CONTEXT, dtype=torch.int32, device=CUDA),
        block_tables=torch.arange(1, batch * blocks_each + 1, dtype=torch.int32, device=CUDA).view(batch, -1),
        max_new_tokens=1,
        max_length=2048,
    )
    query = torch.randn(batch, 32, 128, dtype=torch.bfloat16, device=CUDA)
    scoring = Scoring(SHAPE.scale)
    num_bytes = batch * CONTEXT * SHAPE.bytes_per_token
    return lambda: attention.attend_decodes(query, layer, group, BLOCK_SIZE, scoring), num_bytes


def tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    print(done.stdout[-6000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"exit": done.returncode, "summary": done.stdout.strip().splitlines()[-1:], "failed": lines[:60]}


def make_model(layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    with torch.device(CUDA):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_gpu_engine(model: Any, **changes: Any) -> Engine:
    spec = {"max_model_len": 2048, "max_num_seqs": 256, "max_num_batched_tokens": 4096, "kv_cache_tokens": 256 * 1280}
    return build_engine(make_spec(**spec | changes), model, byte_tokenizer(), CUDA)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(1, 256) for _ in range(CONTEXT)] for _ in range(count)]


def fill(engine: Engine, batch: int, **params: Any) -> None:
    """Compute all prompts, so that all sequences are decoding."""
    for number, prompt in enumerate(prompts(batch)):
        engine.add(make_add(f"{batch} {number}", prompt, max_tokens=1000, ignore_eos=True, seed=number, **params))
    while engine.scheduler.waiting or any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.running):
        step(engine)


def empty(engine: Engine, batch: int) -> None:
    for number in range(batch):
        engine.abort(f"{batch} {number}", 1, "")


def seconds_per_step(engine: Engine) -> float:
    """By the host's clock, as a reader of the stream would see it."""
    for _ in range(4):
        step(engine)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        step(engine)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / NUM_STEPS


def decode(model: Any, engine: Engine, bandwidth: float) -> dict[str, Any]:
    runner: Any = engine._runner
    graphs = runner.graphs
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    per_token = SHAPE.bytes_per_token * model.config.num_hidden_layers
    modes = {"eager": (DecodeGraphs(), False), "captured": (graphs, False), "captured ahead": (graphs, True)}
    found: dict[str, Any] = {"attention": runner._attention.name, "graphs": graphs.sizes, "weight_bytes": weights}
    for batch in BATCHES:
        fill(engine, batch)
        ceiling = (weights + batch * CONTEXT * per_token) / bandwidth
        for mode, (mode_graphs, is_ahead) in modes.items():
            runner.graphs, runner._runs_ahead = mode_graphs, is_ahead
            seconds = seconds_per_step(engine)
            found[f"{mode} {batch}"] = {
                "ms_per_step": round(seconds * 1e3, 3),
                "tokens_per_second": round(batch / seconds),
                "share_of_ceiling": round(ceiling / seconds, 3),
            }
            print(f"batch {batch:4d} {mode:15s} {found[f'{mode} {batch}']}", flush=True)
        empty(engine, batch)
    return found


def sampling(engine: Engine) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {},
        "plain": {"temperature": 1.0},
        "top_k": {"temperature": 1.0, "top_k": 50},
        "top_p": {"temperature": 1.0, "top_p": 0.9},
        "top_k and top_p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        "penalties": {"temperature": 1.0, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
        "logprobs": {"logprobs": 5},
    }
    found = {}
    for kind, params in kinds.items():
        fill(engine, 64, **params)
        found[kind] = round(seconds_per_step(engine) * 1e3, 3)
        empty(engine, 64)
    return {"ms_per_step": found}


def peer(model: Any, engine: Engine) -> dict[str, Any]:
    num_new = 64
    started = time.perf_counter()
    for number, prompt in enumerate(prompts(64)):
        engine.add(make_add(str(number), prompt, max_tokens=num_new, ignore_eos=True, cache_salt="peer"))
    while engine.has_work:
        step(engine)
    ours = time.perf_counter() - started
    model.set_attn_implementation("sdpa")
    config = GenerationConfig(do_sample=False, max_new_tokens=num_new, eos_token_id=None, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_batch_tokens=4096, max_requests_per_batch=64)
    started = time.perf_counter()
    results = model.generate_batch(
        inputs=prompts(64), generation_config=config, continuous_batching_config=batching, progress_bar=False
    )
    theirs = time.perf_counter() - started
    num_tokens = sum(len(result.generated_tokens) for result in results.values())
    return {
        "engine_tokens_per_second": round(64 * num_new / ours),
        "generate_batch_tokens_per_second": round(num_tokens / theirs),
        "generate_batch_tokens": num_tokens,
    }


def guarded(part: Callable[[], Any]) -> Any:
    """The part's result, or the error that it raised."""
    try:
        return part()
    except Exception as exc:
        traceback.print_exc()
        return {"error": f"{type(exc).__name__}: {str(exc)[:300]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=480, help="no part begins after this many seconds")
    parser.add_argument("--skip", default="", help="parts to skip, separated by commas")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and there is none")
    configure_logging("INFO", "json")
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(CUDA), "torch": torch.__version__}
    started = time.monotonic()

    def do(name: str, part: Callable[[], Any]) -> None:
        if name in arguments.skip.split(",") or time.monotonic() - started > arguments.seconds:
            report[name] = "skipped"
            return
        began = time.monotonic()
        report[name] = guarded(part)
        print(f"== {name}, {time.monotonic() - began:.0f} s: {json.dumps(report[name])}", flush=True)

    bandwidth = measure_bandwidth()
    torch.cuda.empty_cache()
    report["bandwidth_gb_s"] = round(bandwidth / 1e9)
    print(f"ceiling: {bandwidth / 1e9:.0f} GB/s on {report['device']}", flush=True)
    do("kernels", kernels)
    do("tests", tests)
    torch.cuda.empty_cache()
    model = make_model(arguments.layers)
    engines: list[Engine] = []
    do("load", lambda: engines.append(make_gpu_engine(model)))
    if engines:
        do("decode", lambda: decode(model, engines[0], bandwidth))
        do("sampling", lambda: sampling(engines[0]))
        do("peer", lambda: peer(model, engines[0]))
        engines.clear()
        torch.cuda.empty_cache()
    report["seconds"] = round(time.monotonic() - started)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
