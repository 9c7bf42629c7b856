"""The back end that runs models by vLLM, in process, with our detokenizer and our draws; see docs/engines.md.

vLLM schedules, computes and caches. The sequences are ours: each becomes one vLLM request, whose tokens our logits
processor draws, and ends when our detokenizer, grammar or limits say so (docs/adr/0038).
"""

import logging
import time

from domain.catalog import ModelSpec
from domain.errors import ContextLengthExceeded, EngineError, UnsupportedParameter
from domain.jobs import FinishReason
from gpu_worker.engine.backends import LoadedModel, RecordStep
from gpu_worker.engine.engine import STEPS_PER_MEMORY_READING
from gpu_worker.engine.families import read_end_token_ids, read_tokenizer
from gpu_worker.engine.reports import StepResult
from gpu_worker.engine.sampling import GrammarFailed, describe
from gpu_worker.engine.scheduler import ModelLimits, make_engine_job
from gpu_worker.engine.sequence import EngineJob, Grammars, Sequence
from gpu_worker.engine.vllm.engine import VllmAnswer, VllmEngine
from gpu_worker.engine.vllm.rows import refuse_wrong_end
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, JobFailed, StepDone
from text.model_files import model_folder
from text.tokenizers import token_table_of

log = logging.getLogger(__name__)


class VllmBackend:
    def __init__(self, spec: ModelSpec) -> None:
        folder = model_folder(spec)
        tokenizer = read_tokenizer(folder)
        self._engine = VllmEngine(spec)
        self._tokenizer = tokenizer
        self._tokens = token_table_of(tokenizer)
        end_token_ids = read_end_token_ids(folder, tokenizer)
        self._limits = ModelLimits(self._engine.vocab_size, spec.max_model_len, end_token_ids, self._engine.adapters)
        self._grammars = Grammars(tokenizer, self._limits.vocab_size, end_token_ids)
        self._jobs: dict[tuple[str, int], EngineJob] = {}
        self._ended: list[Sequence] = []  # ended since the last step: aborted, or complete when they were added
        self._num_jobs = self._num_steps = self._num_generation_tokens = self._num_prompt_tokens = 0
        self._num_prefix_cache_queries = self._num_prefix_cache_hits = 0
        self._step_seconds = 0.0
        self._memory_bytes = self._engine.memory_bytes()

    @property
    def loaded(self) -> LoadedModel:
        return LoadedModel(self._engine.device, self._engine.num_cache_tokens, keeps_prefixes=True)

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._ended)

    def add(self, command: AddJob) -> None:
        job = make_engine_job(command, self._limits, self._tokenizer, self._grammars, arrival=self._num_jobs)
        if not command.max_tokens and len(command.prompt_token_ids) >= self._limits.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {len(command.prompt_token_ids)} tokens, as many as the model accepts, but vLLM only "
                "scores a prompt that leaves room for one more token; shorten it",
                param="prompt",
            )
        self._num_jobs += 1
        running = [sequence for sequence in job.sequences if not sequence.is_finished]
        # Scores come before any token of their job: its other sequences wait for them.
        first = running[:1] if running and running[0].is_scoring else running
        try:
            for sequence in first:
                self._engine.add(sequence)
        except Exception:
            self._leave(job)
            raise
        self._ended += [sequence for sequence in job.sequences if sequence.is_finished]
        if running:
            self._jobs[job.id, job.attempt] = job

    def embed(self, command: EmbedJob) -> None:
        raise UnsupportedParameter("backend vllm does not support embeddings", param="model")

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        job = self._jobs.pop((job_id, attempt), None)
        if job is None:
            return
        self._leave(job)
        for sequence in job.sequences:
            if not sequence.is_finished:
                sequence.finish(FinishReason(reason) if reason else FinishReason.CANCELLED)
                self._ended.append(sequence)
        if not reason:
            self._ended = [sequence for sequence in self._ended if sequence.job is not job]

    def step(self, record: RecordStep) -> StepDone:
        started = time.perf_counter()
        result = StepResult({sequence: [] for sequence in self._ended})
        self._ended = []
        for answer in self._engine.step(record):
            try:
                self._take(answer, result)
            except GrammarFailed as exc:
                self._fail(answer.sequence.job, exc, result)
        self._num_steps += 1
        if self._num_steps % STEPS_PER_MEMORY_READING == 0:
            self._memory_bytes = self._engine.memory_bytes()
        self._step_seconds = time.perf_counter() - started
        return StepDone(outputs=result.outputs(), failures=result.failures, stats=self.stats())

    def stats(self) -> EngineStats:
        engine = self._engine
        return EngineStats(
            num_steps=self._num_steps,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_preemptions=engine.num_preemptions,
            num_generation_tokens=self._num_generation_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_prefix_cache_queries=self._num_prefix_cache_queries,
            num_prefix_cache_hits=self._num_prefix_cache_hits,
            cache_usage=engine.cache_usage,
            step_seconds=self._step_seconds,
            memory_bytes=self._memory_bytes,
        )

    def _take(self, answer: VllmAnswer, result: StepResult) -> None:
        """Append the tokens of one sequence, up to the one that ends it."""
        sequence = answer.sequence
        job = sequence.job
        if self._jobs.get((job.id, job.attempt)) is not job:
            return  # it failed in this step because of a sibling
        if sequence.num_cached_tokens is None:
            self._count_prompt(sequence, answer.num_cached_tokens)
        if sequence.is_scoring and answer.prompt_scores:
            self._tell_scores(answer, result)
        for drawn in answer.drawn:
            if sequence.is_finished:
                break
            assert drawn.token_id is not None
            refuse_wrong_end(sequence, drawn.token_id, self._limits.eos_token_ids)
            result.take(sequence, drawn, self._tokens)
            self._num_generation_tokens += 1
            if sequence.grammar is not None and sequence.grammar.matcher.is_error():
                raise GrammarFailed(job, "its structured output cannot be continued; simplify the schema")
        if answer.has_ended and not sequence.is_finished:
            raise RuntimeError("vLLM ended a request before its greatest length")
        if sequence.is_finished:
            self._engine.remove(sequence)
            if all(other.is_finished for other in job.sequences):
                del self._jobs[job.id, job.attempt]

    def _count_prompt(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """At the first output of a request. What is not computed for a prompt's scores is not a miss."""
        sequence.num_cached_tokens = num_cached_tokens
        self._num_prompt_tokens += max(0, sequence.num_prompt_tokens - num_cached_tokens)
        if not sequence.is_scoring:
            self._num_prefix_cache_queries += len(sequence.token_ids)
        self._num_prefix_cache_hits += num_cached_tokens

    def _tell_scores(self, answer: VllmAnswer, result: StepResult) -> None:
        sequence, job = answer.sequence, answer.sequence.job
        job.is_scored = True
        result.token_ids.setdefault(sequence, [])
        scores = answer.prompt_scores[: sequence.num_prompt_tokens - 1]
        told = [describe(self._tokens, sequence, place, score) for place, score in enumerate(scores, start=1)]
        result.prompt_logprobs[sequence] = [None, *told]
        if not job.max_tokens:
            sequence.finish(FinishReason.LENGTH)
        for sibling in job.sequences:
            if sibling is not sequence and not sibling.is_finished:
                self._engine.add(sibling)

    def _fail(self, job: EngineJob, exc: GrammarFailed, result: StepResult) -> None:
        log.error("job failed in a step", exc_info=exc, extra={"job_id": job.id, "attempt": job.attempt})
        del self._jobs[job.id, job.attempt]
        self._leave(job)
        for sequence in job.sequences:
            result.forget(sequence)
        message = f"the model could not run this job: {exc.message}"
        result.failures.append(JobFailed(job_id=job.id, attempt=job.attempt, code=EngineError.code, message=message))

    def _leave(self, job: EngineJob) -> None:
        for sequence in job.sequences:
            self._engine.remove(sequence)
