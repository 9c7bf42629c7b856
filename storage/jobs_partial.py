"""What a job that ended without its worker is left with: an error, and a result made of the chunks it committed."""

from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy.orm import Session

from domain.chunks import TokenChunk
from domain.errors import CeleriacError, DeadlineExceeded, ModelRevisionGone, PoisonJob, WorkerLost
from domain.jobs import FinishReason, JobError, JobStatus, Usage
from domain.kinds import REQUEST
from domain.requests import GenerationRequest, GenerationResult, ResultChoice, SamplingParams, best_choices
from storage.jobs_ends_sql import COMMITTED_OUTPUT, STORE_PARTIAL


def _stored_error(error: type[CeleriacError], message: str) -> str:
    return JobError(code=error.code, message=message, retryable=error.retryable).model_dump_json()


#: Why a job failed or expired without its worker saying so.
ERRORS = {
    "deadline_error": _stored_error(DeadlineExceeded, "the deadline passed before the job was done"),
    "poison_error": _stored_error(PoisonJob, "the engine crashed while it ran this job alone"),
    "lost_error": _stored_error(WorkerLost, "the worker was lost or crashed more often than max_failures allows"),
    "revision_error": _stored_error(
        ModelRevisionGone,
        "it had begun under a revision of the model that no worker serves any more; retry it to begin anew",
    ),
}

#: What cut off the unfinished sequences of a job that ended so.
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
    """The result that `chunks`, in order and at least one, amount to. Sequences without a chunk are left out; those
    that had not finished get the reason `cut_off_by`."""
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
    """Write the results of terminal jobs that have chunks, in the transaction that ended them."""
    if not status_by_job_id:
        return
    results: dict[UUID, GenerationResult] = {}
    for row in session.execute(COMMITTED_OUTPUT, {"ids": list(status_by_job_id)}):
        chunks = [TokenChunk.model_validate_json(chunk) for chunk in row.chunks]
        if chunks[-1].is_reset:
            continue  # it began anew, and came no further
        reason = REASON_BY_STATUS[status_by_job_id[row.id]]
        request = REQUEST.validate_json(row.request)
        params = request.params if isinstance(request, GenerationRequest) else SamplingParams()
        results[row.id] = partial_result(
            chunks, num_prompt_tokens=row.num_prompt_tokens, cut_off_by=reason, params=params
        )
    columns = {
        "ids": list(results),
        "finish_reasons": [result.choices[0].finish_reason.value for result in results.values()],
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
        logprobs=logprobs or None,
        mean_logprob=sum(sums) / num_tokens if sums and num_tokens else None,
    )
