"""A back end without a model, for tests: deterministic text, real batching, and an option for every kind of failure.

The text of a sequence depends only on (adapter, prompt, seed, index, position). A resumed job therefore continues
exactly where it stopped, and a test can compute the expected text with `fake_text`. Fake engines can count, across all
processes, the tokens that they draw in each attempt; the counts survive any kind of crash.
"""

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from domain.catalog import ModelSpec
from domain.errors import ContextLengthExceeded, EngineError, ModelNotFound, OutOfMemory, UnsupportedParameter
from domain.jobs import FinishReason
from domain.requests import SamplingParams, TokenLogprob
from gpu_worker.engine import load_progress
from gpu_worker.engine.backends import LoadedModel, RecordStep, StepMember
from gpu_worker.engine.embedding_queue import EmbeddingQueue, encode_score, encode_vector
from gpu_worker.engine.fake_tokens import (
    END_TOKEN_ID,
    DrawnTokens,
    chained_token,
    draw_token,
    fake_vector,
    hash_of,
    next_allowed,
    next_link,
    word_of,
)
from gpu_worker.engine_process.frames import AddJob, EmbedJob, EngineStats, JobFailed, SequenceOutput, StepDone

FILLED_AT_ONCE = 1 << 24
MAX_FILLED_BYTES = 1 << 30


class FakeKnobs(BaseModel):
    """The options in `ModelSpec.fake`. If a `..._seed` is given, the failure affects only jobs with that seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    load_seconds: float = 0.0
    memory_bytes: int = Field(default=0, ge=0)  # what it claims to need, for workers with several models
    step_seconds: float = 0.01
    tokens_per_step: int = Field(default=1, ge=1)  # per sequence
    end_chance: float = Field(default=0.0, ge=0, le=1)  # probability of the end token at every position
    hold_back_chars: int = Field(default=0, ge=0)  # text lags this far behind the tokens, as if for a stop string
    keeps_prefixes: bool = True  # what it says of itself; without, its jobs are never paused
    chained: bool = False  # each attempt draws different tokens, which check all those before them: see chained_token
    fail_at_token: int | None = None  # the engine reports the job as failed
    fail_seed: int | None = None
    crash_at_token: int | None = None  # the process dies
    crash_seed: int | None = None
    crash_how: Literal["segv", "exit", "kill", "raise", "memory"] = "segv"
    hang_at_token: int | None = None  # the step never ends
    hang_seed: int | None = None
    oom_above_n: int | None = None  # how many sequences fit; more are preempted, and a job that needs more fails
    count_folder: str | None = None  # where drawn tokens are counted, including those that are never committed


@dataclass(slots=True)
class FakeSequence:
    """One text being decoded."""

    index: int
    hash: "hashlib.blake2b"
    token_ids: list[int]
    text: str
    num_emitted_chars: int
    finish_reason: FinishReason | None = None
    stop_string: str | None = None  # the one that ended it
    link: int = 0  # checksum of the chained tokens so far


@dataclass(slots=True)
class FakeJob:
    """A job in the batch, with those of its sequences that have not ended."""

    command: AddJob
    params: SamplingParams
    arrival: int
    sequences: list[FakeSequence]
    is_scored: bool
    has_prefilled: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.command.job_id, self.command.attempt

    @property
    def num_tokens(self) -> int:
        return max((len(sequence.token_ids) for sequence in self.sequences), default=0)


class FakeBackend:
    """Admits jobs by priority, then arrival. In each step, every running sequence gains `tokens_per_step` tokens."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._knobs = FakeKnobs.model_validate(spec.fake)
        self._load()
        self._waiting: list[FakeJob] = []
        self._running: list[FakeJob] = []
        self._final_outputs: list[SequenceOutput] = []  # final outputs of aborted jobs, due with the next step
        self._room = spec.max_num_seqs  # sequences that may run; fewer once memory has run out
        self._num_added = self._num_steps = self._num_preemptions = 0
        self._num_generation_tokens = self._num_prompt_tokens = 0
        self._drawn = DrawnTokens(Path(self._knobs.count_folder)) if self._knobs.count_folder else None
        self._step_seconds = 0.0
        self._embeddings = EmbeddingQueue(
            self._fake_vectors,
            vocab_size=END_TOKEN_ID + 1,
            max_input_tokens=spec.max_model_len,
            max_step_tokens=spec.max_num_batched_tokens,
            encode=encode_score if spec.task == "scoring" else encode_vector,
        )

    def _load(self) -> None:
        for percent in range(0, 100, 10):
            load_progress.report(percent / 100)
            time.sleep(self._knobs.load_seconds / 10)

    @property
    def loaded(self) -> LoadedModel:
        return LoadedModel("none", self._spec.max_model_len * self._spec.max_num_seqs, self._knobs.keeps_prefixes)

    def add(self, command: AddJob) -> None:
        params = SamplingParams.model_validate(command.params)
        if params.structured_output is not None:
            raise UnsupportedParameter(
                "the fake engine does not support structured output", param="params.structured_output"
            )
        if command.adapter is not None and command.adapter not in self._spec.adapters:
            raise ModelNotFound(f"the fake engine has no adapter {command.adapter!r}", param="model")
        num_prompt_tokens = len(command.prompt_token_ids)
        if num_prompt_tokens + min(1, command.max_tokens) > self._spec.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt_tokens} tokens, but {self._spec.id} accepts {self._spec.max_model_len}"
            )
        if self._knobs.oom_above_n is not None and params.num_sequences > self._knobs.oom_above_n:
            raise OutOfMemory(f"{params.num_sequences} sequences do not fit into room for {self._knobs.oom_above_n}")
        self._num_added += 1
        self._waiting.append(
            FakeJob(
                command,
                params,
                self._num_added,
                [
                    _resumed_sequence(command, index)
                    for index in range(params.num_sequences)
                    if index not in command.finished_indexes
                ],
                is_scored=params.prompt_logprobs is None or command.has_prompt_logprobs,
            )
        )
        self._waiting.sort(key=lambda job: (-job.command.priority, job.arrival))

    def embed(self, command: EmbedJob) -> None:
        self._embeddings.add(command)

    def _fake_vectors(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        time.sleep(self._knobs.step_seconds)
        width = 1 if self._spec.task == "scoring" else None
        return np.array([fake_vector(token_ids)[:width] for token_ids in inputs], dtype=np.float32)

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        self._embeddings.abort(job_id, attempt, reason)
        for jobs in (self._waiting, self._running):
            for job in [job for job in jobs if job.key == (job_id, attempt)]:
                jobs.remove(job)
                if reason:
                    self._final_outputs += [
                        self._final(job, sequence, FinishReason(reason)) for sequence in job.sequences
                    ]

    @property
    def has_work(self) -> bool:
        return self._has_texts or self._embeddings.has_work

    @property
    def _has_texts(self) -> bool:
        return bool(self._waiting or self._running or self._final_outputs)

    def step(self, record: RecordStep) -> StepDone:
        if not self._embeddings.has_work:
            return self._generate(record)
        return self._embeddings.step(record, self._generate if self._has_texts else None, self.stats)

    def _generate(self, record: RecordStep) -> StepDone:
        started_at = time.perf_counter()
        self._admit()
        record([StepMember(*job.key, phase="decode" if job.has_prefilled else "prefill") for job in self._running])
        outputs, self._final_outputs = self._final_outputs, []
        failures: list[JobFailed] = []
        if self._running:
            time.sleep(self._knobs.step_seconds)
        for job in list(self._running):
            self._suffer_mishaps(job)
            if self._is_due(job, self._knobs.fail_at_token, self._knobs.fail_seed):
                self._running.remove(job)
                failures.append(JobFailed(*job.key, EngineError.code, "the fake engine was told to fail this job"))
                continue
            outputs += self._advance(job)
            if not job.sequences:
                self._running.remove(job)
        self._num_steps += 1
        self._step_seconds = time.perf_counter() - started_at
        return StepDone(outputs=outputs, failures=failures, stats=self.stats())

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self._num_steps,
            num_running=sum(len(job.sequences) for job in self._running),
            num_waiting=sum(len(job.sequences) for job in self._waiting),
            num_preemptions=self._num_preemptions,
            num_generation_tokens=self._num_generation_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            cache_usage=min(1.0, sum(len(job.sequences) for job in self._running) / self._spec.max_num_seqs),
            step_seconds=self._step_seconds,
            memory_bytes=self._knobs.memory_bytes,
        )

    def _admit(self) -> None:
        num_running = sum(len(job.sequences) for job in self._running)
        while self._waiting and (num_running + len(self._waiting[0].sequences) <= self._room or not self._running):
            job = self._waiting.pop(0)
            num_running += len(job.sequences)
            self._running.append(job)
        limit = self._knobs.oom_above_n
        while limit is not None and num_running > limit:
            self._room = limit
            youngest = max(self._running, key=lambda job: job.arrival)
            self._running.remove(youngest)
            self._waiting.insert(0, youngest)
            num_running -= len(youngest.sequences)
            self._num_preemptions += 1

    def _advance(self, job: FakeJob) -> list[SequenceOutput]:
        if not job.has_prefilled:
            job.has_prefilled = True
            self._num_prompt_tokens += len(job.command.prompt_token_ids)
        outputs = [self._decode(job, sequence) for sequence in job.sequences]
        job.sequences = [sequence for sequence in job.sequences if sequence.finish_reason is None]
        return outputs

    def _decode(self, job: FakeJob, sequence: FakeSequence) -> SequenceOutput:
        """Draw the step's tokens of one sequence and return its output."""
        command, params = job.command, job.params
        num_before = len(sequence.token_ids)
        limit = min(command.max_tokens, self._spec.max_model_len - len(command.prompt_token_ids))
        for _ in range(self._knobs.tokens_per_step):
            position = len(sequence.token_ids)
            if position >= limit:
                sequence.finish_reason = FinishReason.LENGTH
            if sequence.finish_reason is not None:
                break
            can_stop = position >= params.min_tokens
            end_chance = self._knobs.end_chance if can_stop and not params.ignore_eos else 0.0
            token_id = draw_token(sequence.hash, position, end_chance)
            token_id = next_allowed(token_id, params)
            if self._knobs.chained and token_id != END_TOKEN_ID:
                token_id = chained_token(command.attempt, sequence.link)
                sequence.link = next_link(sequence.link, token_id)
            sequence.token_ids.append(token_id)
            if token_id == END_TOKEN_ID or (can_stop and token_id in params.stop_token_ids):
                sequence.finish_reason = FinishReason.STOP
                sequence.text += word_of(token_id) if params.include_stop_str_in_output else ""
            else:
                _append_text(sequence, word_of(token_id), params)
            if sequence.finish_reason is None and len(sequence.token_ids) >= limit:
                sequence.finish_reason = FinishReason.LENGTH
        self._num_generation_tokens += len(sequence.token_ids) - num_before
        if self._drawn is not None:
            self._drawn.add(*job.key, len(sequence.token_ids) - num_before)
        return self._output(job, sequence, sequence.token_ids[num_before:], self._scores(job))

    def _scores(self, job: FakeJob) -> list[dict[str, object] | None] | None:
        """The prompt's logprobs, if they are due: with the job's first output."""
        if job.is_scored:
            return None
        job.is_scored = True
        return [None, *map(_logprob, job.command.prompt_token_ids[1:])]

    def _final(self, job: FakeJob, sequence: FakeSequence, reason: FinishReason) -> SequenceOutput:
        sequence.finish_reason = reason
        return self._output(job, sequence, [])

    def _output(
        self,
        job: FakeJob,
        sequence: FakeSequence,
        token_ids: list[int],
        prompt_logprobs: list[dict[str, object] | None] | None = None,
    ) -> SequenceOutput:
        end = len(sequence.text) if sequence.finish_reason else self._stable_length(sequence.text, job.params.stop)
        text = sequence.text[sequence.num_emitted_chars : end]
        sequence.num_emitted_chars = max(end, sequence.num_emitted_chars)
        return SequenceOutput(
            job_id=job.command.job_id,
            attempt=job.command.attempt,
            index=sequence.index,
            token_ids=token_ids,
            text=text,
            finish_reason=sequence.finish_reason,
            logprobs=None if job.params.logprobs is None else [_logprob(token_id) for token_id in token_ids],
            sum_logprobs=None if job.params.best_of is None else _sum_logprobs(token_ids),
            prompt_logprobs=prompt_logprobs,
            stop_string=sequence.stop_string,
        )

    def _stable_length(self, text: str, stop: tuple[str, ...]) -> int:
        """How many characters of `text` are final, whatever stop string may follow."""
        held_back = self._knobs.hold_back_chars
        for stop_string in stop:
            for length in range(min(len(stop_string) - 1, len(text)), held_back, -1):
                if text.endswith(stop_string[:length]):
                    held_back = length
                    break
        return max(0, len(text) - held_back)

    def _suffer_mishaps(self, job: FakeJob) -> None:
        if self._is_due(job, self._knobs.hang_at_token, self._knobs.hang_seed):
            while True:
                time.sleep(3600)
        if not self._is_due(job, self._knobs.crash_at_token, self._knobs.crash_seed):
            return
        match self._knobs.crash_how:
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(137)
            case "memory":
                fill_memory()
                raise RuntimeError(f"{MAX_FILLED_BYTES} bytes were there for the fake engine")
            case "raise":
                raise RuntimeError("the fake engine was told to crash")

    def _is_due(self, job: FakeJob, at_token: int | None, seed: int | None) -> bool:
        if at_token is None and seed is None:
            return False
        return job.num_tokens >= (at_token or 0) and seed in (None, job.command.seed)


def fill_memory() -> None:
    """As a pass does that takes more than its container has: the kernel is to end this process before it returns."""
    pages = [b"\1" * FILLED_AT_ONCE for _ in range(MAX_FILLED_BYTES // FILLED_AT_ONCE)]
    pages.clear()


def _resumed_sequence(command: AddJob, index: int) -> FakeSequence:
    token_ids = list(command.committed_token_ids[index])
    text = "".join(map(word_of, token_ids))
    sequence_hash = hash_of(command.prompt_token_ids, command.seed, index, command.adapter)
    link = reduce(next_link, token_ids, 0)
    return FakeSequence(index, sequence_hash, token_ids, text, command.num_emitted_chars[index], link=link)


def _append_text(sequence: FakeSequence, word: str, params: SamplingParams) -> None:
    """Add the text of one token. A stop string ends the sequence; it is cut off, unless it was asked for, together with
    everything after it."""
    search_from = max(0, len(sequence.text) - max(map(len, params.stop), default=0))
    sequence.text += word
    found = [(start, string) for string in params.stop if (start := sequence.text.find(string, search_from)) >= 0]
    if found:
        start, sequence.stop_string = min(found)
        kept = sequence.stop_string if params.include_stop_str_in_output else ""
        sequence.text = sequence.text[:start] + kept
        sequence.finish_reason = FinishReason.STOP


def _sum_logprobs(token_ids: list[int]) -> float | None:
    """The sum of each token's id / number of ids - 1, so that candidates get different values."""
    return sum(token_id / END_TOKEN_ID - 1.0 for token_id in token_ids) if token_ids else None


def _logprob(token_id: int) -> dict[str, object]:
    text = word_of(token_id)
    return TokenLogprob(token=text, token_id=token_id, logprob=-1.0, top=((token_id, text, -1.0),)).model_dump()
