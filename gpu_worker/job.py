"""A claimed job while it runs here: its position in the stream, and the output since its last chunk. No I/O.

An embedding job has no stream, just a result at its end.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from time import monotonic
from uuid import UUID

from domain.errors import CeleriacError, DeadlineExceeded, RunTimeoutExceeded
from domain.jobs import FinishReason, JobError, JobStatus, Usage, external_id
from domain.requests import (
    EmbeddingResult,
    GenerationRequest,
    GenerationResult,
    JobOutput,
    ResultChoice,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    best_choices,
    encode_vector,
)
from gpu_worker.engine_process.frames import AddJob, EmbeddingOutput, EmbedJob, JobFailed, SequenceOutput
from storage.jobs import ClaimedJob, Finalisation

#: The final status of an aborted job, by the finish reason of its sequences.
STATUS_BY_REASON = {FinishReason.DEADLINE: JobStatus.EXPIRED, FinishReason.CANCELLED: JobStatus.CANCELLED}


@dataclass(slots=True)
class SequenceProgress:
    """One of the job's texts: totals over its chunks, and the output that is not in a chunk yet."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    sum_logprobs: float = 0.0  # sum over token_ids; used by best_of
    finish_reason: FinishReason | None = None
    heard_at: float | None = None  # monotonic time at which this attempt's last tokens arrived
    num_reasoning_tokens: int | None = None  # output tokens up to the first </think>
    stop_string: str | None = None  # the one that ended it
    pending_text: list[str] = field(default_factory=list)
    pending_token_ids: list[int] = field(default_factory=list)
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)
    pending_sum_logprobs: float | None = None
    pending_num_reasoning_tokens: int | None = None
    is_end_pending: bool = False  # whether the finish reason is not in a chunk yet

    @property
    def has_pending(self) -> bool:
        return bool(self.pending_text or self.pending_token_ids or self.is_end_pending)

    def take_chunk(self, sequence_number: int, index: int) -> TokenChunk:
        """Remove everything that is pending and return it as the next chunk."""
        chunk = TokenChunk(
            sequence_number=sequence_number,
            index=index,
            text="".join(self.pending_text),
            token_ids=tuple(self.pending_token_ids),
            finish_reason=self.finish_reason if self.is_end_pending else None,
            logprobs=tuple(self.pending_logprobs) or None,
            sum_logprobs=self.pending_sum_logprobs,
            num_reasoning_tokens=self.pending_num_reasoning_tokens,
            stop_string=self.stop_string if self.is_end_pending else None,
        )
        self.append(chunk)
        self.pending_text, self.pending_token_ids, self.pending_logprobs = [], [], []
        self.pending_sum_logprobs = self.pending_num_reasoning_tokens = None
        self.is_end_pending = False
        return chunk

    def append(self, chunk: TokenChunk) -> None:
        self.text.append(chunk.text)
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or ()
        self.sum_logprobs += chunk.sum_logprobs or 0.0
        self.finish_reason = chunk.finish_reason
        self.stop_string = chunk.stop_string
        if chunk.num_reasoning_tokens is not None:
            self.num_reasoning_tokens = chunk.num_reasoning_tokens


class RunningJob:
    """One attempt at a job. Used only by the runner's thread."""

    def __init__(self, claimed: ClaimedJob, *, claimed_at: float) -> None:
        """`claimed_at` is the monotonic time just before the claim was sent: the lease began no earlier."""
        self.id = claimed.id
        self.attempt = claimed.attempt
        self.name = external_id(claimed.id)  # its id in the engine and in logs
        self.claimed = claimed
        self.started_at = monotonic()
        self.leased_at = claimed_at
        self.has_spoken = False  # whether this attempt has had a chunk
        self.is_in_engine = False
        self.has_run_out = False  # whether the deadline that it passed is the end of its run timeout
        self.first_output_at: float | None = None  # the monotonic time of this attempt's first output
        self.is_pausing = False  # whether the engine has been told to pause it
        self.is_ending = False  # whether its finalisation is in progress, so that nothing else may be done with it
        self.abort_reason: FinishReason | None = None
        self.engine_seconds = 0.0  # its share of the engine's time in this attempt
        request = claimed.request
        self.params = request.params if isinstance(request, GenerationRequest) else SamplingParams()
        self.sequences = [SequenceProgress() for _ in range(self.params.num_sequences)]
        self.last_sequence_number = 0
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._is_prompt_pending = False  # whether the prompt's logprobs are not in a chunk yet
        self._error: JobError | None = None
        self.num_cached_tokens = 0  # of its prompt and committed tokens, those that this attempt did not compute
        for chunk in claimed.committed_chunks:
            self.last_sequence_number = chunk.sequence_number
            if chunk.is_reset:
                continue
            self.sequences[chunk.index].append(chunk)
            self._prompt_logprobs = self._prompt_logprobs or chunk.prompt_logprobs
        self._num_inherited_tokens = self.num_completion_tokens

    @property
    def num_new_tokens(self) -> int:
        """The number of tokens that this attempt has generated."""
        return self.num_completion_tokens + self._num_pending_tokens - self._num_inherited_tokens

    @property
    def _num_pending_tokens(self) -> int:
        return sum(len(sequence.pending_token_ids) for sequence in self.sequences)

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    def num_recomputed_tokens(self, output: SequenceOutput) -> int:
        """The tokens of its prompt and of earlier attempts that a sequence had to compute again. They count with its
        first output; 0 for any other, and for a sequence that has just begun."""
        sequence = self.sequences[output.index]
        if sequence.heard_at is not None or not sequence.token_ids or not output.token_ids:
            return 0
        return max(0, len(self.claimed.prompt_token_ids) + len(sequence.token_ids) - output.num_cached_tokens)

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def is_over(self) -> bool:
        """Whether every sequence has ended, or the engine cannot run the job."""
        return self._error is not None or all(sequence.finish_reason for sequence in self.sequences)

    @property
    def is_going_on(self) -> bool:
        """Whether its engine will generate more, unless it is interrupted."""
        is_interrupted = self.is_ending or self.is_pausing or self.abort_reason is not None
        return self.is_in_engine and not is_interrupted and not self.is_over

    @property
    def has_pending(self) -> bool:
        return any(sequence.has_pending for sequence in self.sequences)

    @property
    def is_urgent(self) -> bool:
        """Whether its first chunk or its end is pending, both of which are flushed immediately."""
        return self.is_over or (not self.has_spoken and self.has_pending)

    def command(self, *, passes_messages: bool = False) -> AddJob | EmbedJob:
        """The command that makes the engine start the job, or continue where the last attempt stopped."""
        claimed = self.claimed
        return AddJob(
            job_id=self.name,
            attempt=self.attempt,
            prompt_token_ids=claimed.prompt_token_ids,
            params=self.params.model_dump(mode="json"),
            max_tokens=claimed.max_tokens,
            seed=claimed.seed,
            priority=claimed.priority,
            cache_salt=str(claimed.tenant_id),
            committed_token_ids=[list(sequence.token_ids) for sequence in self.sequences],
            num_emitted_chars=[sum(map(len, sequence.text)) for sequence in self.sequences],
            finished_indexes=[i for i, sequence in enumerate(self.sequences) if sequence.finish_reason],
            has_prompt_logprobs=self._prompt_logprobs is not None,
            adapter=claimed.request.adapter,
            conversation=claimed.request.model_dump_json().encode() if passes_messages else None,
        )

    def hear(self, index: int, now: float) -> float | None:
        """Note that tokens of a sequence have arrived at `now`. Returns the seconds since its previous ones, or None if
        they are the first of this attempt."""
        sequence = self.sequences[index]
        heard_at, sequence.heard_at = sequence.heard_at, now
        return None if heard_at is None else now - heard_at

    def absorb(self, output: SequenceOutput) -> None:
        """Add the output of one of its sequences. Ignored if that sequence has ended."""
        sequence = self.sequences[output.index]
        if sequence.finish_reason is not None:
            return
        if output.text:
            sequence.pending_text.append(output.text)
        sequence.pending_token_ids += output.token_ids
        sequence.pending_logprobs += [TokenLogprob.model_validate(logprob) for logprob in output.logprobs or ()]
        if output.sum_logprobs is not None:
            sequence.pending_sum_logprobs = (sequence.pending_sum_logprobs or 0.0) + output.sum_logprobs
        if output.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = tuple(map(_logprob, output.prompt_logprobs))
            self._is_prompt_pending = True
        if sequence.num_reasoning_tokens is None:
            sequence.pending_num_reasoning_tokens = output.num_reasoning_tokens
        if output.finish_reason is not None:
            sequence.finish_reason = FinishReason(output.finish_reason)
            sequence.stop_string = output.stop_string
            sequence.is_end_pending = True
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)

    def fail(self, failure: JobFailed) -> None:
        """End it with the engine's failure."""
        self._error = _job_error(failure.code, failure.message)

    def cut_off(self, reason: FinishReason) -> None:
        """End all its sequences without the engine, which has not been given the job yet."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                sequence.is_end_pending = True

    def take_chunks(self) -> list[TokenChunk]:
        """Take everything that is pending, as numbered chunks, at most one per sequence."""
        chunks = []
        for index, sequence in enumerate(self.sequences):
            if sequence.has_pending:
                self.last_sequence_number += 1
                chunks.append(sequence.take_chunk(self.last_sequence_number, index))
        if chunks and self._is_prompt_pending:
            chunks[0] = chunks[0].model_copy(update={"prompt_logprobs": self._prompt_logprobs})
            self._is_prompt_pending = False
        self.has_spoken |= bool(chunks)
        return chunks

    def finalisation(self) -> Finalisation:
        """The final status and result of the job; all its chunks must have been taken before. For a failed job, storage
        builds the result from the committed chunks."""
        assert self.is_over
        result = None if self._status() is JobStatus.FAILED else self._result()
        reason = result.choices[0].finish_reason if result else self.sequences[0].finish_reason
        return self._finalisation(result, reason)

    def _finalisation(self, result: JobOutput | None, reason: FinishReason | None) -> Finalisation:
        status, error = self._status(), self._error
        if status is JobStatus.EXPIRED:
            code = RunTimeoutExceeded.code if self.has_run_out else DeadlineExceeded.code
            error = _job_error(code, "its time was over before the job was finished")  # storage has the full words
        return Finalisation(
            job_id=self.id,
            attempt=self.attempt,
            last_sequence_number=self.last_sequence_number,
            status=status,
            result=result,
            finish_reason=reason,
            error=error,
            engine_seconds=self.engine_seconds,
        )

    def summary(self) -> str:
        """A line for events and logs. It never contains the job's text."""
        if self._error is not None:
            return self._error.code
        reasons = dict.fromkeys(sequence.finish_reason or "unfinished" for sequence in self.sequences)
        return f"{self.num_completion_tokens} tokens, {', '.join(reasons)}"

    def _status(self) -> JobStatus:
        if self._error is not None:
            return JobStatus.FAILED
        cut_off = (STATUS_BY_REASON.get(sequence.finish_reason or FinishReason.STOP) for sequence in self.sequences)
        return next((status for status in cut_off if status is not None), JobStatus.COMPLETED)

    def _result(self) -> GenerationResult:
        usage = Usage(
            prompt_tokens=len(self.claimed.prompt_token_ids),
            completion_tokens=self.num_completion_tokens,
            cached_tokens=min(self.num_cached_tokens, len(self.claimed.prompt_token_ids)),
        )
        choices = tuple(self._choices())
        if self.params.best_of is not None:
            choices = best_choices(choices, self.params.n)
        return GenerationResult(choices=choices, usage=usage, prompt_logprobs=self._prompt_logprobs)

    def _choices(self) -> Iterator[ResultChoice]:
        for index, sequence in enumerate(self.sequences):
            assert sequence.finish_reason is not None
            yield ResultChoice(
                index=index,
                text="".join(sequence.text),
                finish_reason=sequence.finish_reason,
                num_tokens=len(sequence.token_ids),
                num_reasoning_tokens=sequence.num_reasoning_tokens,
                stop_string=sequence.stop_string,
                logprobs=tuple(sequence.logprobs) or None,
                mean_logprob=self._mean_logprob(sequence),
            )

    def _mean_logprob(self, sequence: SequenceProgress) -> float | None:
        if self.params.best_of is None or not sequence.token_ids:
            return None
        return sequence.sum_logprobs / len(sequence.token_ids)


def _logprob(entry: dict[str, object] | None) -> TokenLogprob | None:
    return None if entry is None else TokenLogprob.model_validate(entry)


def _job_error(code: str, message: str) -> JobError:
    """A JobError that is retryable if the error class with this code is; unknown codes are not retryable."""
    error_class = next((cls for cls in _walk(CeleriacError) if cls.code == code), CeleriacError)
    return JobError(code=code, message=message, retryable=error_class.retryable)


def _walk(cls: type[CeleriacError]) -> Iterator[type[CeleriacError]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _walk(subclass)


class RunningEmbedding(RunningJob):
    """An embedding job. The rest of the worker sees it as a job with one sequence that never has any output."""

    def __init__(self, claimed: ClaimedJob, *, claimed_at: float) -> None:
        super().__init__(claimed, claimed_at=claimed_at)
        self.gave_way_to: UUID | None = None  # the job that has begun beside it, beyond the slots
        self._vectors: list[bytes] = []

    def command(self, *, passes_messages: bool = False) -> EmbedJob:
        del passes_messages
        claimed = self.claimed
        assert not isinstance(claimed.request, GenerationRequest)
        ends = list(accumulate(claimed.input_lengths or ()))
        starts = [0, *ends[:-1]]
        return EmbedJob(
            job_id=self.name,
            attempt=self.attempt,
            inputs=[claimed.prompt_token_ids[start:end] for start, end in zip(starts, ends, strict=True)],
            dimensions=claimed.request.dimensions,
            priority=claimed.priority,
            tenant=str(claimed.tenant_id),
        )

    def absorb_embedding(self, output: EmbeddingOutput) -> None:
        if self.is_over:
            return
        self._vectors = output.vectors
        self.sequences[0].finish_reason = FinishReason(output.finish_reason)

    def take_chunks(self) -> list[TokenChunk]:
        return []

    def finalisation(self) -> Finalisation:
        return self._finalisation(self._embedding_result() if self._status() is JobStatus.COMPLETED else None, None)

    def summary(self) -> str:
        return self._error.code if self._error is not None else f"{len(self._vectors)} vectors"

    def _embedding_result(self) -> EmbeddingResult:
        return EmbeddingResult(
            embeddings=tuple(map(encode_vector, self._vectors)),
            dimensions=len(self._vectors[0]) // 4,
            usage=Usage(prompt_tokens=len(self.claimed.prompt_token_ids)),
        )


def make_running(claimed: ClaimedJob, *, claimed_at: float) -> RunningJob:
    """The running job of the class that fits its kind."""
    is_generation = isinstance(claimed.request, GenerationRequest)
    return (RunningJob if is_generation else RunningEmbedding)(claimed, claimed_at=claimed_at)
