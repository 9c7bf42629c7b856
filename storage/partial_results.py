"""The results of jobs that end without their worker: what they had committed."""

import logging
from collections.abc import Mapping, Sequence
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.orm import Session

from domain.jobs import FinishReason, JobStatus, Usage, external_id
from domain.requests import (
    REQUEST,
    GenerationRequest,
    GenerationResult,
    ResultChoice,
    SamplingParams,
    TokenChunk,
    best_choices,
)
from storage.usage import reasoning_tokens_of

log = logging.getLogger(__name__)

# Makes the committed output of a job that ended without its worker its result.
STORE_PARTIAL = text("""
WITH partial AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:finish_reasons AS text[]), CAST(:reasoning_tokens AS int[]),
        CAST(:results AS text[])) AS p(id, finish_reason, reasoning, result)
),
reason AS (
    UPDATE jobs j SET finish_reason = partial.finish_reason FROM partial WHERE j.id = partial.id
    RETURNING j.id, j.tenant_id, j.attempt, j.finished_at
),
recorded AS (
    UPDATE usage_records u SET num_reasoning_tokens = partial.reasoning FROM reason JOIN partial USING (id)
    WHERE partial.reasoning > 0 AND u.tenant_id = reason.tenant_id AND u.ended_at = reason.finished_at
        AND u.job_id = reason.id AND u.is_end
)
INSERT INTO job_results (job_id, attempt, result)
SELECT id, reason.attempt, partial.result::json FROM reason JOIN partial USING (id) ON CONFLICT DO NOTHING
""")

COMMITTED_OUTPUT = text("""
SELECT j.id, j.num_prompt_tokens, p.request::text AS request,
    array_agg(k.chunk::text ORDER BY k.sequence_number) AS chunks
FROM jobs j JOIN job_payloads p ON p.job_id = j.id JOIN job_chunks k ON k.job_id = j.id
WHERE j.id = ANY(CAST(:ids AS uuid[])) GROUP BY j.id, p.job_id
""")

#: By a job's final status, the finish reason of those of its sequences that had not finished.
REASON_BY_STATUS = {
    JobStatus.CANCELLED: FinishReason.CANCELLED,
    JobStatus.EXPIRED: FinishReason.DEADLINE,
    JobStatus.FAILED: FinishReason.ERROR,
}


def partial_result(
    chunks: Sequence[TokenChunk],
    *,
    num_prompt_tokens: int,
    cut_off_by: FinishReason,
    params: SamplingParams = SamplingParams(),  # noqa: B008  (frozen)
) -> GenerationResult:
    """The result that `chunks`, at least one and in order, add up to. Sequences without a chunk are left out, and
    unfinished ones get the finish reason `cut_off_by`."""
    by_index: dict[int, list[TokenChunk]] = {}
    for chunk in chunks:
        if not chunk.is_reset:
            by_index.setdefault(chunk.index, []).append(chunk)
    choices = tuple(_choice(index, by_index[index], cut_off_by) for index in sorted(by_index))
    prompt_logprobs = next((chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs), None)
    usage = Usage(prompt_tokens=num_prompt_tokens, completion_tokens=sum(choice.num_tokens for choice in choices))
    if params.best_of is not None:
        choices = best_choices(choices, params.n)
    return GenerationResult(choices=choices, usage=usage, prompt_logprobs=prompt_logprobs)


def store_partial_results(session: Session, status_by_job_id: Mapping[UUID, JobStatus]) -> None:
    """Write partial results for terminal jobs that have chunks, in the transaction that ended the jobs."""
    if not status_by_job_id:
        return
    results: dict[UUID, GenerationResult] = {}
    for row in session.execute(COMMITTED_OUTPUT, {"ids": list(status_by_job_id)}):
        try:
            chunks = [TokenChunk.model_validate_json(chunk) for chunk in row.chunks]
            request = REQUEST.validate_json(row.request)
        except ValidationError:  # of a newer release; the jobs that end with it must end all the same
            log.error("the output of an ended job cannot be read", extra={"job_id": external_id(row.id)})
            continue
        if chunks[-1].is_reset:
            continue  # it has started over and produced nothing since
        reason = REASON_BY_STATUS[status_by_job_id[row.id]]
        params = request.params if isinstance(request, GenerationRequest) else SamplingParams()
        results[row.id] = partial_result(
            chunks, num_prompt_tokens=row.num_prompt_tokens, cut_off_by=reason, params=params
        )
    columns = {
        "ids": list(results),
        "finish_reasons": [result.choices[0].finish_reason.value for result in results.values()],
        "reasoning_tokens": [reasoning_tokens_of(result) for result in results.values()],
        "results": [result.model_dump_json() for result in results.values()],
    }
    session.execute(STORE_PARTIAL, columns)


def _choice(index: int, chunks: list[TokenChunk], cut_off_by: FinishReason) -> ResultChoice:
    logprobs = tuple(logprob for chunk in chunks for logprob in chunk.logprobs or ())
    num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    told = (chunk.num_reasoning_tokens for chunk in chunks if chunk.num_reasoning_tokens is not None)
    sums = [chunk.sum_logprobs for chunk in chunks if chunk.sum_logprobs is not None]
    return ResultChoice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        finish_reason=chunks[-1].finish_reason or cut_off_by,
        num_tokens=num_tokens,
        num_reasoning_tokens=next(told, None),
        stop_string=chunks[-1].stop_string,
        logprobs=logprobs or None,
        mean_logprob=sum(sums) / num_tokens if sums and num_tokens else None,
    )
