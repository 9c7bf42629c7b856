"""Tiny random models, and functions that drive the engine step by step, for its tests and benchmarks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from domain.catalog import ModelSpec
from gpu_worker.engine.backends.transformers import BLOCK_SIZE, _sequential, build_engine
from gpu_worker.engine.cpu.attention import BlockCache
from gpu_worker.engine.cpu.draws import noise_key
from gpu_worker.engine.cpu.runner import PagedRunner
from gpu_worker.engine.cuda.noise import keyed_noise
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.kv_cache import BlockPool
from gpu_worker.engine.runner import ModelRunner
from gpu_worker.engine.sampling import max_num_scored_tokens
from gpu_worker.engine.scheduler import Scheduler
from gpu_worker.engine.sequence import Sequence as EngineSequence
from gpu_worker.engine.sequential import SequentialRunner
from gpu_worker.engine_process.frames import AddJob, JobFailed, StepDone
from tests.engine_parts import byte_tokenizer

EOS_TOKEN_ID = 0
VOCAB_SIZE = 320  # the end token, 256 bytes, and some that occur in no text
CPU = torch.device("cpu")

torch.set_num_threads(1)  # tensors are tiny, and tests run in parallel


def tiny_llama_config(**changes: Any) -> LlamaConfig:
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS_TOKEN_ID,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**values | changes)


def tiny_model(config: PreTrainedConfig | None = None, *, seed: int = 0) -> Any:
    """A model with random weights, large enough that the next token is rarely a close call."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_llama_config()).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def make_spec(**changes: Any) -> ModelSpec:
    values = {
        "id": "tiny",
        "path": "nowhere",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "kv_cache_tokens": 2048,
    }
    return ModelSpec.model_validate(values | changes)


def make_engine(model: Any = None, **spec_changes: Any) -> Engine:
    return build_engine(make_spec(**spec_changes), model or tiny_model(), byte_tokenizer(), CPU)


def make_another(engine: Engine, **spec_changes: Any) -> Engine:
    """A fresh engine around the model of another, with everything that the model is wrapped in. This saves probing and
    fusing the model again, which takes ten passes."""
    spec = make_spec(**spec_changes)
    runner, scheduler = _another_runner(engine._runner, spec)
    limits = replace(engine._limits, max_model_len=spec.max_model_len)
    return Engine(scheduler=scheduler, runner=runner, tokenizer=engine._tokenizer, limits=limits)


def _another_runner(runner: Any, spec: ModelSpec) -> tuple[ModelRunner, Scheduler]:
    if isinstance(runner, SequentialRunner):
        return _sequential(spec, runner._model, CPU, runner._adapters)
    assert spec.kv_cache_tokens is not None
    num_blocks = -(-spec.kv_cache_tokens // BLOCK_SIZE) + 1
    layers = [
        BlockCache(*(cache.new_zeros(num_blocks, *cache.shape[1:]) for cache in (layer.keys, layer.values)))
        for layer in runner._layers
    ]
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        max_num_scored_tokens=max_num_scored_tokens(VOCAB_SIZE),
    )
    return PagedRunner(runner._model, layers, runner._adapters), scheduler


def num_sequences(params: Mapping[str, object]) -> int:
    """The number of sequences that the job runs."""
    return int(str(params.get("best_of") or params.get("n", 1)))


def make_add(job_id: str, prompt: Sequence[int], **changes: Any) -> AddJob:
    """A job with greedy decoding. Keyword arguments that are not fields of the frame are sampling parameters."""
    fields = {name: changes.pop(name) for name in list(changes) if name in AddJob.__struct_fields__}
    params = {"temperature": 0.0, "top_p": 1.0, "top_k": 0} | changes
    n = num_sequences(params)
    defaults: dict[str, Any] = {
        "attempt": 1,
        "max_tokens": 16,
        "seed": 0,
        "priority": 0,
        "cache_salt": "",
        "committed_token_ids": [[] for _ in range(n)],
        "num_emitted_chars": [0] * n,
        "finished_indexes": [],
    }
    return AddJob(job_id=job_id, prompt_token_ids=list(prompt), params=params, **defaults | fields)


@dataclass(slots=True)
class Finished:
    """The complete output of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[dict[str, object]] = field(default_factory=list)
    num_cached_tokens: int = 0
    sum_logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[dict[str, object] | None] | None = None


@dataclass(slots=True)
class Collected:
    sequences: dict[tuple[str, int], Finished] = field(default_factory=dict)
    failures: dict[str, JobFailed] = field(default_factory=dict)

    def take(self, done: StepDone) -> None:
        for output in done.outputs:
            finished = self.sequences.setdefault((output.job_id, output.index), Finished())
            assert finished.finish_reason is None, "an output after the final one"
            finished.token_ids += output.token_ids
            finished.text += output.text
            finished.finish_reason = output.finish_reason
            finished.logprobs += output.logprobs or []
            finished.num_cached_tokens = output.num_cached_tokens
            if output.sum_logprobs is not None:
                finished.sum_logprobs.append(output.sum_logprobs)
            if output.prompt_logprobs is not None:
                assert self.prompt_logprobs(output.job_id) is None, "told twice"
                finished.prompt_logprobs = output.prompt_logprobs
        self.failures |= {failure.job_id: failure for failure in done.failures}

    def tokens(self, job_id: str, index: int = 0) -> list[int]:
        return self.sequences[job_id, index].token_ids

    def prompt_logprobs(self, job_id: str) -> list[dict[str, object] | None] | None:
        """The job's prompt logprobs, whichever of its sequences reported them."""
        told = (finished.prompt_logprobs for (id_, _), finished in self.sequences.items() if id_ == job_id)
        return next((logprobs for logprobs in told if logprobs is not None), None)


def gumbel_noise(token_ids: Tensor, sequences: Sequence[EngineSequence]) -> Tensor:
    """The noise of the next draw, one row per sequence; `token_ids` is int32 (num_sequences or 1, num_tokens)."""
    keys = [noise_key(s.job.seed, s.index, s.num_output_tokens) for s in sequences]
    return keyed_noise(token_ids, torch.tensor(keys, dtype=torch.int32))


def step(engine: Engine) -> StepDone:
    return engine.step(lambda members: None)


def run(engine: Engine, commands: Iterable[AddJob]) -> Collected:
    """Add all jobs at once and step until the engine has nothing left to do."""
    for command in commands:
        engine.add(command)
    collected = Collected()
    while engine.has_work:
        collected.take(step(engine))
    return collected


def run_alone(engine: Engine, command: AddJob) -> Finished:
    """The first sequence of a job that ran alone."""
    return run(engine, [command]).sequences[command.job_id, 0]
