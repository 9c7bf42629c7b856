"""The peers that the engine is compared with. Each serves the same requests as they arrive."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from tests.engine_driver import make_add, make_engine

MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True)
class Request:
    number: int
    arrives_at: float
    prompt: list[int]
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    vocab_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    num_requests: int


@dataclass(slots=True)
class Measured:
    """The results of one peer in one round. Times count from the first arrival."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process; least affected by other work on the machine
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    first_token_seconds: dict[int, float] = field(default_factory=dict)
    done_seconds: dict[int, float] = field(default_factory=dict)


class Clock:
    """Hands out requests when they are due."""

    def __init__(self, requests: list[Request]) -> None:
        self._due = list(requests)
        self._started = time.perf_counter()
        self._cpu_started = time.process_time()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._started

    def stop(self, measured: Measured) -> Measured:
        measured.seconds = self.now
        measured.cpu_seconds = time.process_time() - self._cpu_started
        return measured

    @property
    def has_more(self) -> bool:
        return bool(self._due)

    def arrived(self, max_count: int | None = None) -> list[Request]:
        """Take up to `max_count` of the requests that have arrived, without waiting."""
        now = self.now
        num_due = sum(1 for request in self._due if request.arrives_at <= now)
        count = num_due if max_count is None else min(num_due, max_count)
        taken, self._due = self._due[:count], self._due[count:]
        return taken

    def wait_for(self, max_count: int) -> list[Request]:
        """Wait until a request has arrived, and take up to `max_count`."""
        while not (taken := self.arrived(max_count)):
            time.sleep(max(0.0, self._due[0].arrives_at - self.now))
        return taken


def make_requests(case: Case, rate: float, seed: int) -> list[Request]:
    """Requests that arrive as a Poisson process. Prompt lengths are uniform between a quarter of the maximum and the
    maximum, output lengths between an eighth and the maximum."""
    rng = random.Random(seed)
    requests, at = [], 0.0
    for number in range(case.num_requests):
        length = rng.randint(case.max_prompt_tokens // 4, case.max_prompt_tokens)
        prompt = [rng.randrange(10, case.vocab_size) for _ in range(length)]
        num_new_tokens = rng.randint(max(1, case.max_new_tokens // 8), case.max_new_tokens)
        requests.append(Request(number, at, prompt, num_new_tokens))
        at += rng.expovariate(rate) if rate else 0.0
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
            measured.token_ids.setdefault(int(output.job_id), []).extend(output.token_ids)
            if output.finish_reason:
                measured.done_seconds[int(output.job_id)] = clock.now
    return clock.stop(measured)


def run_one_at_a_time(model: Any, requests: list[Request], slots: int) -> Measured:
    """Run a quarter of the requests, since the speed does not depend on their number."""
    return run_static(model, requests[: len(requests) // 4], 1)


@torch.inference_mode()
def run_static(model: Any, requests: list[Request], slots: int) -> Measured:
    """Run static batches. No token reaches its client before its whole batch is done."""
    clock, measured = Clock(requests), Measured()
    while clock.has_more:
        batch = clock.wait_for(slots)
        width = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (width - len(request.prompt)) + request.prompt for request in batch])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in batch])
        num_new_tokens = max(request.num_new_tokens for request in batch)
        output = model.generate(ids, attention_mask=mask, generation_config=greedy(num_new_tokens))
        assert output.shape[1] == width + num_new_tokens
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            measured.token_ids[request.number] = row[: request.num_new_tokens]
            measured.first_token_seconds[request.number] = measured.done_seconds[request.number] = clock.now
    return clock.stop(measured)


def run_generate_batch(model: Any, requests: list[Request], slots: int) -> Measured:
    """Run transformers' ContinuousBatchingManager, adding requests as they arrive."""
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
                measured.token_ids[int(result.request_id)] = list(result.generated_tokens)
        return clock.stop(measured)


def greedy(num_new_tokens: int) -> GenerationConfig:
    """A config without an end token, so that every peer makes exactly as many tokens as requested."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=num_new_tokens, min_new_tokens=None, eos_token_id=None, pad_token_id=0
    )


def run_llama_cpp(model: Any, requests: list[Request], slots: int) -> Measured:
    from bench.gguf_weights import write_gguf
    from bench.llama_cpp_peer import LlamaCpp

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(model, file)
        llama = LlamaCpp(file, slots, MAX_MODEL_LEN, torch.get_num_threads())
    clock, measured = Clock(requests), Measured()
    while clock.has_more or llama.running:
        for request in clock.arrived(llama.num_free) if llama.running else clock.wait_for(slots):
            llama.add(request)
        for sequence in llama.step():
            number = sequence.request.number
            measured.first_token_seconds.setdefault(number, clock.now)
            if sequence.is_done:
                measured.done_seconds[number] = clock.now
                measured.token_ids[number] = sequence.token_ids[len(sequence.request.prompt) :]
    clock.stop(measured)
    llama.close()
    return measured


PEERS: dict[str, Callable[[Any, list[Request], int], Measured]] = {
    "engine": run_engine,
    "one": run_one_at_a_time,
    "static": run_static,
    "generate_batch": run_generate_batch,
    "llama_cpp": run_llama_cpp,
}
