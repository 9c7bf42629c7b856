"""A claimed embedding job while it runs here: it has no stream, and one result at its end."""

from itertools import accumulate

from domain.chunks import TokenChunk
from domain.embeddings import EmbeddingResult, encode_vector
from domain.jobs import FinishReason, JobStatus, Usage
from domain.requests import GenerationRequest
from gpu_worker.frames import EmbeddingOutput, EmbedJob
from gpu_worker.running_job import RunningJob
from storage.jobs import ClaimedJob, Finalisation


class RunningEmbedding(RunningJob):
    """To the rest of the worker a job with one sequence, which never says a word."""

    def __init__(self, claimed: ClaimedJob, *, claimed_at: float) -> None:
        super().__init__(claimed, claimed_at=claimed_at)
        self._vectors: list[bytes] = []

    def command(self) -> EmbedJob:
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
    """By the job's kind."""
    is_generation = isinstance(claimed.request, GenerationRequest)
    return (RunningJob if is_generation else RunningEmbedding)(claimed, claimed_at=claimed_at)
