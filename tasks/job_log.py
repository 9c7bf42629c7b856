"""The life of a job in the logs: one INFO line for each step, written by the process that did it, after its commit.

`grep JOB_ID` over the logs of all processes tells the story. Every line has `job_id` and, where an HTTP request brought
the job, that one's `request_id`, which travels through SQL; never a prompt, an output or a key.
"""

import logging
from collections.abc import Iterable
from uuid import UUID

from domain.ids import external_id
from domain.jobs import JobStatus
from storage.job_accept import NewJob
from storage.jobs import ClaimedJob, Restarted, Returned

logger = logging.getLogger("celeriac.jobs")


def accepted(new_job: NewJob) -> None:
    request = new_job.request
    facts = {"model": request.model, "kind": request.kind, "prompt_tokens": len(new_job.prompt_token_ids)}
    _tell("accepted", new_job.id, new_job.request_id, facts | {"max_tokens": new_job.max_tokens})


def claimed(jobs: Iterable[ClaimedJob], worker: str) -> None:
    for job in jobs:
        facts = {"worker": worker, "attempt": job.attempt, "model": job.request.model, "lane": job.lane.value}
        _tell("claimed", job.id, job.request_id, facts | {"tokens": job.num_committed_tokens})


def first_token(job: ClaimedJob, *, seconds: float) -> None:
    """`seconds` since the claim."""
    _tell("first token", job.id, job.request_id, {"attempt": job.attempt, "seconds": round(seconds, 3)})


def ended(
    job_id: UUID,
    request_id: str | None,
    *,
    status: JobStatus,
    attempt: int,
    tokens: int,
    seconds: float,
    code: str | None = None,
) -> None:
    """`seconds` since it was accepted, or since the claim where `attempt` ended it."""
    facts: dict[str, object] = {"status": status.value, "attempt": attempt, "tokens": tokens}
    _tell("ended", job_id, request_id, facts | {"seconds": round(seconds, 3)} | ({"code": code} if code else {}))


def returned(verb: str, jobs: Iterable[Returned]) -> None:
    """Jobs that went back to the queue are told by `verb` (released, crashed, rescued, stalled); others have ended by
    it."""
    for job in jobs:
        _tell(verb, job.job_id, job.request_id, {"attempt": job.attempt, "tokens": job.num_tokens})
        if job.status.is_terminal:
            ends([job])


def ends(jobs: Iterable[Returned]) -> None:
    """Jobs that ended without a worker."""
    for job in jobs:
        ended(
            job.job_id,
            job.request_id,
            status=job.status,
            attempt=job.attempt,
            tokens=job.num_tokens,
            seconds=job.seconds,
        )


def restarted(jobs: Iterable[Restarted], model_revision: str) -> None:
    for job in jobs:
        facts = {"attempt": job.attempt, "discarded_tokens": job.num_tokens, "model_revision": model_revision}
        _tell("begins anew, as no worker serves its model revision any more", job.job_id, job.request_id, facts)


def _tell(what: str, job_id: UUID, request_id: str | None, facts: dict[str, object]) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    ids: dict[str, object] = {"job_id": external_id(job_id)}
    if request_id is not None:
        ids["request_id"] = request_id
    logger.info("job %s", what, extra=ids | facts)
