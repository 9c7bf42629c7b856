"""The engine against its peers: one run, the same weights, lengths and arrivals.

    python -m bench.engine --model mini --requests 64 --rate 40 --rounds 3
    python -m bench.engine --model 15m --prompt 256 --threads 1

Requests of mixed lengths arrive as a Poisson process (open loop; --rate 0: all at once) and are served greedily in
float32 by

    engine      this project's continuous batching
    one         one at a time with model.generate()
    static      batches of what has arrived, left-padded, with model.generate() until the longest is done
    generate_batch   transformers' own continuous batching

First the ceiling: the matrix products of the weights alone. Then each round runs every peer once; a figure is useful
tokens over the time from the first arrival to the last token. The last line is one JSON object with the median and the
spread of the ratios over the rounds. The engine's peak batch is --slots, and so is theirs.
"""

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig
from transformers.utils import logging as transformers_logging

from domain.catalog import Catalog
from gpu_worker.engine.loading import store_weights_by_column
from settings import ROOT
from tests.engine_driver import make_add, make_engine, tiny_model

MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    arrives_at: float
    prompt: list[int]
    num_new_tokens: int


@dataclass(slots=True)
class Measured:
    """One peer, one round. Times count from the first arrival."""

    seconds: float = 0.0
    first_token_seconds: dict[int, float] = field(default_factory=dict)
    done_seconds: dict[int, float] = field(default_factory=dict)


class Clock:
    """Hands the requests out as they fall due."""

    def __init__(self, requests: list[Request]) -> None:
        self._due = list(requests)
        self._started = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._started

    @property
    def has_more(self) -> bool:
        return bool(self._due)

    def arrived(self, max_count: int | None = None) -> list[Request]:
        """Without waiting."""
        now = self.now
        num_due = sum(1 for request in self._due if request.arrives_at <= now)
        count = num_due if max_count is None else min(num_due, max_count)
        taken, self._due = self._due[:count], self._due[count:]
        return taken

    def wait_for(self, max_count: int) -> list[Request]:
        """At least one."""
        while not (taken := self.arrived(max_count)):
            time.sleep(max(0.0, self._due[0].arrives_at - self.now))
        return taken


def make_requests(arguments: argparse.Namespace, vocab_size: int) -> list[Request]:
    """Prompt lengths uniform from a quarter of --prompt to all of it, outputs from an eighth of --new to all."""
    rng = random.Random(arguments.seed)
    requests, at = [], 0.0
    for number in range(arguments.requests):
        prompt = [rng.randrange(10, vocab_size) for _ in range(rng.randint(arguments.prompt // 4, arguments.prompt))]
        requests.append(Request(number, at, prompt, rng.randint(max(1, arguments.new // 8), arguments.new)))
        at += rng.expovariate(arguments.rate) if arguments.rate else 0.0
    return requests


def run_engine(model: Any, requests: list[Request], slots: int) -> Measured:
    engine = make_engine(
        model,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=slots,
        max_num_batched_tokens=512,
        kv_cache_tokens=slots * MAX_MODEL_LEN,
    )
    clock, measured = Clock(requests), Measured()
    while clock.has_more or engine.has_work:
        for request in clock.arrived() if engine.has_work else clock.wait_for(slots):
            engine.add(
                make_add(str(request.number), request.prompt, max_tokens=request.num_new_tokens, ignore_eos=True)
            )
        for output in engine.step(lambda members: None).outputs:
            measured.first_token_seconds.setdefault(int(output.job_id), clock.now)
            if output.finish_reason:
                measured.done_seconds[int(output.job_id)] = clock.now
    measured.seconds = clock.now
    return measured


def run_one_at_a_time(model: Any, requests: list[Request], slots: int) -> Measured:
    return run_static(model, requests, 1)


@torch.inference_mode()
def run_static(model: Any, requests: list[Request], slots: int) -> Measured:
    """No token reaches its client before its whole batch is done."""
    clock, measured = Clock(requests), Measured()
    while clock.has_more:
        batch = clock.wait_for(slots)
        width = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (width - len(request.prompt)) + request.prompt for request in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        num_new_tokens = max(request.num_new_tokens for request in batch)
        output = model.generate(ids, attention_mask=mask, generation_config=greedy(num_new_tokens))
        assert output.shape[1] == width + num_new_tokens
        for request in batch:
            measured.first_token_seconds[request.number] = measured.done_seconds[request.number] = clock.now
    measured.seconds = clock.now
    return measured


def run_generate_batch(model: Any, requests: list[Request], slots: int) -> Measured:
    """transformers' ContinuousBatchingManager, requests added as they arrive."""
    measured = Measured()
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=slots * MAX_MODEL_LEN // 32, max_batch_tokens=512, max_requests_per_batch=slots
    )
    with model.continuous_batching_context_manager(
        generation_config=greedy(1), continuous_batching_config=config, block=True, timeout=5
    ) as manager:
        clock = Clock(requests)
        while len(measured.done_seconds) < len(requests):
            for request in clock.arrived():
                manager.add_request(
                    request.prompt,
                    request_id=str(request.number),
                    max_new_tokens=request.num_new_tokens,
                    streaming=True,
                )
            result = manager.get_result(timeout=0.001)
            if result is None:
                assert manager.is_running()
                continue
            if result.generated_tokens:
                measured.first_token_seconds.setdefault(int(result.request_id), clock.now)
            if result.is_finished():
                measured.done_seconds[int(result.request_id)] = clock.now
        measured.seconds = clock.now
    return measured


def greedy(num_new_tokens: int) -> GenerationConfig:
    """No end token: every peer makes exactly the tokens that were asked for."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=num_new_tokens, min_new_tokens=None, eos_token_id=None, pad_token_id=0
    )


PEERS: dict[str, Callable[[Any, list[Request], int], Measured]] = {
    "engine": run_engine,
    "one": run_one_at_a_time,
    "static": run_static,
    "generate_batch": run_generate_batch,
}


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
        return tiny_model(config)
    path = Catalog.load(ROOT / "models.toml").default.path if name == "mini" else name
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def seconds_of_products(model: Any, num_rows: int) -> float:
    """The least of 20 tries at all of the model's linear layers, and nothing else, on `num_rows` rows."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {layer: torch.randn(num_rows, layer.in_features) for layer in layers}

    def once() -> float:
        started = time.perf_counter()
        for layer in layers:
            layer(inputs[layer])
        return time.perf_counter() - started

    return min(once() for _ in range(20))


def rounds(
    models: dict[str, Any], requests: list[Request], arguments: argparse.Namespace
) -> Iterator[dict[str, float]]:
    """Useful tokens per second of every peer, once per round."""
    num_tokens = sum(request.num_new_tokens for request in requests)
    for number in range(arguments.rounds):
        speeds = {}
        for name in arguments.peers:
            measured = PEERS[name](models["engine" if name == "engine" else "peers"], requests, arguments.slots)
            speeds[name] = num_tokens / measured.seconds
            first = statistics.median(
                measured.first_token_seconds[request.number] - request.arrives_at for request in requests
            )
            done = statistics.median(measured.done_seconds[r.number] - r.arrives_at for r in requests)
            print(
                f"round {number + 1} {name:>15}: {speeds[name]:8.0f} tokens/s, "
                f"median first token {first * 1e3:7.0f} ms, median done {done * 1e3:7.0f} ms",
                flush=True,
            )
        yield speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="mini (the embedded one), 15m (random weights) or a folder")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rate", type=float, default=40.0, help="requests per second; 0: all at once")
    parser.add_argument("--prompt", type=int, default=128, help="longest prompt, tokens")
    parser.add_argument("--new", type=int, default=96, help="longest output, tokens")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    # The engine lays its weights out anew and replaces the attention function, so each side has a model of its own.
    transformers_logging.disable_progress_bar()
    models = {"engine": load(arguments.model), "peers": load(arguments.model)}
    store_weights_by_column(models["engine"])
    models["peers"].generation_config.eos_token_id = None
    requests = make_requests(arguments, models["peers"].config.vocab_size)
    num_parameters = models["peers"].num_parameters()
    ceiling = arguments.slots / seconds_of_products(models["engine"], arguments.slots)
    print(f"{arguments.model}: {num_parameters / 1e6:.1f} M parameters, {arguments.threads} thread(s), float32")
    print(f"ceiling, matrix products of {arguments.slots} rows alone, no prompts: {ceiling:.0f} tokens/s", flush=True)
    results = list(rounds(models, requests, arguments))
    summary: dict[str, Any] = {"bench": "engine", **vars(arguments), "ceiling_tokens_per_second": round(ceiling)}
    for name in arguments.peers:
        summary[f"{name}_tokens_per_second"] = round(statistics.median(speeds[name] for speeds in results))
        if name != "engine" and "engine" in arguments.peers:
            ratios = [speeds["engine"] / speeds[name] for speeds in results]
            summary[f"engine_over_{name}"] = [round(f(ratios), 2) for f in (statistics.median, min, max)]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
