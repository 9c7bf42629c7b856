"""An engine's embedding jobs: each step embeds inputs of a limited number of tokens, next to the running batch.

Free of torch. Inputs of several jobs share a pass. If it fails, each half is run on its own, until the input that fails
is alone; its job fails.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from domain.errors import ContextLengthExceeded, EngineError, InvalidRequest
from gpu_worker.engine.backends import RecordStep, StepMember
from gpu_worker.engine_process.frames import EmbeddingOutput, EmbedJob, EngineStats, JobFailed, StepDone

log = logging.getLogger(__name__)

SHARE_WITH_TEXTS = 4  # embeddings get a quarter of a step's tokens while texts are generated, so that neither starves
MAX_OUTPUT_BYTES = 2**24  # per step, though at least one job's output: the size of a frame is limited

#: From the token ids of each input to float32 (num_inputs, width), in the same order; vectors may have any length.
Embed = Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]

#: From one vector and the number of dimensions that were asked for to the bytes of the result.
Encode = Callable[[NDArray[np.float32], int | None], bytes]


@dataclass(slots=True, eq=False)
class QueuedEmbedding:
    command: EmbedJob
    vectors: list[bytes] = field(default_factory=list)  # for the inputs embedded so far, in order

    @property
    def key(self) -> tuple[str, int]:
        return self.command.job_id, self.command.attempt


def _inputs(jobs: Sequence[QueuedEmbedding]) -> Iterator[tuple[QueuedEmbedding, Sequence[int]]]:
    """What is left of them, in order."""
    return ((job, token_ids) for job in jobs for token_ids in job.command.inputs[len(job.vectors) :])


class EmbeddingQueue:
    """Exceptions of the types `fatal` must end the process and are not caught."""

    def __init__(
        self,
        embed: Embed,
        *,
        vocab_size: int,
        max_input_tokens: int,
        max_step_tokens: int,
        encode: Encode,
        fatal: tuple[type[BaseException], ...] = (),
    ) -> None:
        self._embed = embed
        self._encode = encode
        self._vocab_size = vocab_size
        self._max_input_tokens = max_input_tokens
        self._max_step_tokens = max_step_tokens
        self._fatal = fatal
        self._jobs: dict[tuple[str, int], QueuedEmbedding] = {}  # each tenant's in the order in which they run
        self._turns: dict[str, int] = {}  # the number of each tenant's last input; of those that have jobs
        self._planned: list[tuple[QueuedEmbedding, Sequence[int]]] = []
        self._ended: deque[EmbeddingOutput] = deque()
        self.num_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._ended)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def add(self, command: EmbedJob) -> None:
        """Raises a CeleriacError if the job can never run."""
        for token_ids in command.inputs:
            self._check(token_ids)
        job = QueuedEmbedding(command)
        self._jobs[job.key] = job
        self._jobs = dict(sorted(self._jobs.items(), key=lambda item: -item[1].command.priority))

    def abort(self, job_id: str, attempt: int, reason: str) -> None:
        """Like Backend.abort: the next step returns the job's final output, or none if `reason` is empty."""
        if self._jobs.pop((job_id, attempt), None) is not None and reason:
            self._ended.append(EmbeddingOutput(job_id, attempt, vectors=[], finish_reason=reason))
        elif not reason:
            self._ended = deque(
                output for output in self._ended if (output.job_id, output.attempt) != (job_id, attempt)
            )

    def step(
        self,
        record: RecordStep,
        generate: Callable[[RecordStep], StepDone] | None,
        stats: Callable[[], EngineStats],
    ) -> StepDone:
        """Run one step of embeddings, and `generate`, if given, for the step of the texts. `record` is called with the
        jobs of both."""
        members = self._plan(self._max_step_tokens // (SHARE_WITH_TEXTS if generate else 1))
        record(members)
        if generate is None:
            done = StepDone(outputs=[], failures=[], stats=stats())
        else:
            done = generate(lambda others: record([*others, *members]))
        failures = self._run(self._planned)
        return StepDone(
            outputs=done.outputs, failures=[*done.failures, *failures], stats=done.stats, embeddings=self._outputs()
        )

    def _check(self, token_ids: Sequence[int]) -> None:
        if not token_ids or not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise InvalidRequest(
                f"an input is empty or contains a token id outside 0 to {self._vocab_size - 1}; check it",
                param="inputs",
            )
        if len(token_ids) > self._max_input_tokens:
            raise ContextLengthExceeded(
                f"an input has {len(token_ids)} tokens, but the model accepts {self._max_input_tokens}; shorten it",
                param="inputs",
            )

    def _plan(self, num_tokens: int) -> list[StepMember]:
        """Choose the next inputs, up to `num_tokens` in total: of each tenant one after the other, beginning with the
        one whose last turn was longest ago, so that nobody waits for another's long list. At least one is chosen; none
        is split."""
        self._planned = []
        lists: dict[str, list[QueuedEmbedding]] = {}
        for job in self._jobs.values():
            lists.setdefault(job.command.tenant, []).append(job)
        self._turns = {tenant: self._turns.get(tenant, 0) for tenant in lists}
        tenants = deque((tenant, _inputs(lists[tenant])) for tenant in sorted(lists, key=self._turns.__getitem__))
        num_turns = max(self._turns.values(), default=0)
        while tenants and num_tokens > 0:
            tenant, inputs = tenants.popleft()
            chosen = next(inputs, None)
            if chosen is None:
                continue
            if self._planned and len(chosen[1]) > num_tokens:
                break
            num_tokens -= len(chosen[1])
            num_turns += 1
            self._turns[tenant] = num_turns
            self._planned.append(chosen)
            tenants.append((tenant, inputs))
        return [StepMember(*key, phase="prefill") for key in dict.fromkeys(job.key for job, _ in self._planned)]

    def _run(self, planned: Sequence[tuple[QueuedEmbedding, Sequence[int]]]) -> list[JobFailed]:
        planned = [(job, token_ids) for job, token_ids in planned if job.key in self._jobs]
        if not planned:
            return []
        try:
            vectors = self._embed([token_ids for _, token_ids in planned])
            encoded = [
                self._encode(row, job.command.dimensions) for (job, _), row in zip(planned, vectors, strict=True)
            ]
        except self._fatal:
            raise
        except Exception as exc:
            if len(planned) == 1:
                return [self._fail(planned[0][0], exc)]
            log.warning(
                "embedding failed; running each half on its own", extra={"num_inputs": len(planned), "error": repr(exc)}
            )
            middle = len(planned) // 2
            return self._run(planned[:middle]) + self._run(planned[middle:])
        for (job, token_ids), vector in zip(planned, encoded, strict=True):
            self._take(job, len(token_ids), vector)
        return []

    def _take(self, job: QueuedEmbedding, num_tokens: int, vector: bytes) -> None:
        self.num_tokens += num_tokens
        job.vectors.append(vector)
        if len(job.vectors) == len(job.command.inputs):
            del self._jobs[job.key]
            self._ended.append(EmbeddingOutput(*job.key, vectors=job.vectors, finish_reason="stop"))

    def _fail(self, job: QueuedEmbedding, exc: Exception) -> JobFailed:
        log.error("embedding job failed", exc_info=exc, extra={"job_id": job.command.job_id})
        del self._jobs[job.key]
        return JobFailed(*job.key, EngineError.code, f"the model could not run this job: {type(exc).__name__}")

    def _outputs(self) -> list[EmbeddingOutput]:
        outputs: list[EmbeddingOutput] = []
        num_bytes = 0
        while self._ended:
            num_bytes += sum(map(len, self._ended[0].vectors))
            if outputs and num_bytes > MAX_OUTPUT_BYTES:
                break
            outputs.append(self._ended.popleft())
        return outputs


def encode_vector(vector: NDArray[np.float32], dimensions: int | None) -> bytes:
    """The first `dimensions` numbers, scaled to unit length, as little-endian float32. Raises ValueError if they are
    all zero or not finite."""
    front = vector[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(front))
    if not np.isfinite(length) or length == 0.0:
        raise ValueError("the model's vector is zero or not finite")
    return (front / length).astype("<f4").tobytes()


def encode_score(vector: NDArray[np.float32], dimensions: int | None) -> bytes:
    """The single number, as little-endian float32. Raises ValueError if it is not finite."""
    del dimensions  # there is only one
    if not np.isfinite(vector).all():
        raise ValueError("the model's score is not finite")
    return vector.astype("<f4").tobytes()
