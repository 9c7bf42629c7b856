"""The life of a job in logs and metrics: one INFO line and one count per transition, by the process that made it.

Both follow the transition's commit. `grep JOB_ID` over the logs of all processes shows a job's history. Every line has
`job_id` and, if the job was submitted over HTTP, the `request_id` of that request, which is stored in SQL. Lines never
contain a prompt, an output or a key.
"""

import logging
from collections.abc import Iterable
from uuid import UUID

from domain.eta import CLAIM_SECONDS, FLOOR_SECONDS
from domain.jobs import AttemptOutcome, FinishReason, JobStatus, external_id
from metrics import (
    jobs_finished_total,
    jobs_latency_seconds,
    jobs_paused_total,
    jobs_queue_seconds,
    jobs_returned_total,
    jobs_run_seconds,
    jobs_start_eta_ratio,
    jobs_start_eta_total,
    jobs_submitted_total,
    labelled,
    submitted_prompt_tokens_total,
    time_to_first_token_seconds,
)
from storage.files import Batch
from storage.job_accept import AcceptOutcome, NewJob
from storage.jobs import ClaimedJob, Finalisation, Restarted, Returned
from tasks.tracing import generation_attributes, job_span, trace_ids

logger = logging.getLogger("celeriac.jobs")

#: The finish reason by status. Completed jobs have that of their first sequence, or `stop` for embeddings.
REASON_BY_STATUS = {
    JobStatus.FAILED: FinishReason.ERROR,
    JobStatus.CANCELLED: FinishReason.CANCELLED,
    JobStatus.EXPIRED: FinishReason.DEADLINE,
}
VERB_BY_OUTCOME = {
    AttemptOutcome.RELEASED: "released",
    AttemptOutcome.CRASHED: "crashed with its engine",
    AttemptOutcome.LOST: "rescued",
    AttemptOutcome.STALLED: "stalled",
}


def begin(models: Iterable[str], outcomes: Iterable[AttemptOutcome]) -> None:
    """Create the counters of this process at 0: an alert on an increase would miss a counter that first appears as
    1."""
    for model in models:
        labelled(jobs_finished_total, model, JobStatus.COMPLETED.value, FinishReason.STOP.value)
        labelled(jobs_finished_total, model, JobStatus.COMPLETED.value, FinishReason.LENGTH.value)
        for status, reason in REASON_BY_STATUS.items():
            labelled(jobs_finished_total, model, status.value, reason.value)
        for outcome in outcomes:
            labelled(jobs_returned_total, model, outcome.value)


def submitted(model: str, outcome: str) -> None:
    """Count a submission. `outcome` is `accepted`, `duplicate` or the code of the refusal."""
    labelled(jobs_submitted_total, model, outcome).inc()


def accepted(new_job: NewJob) -> None:
    _accepted(new_job, "accepted", {})


def _accepted(new_job: NewJob, what: str, more: dict[str, object]) -> None:
    request = new_job.request
    submitted(request.model_id, AcceptOutcome.ACCEPTED.value)
    labelled(submitted_prompt_tokens_total, request.model_id).inc(len(new_job.prompt_token_ids))
    facts = {"model": request.model, "kind": request.kind, "prompt_tokens": len(new_job.prompt_token_ids)}
    _log(what, new_job.id, new_job, facts | {"max_tokens": new_job.max_tokens} | more)
    job_span("accept", new_job.id, new_job.traceparent, attributes={"gen_ai.request.model": request.model})


def of_batch(new_job: NewJob, batch: Batch, line: int) -> None:
    """Where an accepted job comes from. Each line is a trace of its own: a batch has too many for one."""
    ids: dict[str, str | int] = {"celeriac.batch.id": external_id(batch.id, "batch"), "celeriac.batch.line": line}
    job_span("batch line", new_job.id, new_job.traceparent, attributes=ids, linked_to=batch.traceparent)


def answered(new_job: NewJob) -> None:
    """The job was accepted with a known answer, so that it ended at once: one transition, and one line."""
    _accepted(new_job, "accepted and answered", {"status": JobStatus.COMPLETED.value, "cached": True})
    _count_end(new_job.request.model_id, JobStatus.COMPLETED, FinishReason.STOP)
    job_span("answer from the cache", new_job.id, new_job.traceparent)


def claimed(jobs: Iterable[ClaimedJob], worker: str) -> None:
    for job in jobs:
        if job.attempt == 1:
            labelled(jobs_queue_seconds, job.request.model_id).observe(job.seconds_since_accept)
            _count_estimate(job)
            job_span("queue", job.id, job.traceparent, seconds=job.seconds_since_accept)
        facts = {"worker": worker, "attempt": job.attempt, "model": job.request.model, "lane": job.lane.value}
        facts |= {"tokens": job.num_committed_tokens}
        if job.seconds_paused is None:
            _log("claimed", job.id, job, facts)
        else:
            _log("resumed", job.id, job, facts | {"seconds_paused": round(job.seconds_paused, 3)})


def _count_estimate(job: ClaimedJob) -> None:
    """How right the estimate was that the job got when it was accepted, if it got one."""
    if job.eta is None:
        return
    model, waited = job.request.model_id, job.seconds_since_accept
    *_, p50, p90 = job.eta
    labelled(jobs_start_eta_ratio, model).observe((waited + FLOOR_SECONDS) / (p50 + FLOOR_SECONDS))
    labelled(jobs_start_eta_total, model, str(waited <= p90 + CLAIM_SECONDS).lower()).inc()


def first_token(job: ClaimedJob, *, seconds: float) -> None:
    """The first token was committed, `seconds` after the claim."""
    labelled(time_to_first_token_seconds, job.request.model_id).observe(job.seconds_since_accept + seconds)
    _log("first token", job.id, job, {"attempt": job.attempt, "seconds": round(seconds, 3)})
    attributes = {"celeriac.attempt": job.attempt}
    job_span("claim to first token", job.id, job.traceparent, seconds=seconds, attributes=attributes)


def ended(job: ClaimedJob, ending: Finalisation, *, num_tokens: int, seconds: float) -> None:
    """The worker that had claimed the job finished it, `seconds` after the claim."""
    model = job.request.model_id
    _count_end(model, ending.status, ending.finish_reason or FinishReason.STOP)
    if ending.status is JobStatus.COMPLETED:
        labelled(jobs_run_seconds, model).observe(job.seconds_since_start + seconds)
        labelled(jobs_latency_seconds, model).observe(job.seconds_since_accept + seconds)
    facts: dict[str, object] = {"status": ending.status.value, "attempt": job.attempt, "tokens": num_tokens}
    facts |= {"seconds": round(seconds, 3)} | ({"code": ending.error.code} if ending.error is not None else {})
    _log("ended", job.id, job, facts)
    _record_generation(job, ending, num_tokens=num_tokens, seconds=seconds)


def _record_generation(job: ClaimedJob, ending: Finalisation, *, num_tokens: int, seconds: float) -> None:
    """The span of the attempt that ended the job: from the claim to the commit of the last chunk."""
    attributes = generation_attributes(job.request) | {
        "gen_ai.usage.input_tokens": len(job.prompt_token_ids),
        "gen_ai.usage.output_tokens": num_tokens,
        "gen_ai.response.finish_reasons": [reason.value for reason in (ending.finish_reason,) if reason is not None],
        "celeriac.attempt": job.attempt,
        "celeriac.job.status": ending.status.value,
    }
    job_span(
        f"{attributes['gen_ai.operation.name']} {job.request.model}",
        job.id,
        job.traceparent,
        seconds=seconds,
        attributes=attributes,
        error=None if ending.error is None else ending.error.code,
    )


def returned(outcome: AttemptOutcome, jobs: Iterable[Returned]) -> None:
    """Jobs whose attempt ended with `outcome`: they went back to the queue or ended."""
    for job in jobs:
        labelled(jobs_returned_total, job.model, outcome.value).inc()
        facts: dict[str, object] = {"attempt": job.attempt, "tokens": job.num_tokens}
        _log(VERB_BY_OUTCOME[outcome], job.job_id, job, facts)
        is_failure = outcome is not AttemptOutcome.RELEASED
        attributes = {"celeriac.attempt": job.attempt}
        error = outcome.value if is_failure else None
        job_span(VERB_BY_OUTCOME[outcome], job.job_id, job.traceparent, attributes=attributes, error=error)
        if job.status.is_terminal:
            ended_without_worker([job])


def paused(jobs: Iterable[Returned]) -> None:
    """Jobs that left their slots to other tenants, or ended instead, since that was asked for."""
    for job in jobs:
        labelled(jobs_paused_total, job.model).inc()
        _log("paused", job.job_id, job, {"attempt": job.attempt, "tokens": job.num_tokens})
        job_span("paused", job.job_id, job.traceparent, attributes={"celeriac.attempt": job.attempt})
        if job.status.is_terminal:
            ended_without_worker([job])


def ended_without_worker(jobs: Iterable[Returned]) -> None:
    """Jobs that ended without a worker. Their `seconds` are those since acceptance."""
    for job in jobs:
        _count_end(job.model, job.status, FinishReason.STOP)
        facts: dict[str, object] = {"status": job.status.value, "attempt": job.attempt, "tokens": job.num_tokens}
        _log("ended", job.job_id, job, facts | {"seconds": round(job.seconds, 3)})
        attributes = {"celeriac.job.status": job.status.value}
        job_span("end without a worker", job.job_id, job.traceparent, attributes=attributes)


def _count_end(model: str, status: JobStatus, reason: FinishReason) -> None:
    labelled(jobs_finished_total, model, status.value, REASON_BY_STATUS.get(status, reason).value).inc()


def restarted(jobs: Iterable[Restarted], why: str, **more: object) -> None:
    for job in jobs:
        facts: dict[str, object] = {"attempt": job.attempt, "discarded_tokens": job.num_tokens}
        _log(f"starts over, {why}", job.job_id, job, facts | more)
        job_span("start over", job.job_id, job.traceparent, attributes={"celeriac.attempt": job.attempt})


def _log(what: str, job_id: UUID, origin: NewJob | ClaimedJob | Returned | Restarted, facts: dict[str, object]) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    ids: dict[str, object] = {"job_id": external_id(job_id), **trace_ids(job_id, origin.traceparent)}
    if origin.request_id is not None:
        ids["request_id"] = origin.request_id
    logger.info("job %s", what, extra=ids | facts)
