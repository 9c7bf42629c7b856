"""One engine in a process of its own, in its own environment: `python -m bench.engine_child KIND JSON`.

For bench/engines.py, which writes a JSON object per line to stdin, what to run, and gets one back: what was measured.
The first line out says that the model is loaded. Needs no package but the engine's, and for KIND `backend` the light
ones of every engine.
"""

import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MAX_MODEL_LEN = 512
NUM_SLOTS = 16
#: What one step gave: number of the request, how many tokens it got, whether it has all.
Progress = Iterable[tuple[int, int, bool]]


@dataclass(frozen=True, slots=True)
class ChildRequest:
    number: int
    prompt: list[int]
    num_new_tokens: int


class Driver(Protocol):
    def __init__(self, options: dict[str, Any]) -> None: ...

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None: ...

    def step(self) -> Progress: ...


class OurBackend:
    """Any engine through our Backend. `options` is a ModelSpec."""

    def __init__(self, options: dict[str, Any]) -> None:
        from gpu_worker.engine.host_cpus import let_threads_sleep

        let_threads_sleep()  # as in an engine process
        from domain.catalog import ModelSpec
        from gpu_worker.engine.backends import import_backend

        spec = ModelSpec.model_validate(options)
        self._backend = import_backend(spec)(spec)

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        from gpu_worker.engine_process.frames import AddJob

        params: dict[str, object] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "ignore_eos": True}
        self._backend.add(AddJob(str(number), 1, prompt, params, num_new_tokens, 0, 0, str(number), [[]], [0], []))

    def step(self) -> Progress:
        done = self._backend.step(lambda members: None)
        assert not done.failures, done.failures
        for output in done.outputs:
            yield int(output.job_id), len(output.token_ids), output.finish_reason is not None


class LlamaCppAlone:
    """llama.cpp's batch interface. `options`: file."""

    def __init__(self, options: dict[str, Any]) -> None:
        from bench.llama_cpp_peer import LlamaCpp

        num_threads = len(os.sched_getaffinity(0))
        self._llama = LlamaCpp(Path(options["file"]), NUM_SLOTS, MAX_MODEL_LEN, num_threads)

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        self._llama.add(ChildRequest(number, prompt, num_new_tokens))

    def step(self) -> Progress:
        for sequence in self._llama.step():
            yield sequence.request.number, 1, sequence.is_done


class VllmAlone:
    """vLLM's engine in this process. `options`: folder."""

    def __init__(self, options: dict[str, Any]) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
        from vllm import EngineArgs, LLMEngine

        arguments = EngineArgs(
            model=options["folder"], dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=NUM_SLOTS
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._lengths: dict[int, int] = {}

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, params)

    def step(self) -> Progress:
        for output in self._engine.step():
            number, length = int(output.request_id), len(output.outputs[0].token_ids)
            yield number, length - self._lengths.pop(number, 0), output.finished
            if not output.finished:
                self._lengths[number] = length


class OpenVino:
    """OpenVINO GenAI's continuous batch. `options`: file, tokenizer is read from it."""

    def __init__(self, options: dict[str, Any]) -> None:
        import openvino_genai

        self._genai = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.cache_size = NUM_SLOTS, 512, 1
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(options["file"], scheduler, "CPU")
        self._handles: dict[int, Any] = {}
        self._left: dict[int, int] = {}

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_new_tokens
        config.ignore_eos = True
        ids = openvino.Tensor(np.array([prompt], np.int64))
        self._handles[number] = self._pipeline.add_request(number, ids, config)
        self._left[number] = num_new_tokens

    def step(self) -> Progress:
        self._pipeline.step()
        for number, handle in list(self._handles.items()):
            while handle.can_read():
                num_tokens = sum(len(output.generated_ids) for output in handle.read().values())
                self._left[number] -= num_tokens
                yield number, num_tokens, self._left[number] <= 0
            if self._left[number] <= 0:
                self._handles.pop(number)


DRIVERS: dict[str, type[Driver]] = {
    "backend": OurBackend,
    "llama_cpp": LlamaCppAlone,
    "vllm": VllmAlone,
    "openvino": OpenVino,
}


def drive(driver: Driver, prompts: list[list[int]], num_new_tokens: int, num_at_once: int) -> dict[str, Any]:
    """Run all prompts, so many at once. Times are in seconds; a gap is the time between two tokens of a text."""
    waiting = list(enumerate(prompts))
    added_at: dict[int, float] = {}
    last_at: dict[int, float] = {}
    num_tokens: dict[int, int] = {}
    first: list[float] = []
    gaps: list[float] = []
    running: set[int] = set()
    started = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < num_at_once:
            number, prompt = waiting.pop(0)
            added_at[number] = time.perf_counter()
            driver.add(number, prompt, num_new_tokens)
            running.add(number)
        for number, count, is_done in driver.step():
            now = time.perf_counter()
            num_tokens[number] = num_tokens.get(number, 0) + count
            if count and number not in last_at:
                first.append(now - added_at[number])
            elif count:
                gaps.append(now - last_at[number])
            last_at[number] = now
            if is_done:
                running.discard(number)
    seconds = time.perf_counter() - started
    assert set(num_tokens.values()) == {num_new_tokens}, num_tokens
    return {"seconds": seconds, "num_tokens": sum(num_tokens.values()), "first": first, "gaps": gaps}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    started = time.perf_counter()
    driver = DRIVERS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({"load_seconds": time.perf_counter() - started}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(drive(driver, **json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
