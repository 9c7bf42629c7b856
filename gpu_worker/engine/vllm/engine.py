"""vLLM's engine, in this process: one request for each sequence, and what it answers in our terms.

Requests carry token ids and no text, and vLLM ends them only at their greatest length; everything else that may end a
sequence is found by the back end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from vllm import EngineArgs
from vllm import SamplingParams as VllmParams
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from domain.catalog import ModelSpec
from gpu_worker.engine.backends import RecordStep, StepMember
from gpu_worker.engine.host_memory import available_bytes
from gpu_worker.engine.runner import process_memory_bytes
from gpu_worker.engine.sampling import Drawn
from gpu_worker.engine.sequence import EngineJob, Sequence
from gpu_worker.engine.vllm import loader
from gpu_worker.engine.vllm.arguments import engine_arguments
from gpu_worker.engine.vllm.lora import load_adapters
from gpu_worker.engine.vllm.processor import PLAN
from gpu_worker.engine.vllm.rows import drawn_of, plan_of
from text.model_files import model_folder, read_json_file

CPU_CACHE_SHARE = 0.25  # of the available memory, since there may be other workers


@dataclass(frozen=True, slots=True)
class VllmAnswer:
    """What a step has brought for one sequence."""

    sequence: Sequence
    drawn: list[Drawn]
    prompt_scores: list[Drawn]  # for the request's prompt from its second token on, if it asked
    num_cached_tokens: int
    has_ended: bool  # by vLLM, at its greatest length


class VllmEngine:
    def __init__(self, spec: ModelSpec) -> None:
        """Raises ValueError, which says what to change."""
        self.device: str = current_platform.device_type
        if spec.device not in ("auto", self.device):
            raise ValueError(
                f"device is {spec.device}, but the vLLM installed here runs on {self.device}; set device to auto"
            )
        loader.register()
        known = {field.name for field in fields(EngineArgs)}
        is_quantised = "quantization_config" in read_json_file(model_folder(spec) / "config.json")
        given = engine_arguments(spec, known, is_cpu=self.device == "cpu", is_quantised=is_quantised)
        arguments = EngineArgs(**given)
        config = arguments.create_engine_config()
        _size_cache(spec, config, is_cpu=self.device == "cpu")
        self._engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        self._adapters = load_adapters(spec, self._engine)
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._sequences: dict[str, Sequence] = {}  # by the id of their request
        self._names: dict[Sequence, str] = {}
        self._num_added = 0
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.num_cache_tokens: int = (config.cache_config.num_gpu_blocks or 0) * config.cache_config.block_size
        if not config.model_config.enforce_eager:
            self._warm_up(spec)

    def _warm_up(self, spec: ModelSpec) -> None:
        """vLLM compiles parts of its sampler when they are first used, which takes longer than a step may: here they
        are, by one row and by several."""
        params = VllmParams(temperature=0.0, max_tokens=2, logprobs=1, prompt_logprobs=1, detokenize=False)
        for num_rows in {1, min(2, spec.max_num_seqs)}:
            for row in range(num_rows):
                self._engine.add_request(f"warm-up {row}", tokens_input([0, row]), params)
            while self._engine.has_unfinished_requests():
                self._engine.step()

    def add(self, sequence: Sequence) -> None:
        """Its tokens so far, those that were committed included, are the request's prompt."""
        job = sequence.job
        self._num_added += 1
        name = str(self._num_added)
        self._engine.add_request(
            name,
            tokens_input(list(sequence.token_ids), cache_salt=job.cache_salt or None),
            _params_of(sequence),
            arrival_time=float(self._num_added),  # among equal priorities, the lower one runs first
            lora_request=None if job.adapter is None else self._adapters[job.adapter],
            priority=-job.priority,
        )
        self._names[sequence] = name
        self._sequences[name] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take it out before the next step. One that is not here is ignored."""
        name = self._names.pop(sequence, None)
        if name is not None:
            del self._sequences[name]
            self._engine.abort_request([name])

    def step(self, record: RecordStep) -> list[VllmAnswer]:
        """Everything that escapes from vLLM means that its state is lost, and must end the process."""
        if not self._sequences:
            return []
        self._scheduler.on_schedule = lambda is_prompt_by_id: record(self._members(is_prompt_by_id))
        outputs = self._engine.step()
        return [self._answer(output) for output in outputs if output.request_id in self._sequences]

    @property
    def adapters(self) -> frozenset[str]:
        """Their names."""
        return frozenset(self._adapters)

    @property
    def num_running(self) -> int:
        return int(self._scheduler.get_request_counts()[0])

    @property
    def num_waiting(self) -> int:
        return int(self._scheduler.get_request_counts()[1])

    @property
    def num_preemptions(self) -> int:
        return int(self._scheduler.num_preempted)

    @property
    def cache_usage(self) -> float:
        return float(self._scheduler.get_kv_cache_usage())

    def memory_bytes(self) -> int:
        """Of the GPU if there is one, else of this process."""
        return process_memory_bytes() if self.device == "cpu" else int(torch.cuda.memory_allocated())

    def _members(self, is_prompt_by_id: Mapping[str, bool]) -> list[StepMember]:
        """One member per job; a job of which any sequence reads its prompt counts as prefill."""
        is_prompt_by_job: dict[EngineJob, bool] = {}
        for request_id, is_prompt in is_prompt_by_id.items():
            sequence = self._sequences.get(request_id.partition("-")[0])  # vLLM appends random characters
            if sequence is not None:
                is_prompt_by_job[sequence.job] = is_prompt or is_prompt_by_job.get(sequence.job, False)
        return [
            StepMember(job.id, job.attempt, "prefill" if is_prompt else "decode")
            for job, is_prompt in is_prompt_by_job.items()
        ]

    def _answer(self, output: Any) -> VllmAnswer:
        sequence = self._sequences[output.request_id]
        params = sequence.job.params
        (completion,) = output.outputs
        logprobs = completion.logprobs or [{}] * len(completion.token_ids)
        scores = output.prompt_logprobs or [None]
        token_ids = sequence.token_ids[1:]
        return VllmAnswer(
            sequence=sequence,
            drawn=[
                drawn_of(token_id, by_id, params.logprobs or 0)
                for token_id, by_id in zip(completion.token_ids, logprobs, strict=True)
            ],
            prompt_scores=[
                drawn_of(token_id, by_id, params.prompt_logprobs or 0)
                for token_id, by_id in zip(token_ids, scores[1:], strict=False)
            ],
            num_cached_tokens=output.num_cached_tokens or 0,
            has_ended=output.finished,
        )


def _size_cache(spec: ModelSpec, config: Any, *, is_cpu: bool) -> None:
    """`kv_cache_tokens` counts, if it is set. Otherwise vLLM takes a share of a GPU's memory. On a CPU it would take
    nearly all memory: there the cache gets what all sequences could use, up to a share of what is available."""
    cache, model = config.cache_config, config.model_config
    if spec.kv_cache_tokens is not None:
        cache.num_gpu_blocks_override = -(-spec.kv_cache_tokens // cache.block_size) + 1  # one is never used
    if not is_cpu or cache.kv_cache_memory_bytes is not None:
        return
    num_heads, num_layers = model.get_num_kv_heads(config.parallel_config), model.get_num_layers(config.parallel_config)
    bytes_per_token = 2 * num_layers * num_heads * model.get_head_size() * model.dtype.itemsize
    num_tokens = spec.kv_cache_tokens or spec.max_num_seqs * (spec.max_model_len + cache.block_size)
    cache.kv_cache_memory_bytes = min(num_tokens * bytes_per_token, int(available_bytes() * CPU_CACHE_SHARE))


def _params_of(sequence: Sequence) -> VllmParams:
    """Greedy, as the logits processor draws: see processor.py."""
    job, params = sequence.job, sequence.job.params
    asks_logprobs = params.logprobs is not None or params.best_of is not None
    num_left = min(job.max_tokens - sequence.num_output_tokens, job.max_model_len - len(sequence.token_ids))
    return VllmParams(
        temperature=0.0,
        max_tokens=max(1, num_left),  # to score a prompt, one token is drawn, and not used
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        logprobs=(params.logprobs or 0) if asks_logprobs else None,
        prompt_logprobs=params.prompt_logprobs if sequence.is_scoring else None,
        extra_args={PLAN: plan_of(sequence)},
    )
