"""Compares the engine with its peers: the same weights, lengths, arrivals and threads, greedy, in float32.

    python -m bench.engine                                          # both models, about seven minutes
    python -m bench.engine --models 15m --peers engine llama_cpp --rounds 5

Requests of mixed lengths arrive in an open loop, as a Poisson process, as fast as the ceiling allows. No peer keeps up,
so a figure shows what a peer can do, not the rate of arrivals. The peers are

    engine           this project's continuous batching
    one              one at a time with model.generate()
    static           batches of what has arrived, left-padded, with model.generate() until the longest is done
    generate_batch   transformers' own continuous batching
    llama_cpp        continuous batches through llama.cpp's batch API; needs `pip install llama-cpp-python gguf`

First comes the ceiling: the matrix products of the weights alone. Then comes the cost of a step outside the forward
pass. Then each round runs every peer once; the figures are useful tokens divided by the time from the first arrival to
the last token, and by CPU time. Greedy tokens are compared with the engine's: texts diverge where two tokens are about
equally likely. The last line is one JSON object with the medians, and the median, least and greatest of the ratios over
the rounds.
"""

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from bench.engine_peers import MAX_MODEL_LEN, PEERS, Case, Measured, Request, make_requests
from domain.catalog import Catalog
from gpu_worker.engine.loading import store_weights_by_column
from settings import ROOT
from tests.engine_driver import make_add, make_engine, step, tiny_model

SAMPLING = {"greedy": {}, "temperature": {"temperature": 0.8}, "top_p": {"temperature": 0.8, "top_p": 0.9}}
NUM_STEPS = 60


def load(name: str) -> Any:
    if name == "15m":
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=288,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        return _calmed(tiny_model(config))
    path = Catalog.load(ROOT / "models.toml").default.path if name == "mini" else name
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _calmed(model: Any) -> Any:
    """Make random weights smaller: with large ones, a difference in the last bit grows from layer to layer, and no two
    programs would draw the same text."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(0.2)
    return model


@torch.inference_mode()
def seconds_of_products(model: Any, num_rows: int) -> float:
    """The fastest of 20 runs of the model's linear layers, and nothing else, on `num_rows` rows."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer: torch.randn(num_rows, layer.in_features) for layer in layers}

    def once() -> float:
        started = time.perf_counter()
        for layer in layers:
            layer(inputs[layer])
        return time.perf_counter() - started

    return min(once() for _ in range(20))


def overhead(model: Any, slots: int, params: dict[str, float]) -> float:
    """The share of a step's CPU time spent outside the forward pass: the lower quartile over decoding steps."""
    engine = make_engine(model, max_model_len=MAX_MODEL_LEN, max_num_seqs=slots, kv_cache_tokens=slots * MAX_MODEL_LEN)
    for number in range(slots):
        prompt = [10 + (number * 37 + position) % 1000 for position in range(64)]
        engine.add(make_add(str(number), prompt, max_tokens=NUM_STEPS * 3, ignore_eos=True, seed=number, **params))
    while engine.scheduler.waiting or any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.running):
        step(engine)
    runner: Any = engine._runner
    forward, seconds = runner._forward, []

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        logits = forward(*arguments)
        seconds.append(time.process_time() - started)
        return logits

    runner._forward = timed
    shares: list[float] = []
    for _ in range(NUM_STEPS):
        started = time.process_time()
        step(engine)
        shares.append(1.0 - seconds[-1] / (time.process_time() - started))
    return statistics.quantiles(shares, n=4)[0]


def agreement(measured: Measured, ours: Measured | None) -> str:
    if ours is None or measured is ours:
        return ""
    same = sum(ours.token_ids[number] == token_ids for number, token_ids in measured.token_ids.items())
    return f", {same} of {len(measured.token_ids)} texts as the engine's"


def run_round(models: dict[str, Any], requests: list[Request], peers: list[str], slots: int) -> dict[str, Any]:
    """Run every peer once, and return its useful tokens per second and per CPU second."""
    figures: dict[str, Any] = {}
    ours: Measured | None = None
    for name in peers:
        measured = PEERS[name](models["engine" if name == "engine" else "peers"], requests, slots)
        ours = measured if name == "engine" else ours
        served = [request for request in requests if request.number in measured.token_ids]
        num_tokens = sum(request.num_new_tokens for request in served)
        assert num_tokens == sum(map(len, measured.token_ids.values()))
        first = statistics.median(measured.first_token_seconds[r.number] - r.arrives_at for r in served)
        figures[name] = (num_tokens / measured.seconds, num_tokens / measured.cpu_seconds)
        print(
            f"{name:>15}: {figures[name][0]:7.0f} tokens/s, {figures[name][1]:7.0f} per CPU second, "
            f"median first token {first * 1e3:6.0f} ms{agreement(measured, ours)}",
            flush=True,
        )
    return figures


def summarise(results: list[dict[str, Any]], peers: list[str]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for number, unit in enumerate(("", "_by_cpu")):
        for name in peers:
            summary[f"{name}_tokens_per_second{unit}"] = round(statistics.median(r[name][number] for r in results))
            if name != "engine" and "engine" in peers:
                ratios = [r["engine"][number] / r[name][number] for r in results]
                summary[f"engine_over_{name}{unit}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    return summary


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    # The engine rearranges its weights and replaces the attention function, so each side has its own model.
    models = {"engine": load(name), "peers": load(name)}
    store_weights_by_column(models["engine"])
    models["peers"].generation_config.eos_token_id = None
    longest = arguments.prompt or (256 if name == "15m" else 128)
    case = Case(name, models["peers"].config.vocab_size, longest, arguments.new, arguments.requests)
    ceiling = arguments.slots / seconds_of_products(models["engine"], arguments.slots)
    rate = ceiling / (case.max_new_tokens * 9 / 16) if arguments.rate is None else arguments.rate
    size = models["peers"].num_parameters() / 1e6
    print(
        f"{name}: {size:.1f} M parameters, {arguments.threads} thread(s), prompts to {longest}, {rate:.0f} requests/s"
    )
    print(f"ceiling, matrix products of {arguments.slots} rows alone, no prompts: {ceiling:.0f} tokens/s")
    shares = {kind: overhead(models["engine"], arguments.slots, params) for kind, params in SAMPLING.items()}
    print("step outside the forward pass:", ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    requests = make_requests(case, rate, arguments.seed)
    results = []
    for number in range(arguments.rounds):
        print(f"round {number + 1}")
        results.append(run_round(models, requests, arguments.peers, arguments.slots))
    return {
        "ceiling_tokens_per_second": round(ceiling),
        "requests_per_second": round(rate),
        "overhead": {kind: round(share, 3) for kind, share in shares.items()},
        **summarise(results, arguments.peers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mini", "15m"], help="mini (the embedded one), 15m, or folders")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument(
        "--rate", type=float, help="requests per second; 0: all at once; default: as many as the ceiling allows"
    )
    parser.add_argument("--prompt", type=int, help="longest prompt, tokens; default 128, for 15m 256")
    parser.add_argument("--new", type=int, default=96, help="longest output, tokens")
    parser.add_argument("--slots", type=int, default=16, help="sequences per batch, for every peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="everybody's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    if "llama_cpp" in arguments.peers and not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
        print("without llama.cpp; to have it: pip install llama-cpp-python gguf")
        arguments.peers.remove("llama_cpp")
    figures = {name: measure(name, arguments) for name in arguments.models}
    print(json.dumps({"bench": "engine", **vars(arguments), **figures}))


if __name__ == "__main__":
    main()
