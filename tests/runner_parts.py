"""Claimed jobs and engine outputs for the tests of the runner's parts."""

from typing import Any
from uuid import UUID

from domain.jobs import Lane, external_id, new_id
from domain.requests import GenerationRequest, SamplingParams, TokenChunk
from gpu_worker.engine_process.frames import SequenceOutput
from gpu_worker.job import RunningJob
from storage.jobs import ClaimedJob

TENANT = UUID(int=1)


def make_claimed(*, n: int = 1, committed_chunks: list[TokenChunk] | None = None, **fields: Any) -> ClaimedJob:
    defaults: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "attempt": 1,
        "request": GenerationRequest(model="test-model", prompt="x", params=SamplingParams(n=n, temperature=0.0)),
        "prompt_token_ids": [1, 2, 3],
        "max_tokens": 16,
        "seed": 7,
        "priority": 0,
        "lane": Lane.STANDARD,
        "num_suspicions": 0,
        "committed_chunks": committed_chunks or [],
    }
    return ClaimedJob(**defaults | fields)


def make_running(*, claimed_at: float = 0.0, **fields: Any) -> RunningJob:
    return RunningJob(make_claimed(**fields), claimed_at=claimed_at)


def make_output(job: RunningJob, text: str = "", token_ids: tuple[int, ...] = (1,), **fields: Any) -> SequenceOutput:
    defaults: dict[str, Any] = {"job_id": external_id(job.id), "attempt": job.attempt, "index": 0}
    return SequenceOutput(**defaults | fields, token_ids=list(token_ids), text=text)
