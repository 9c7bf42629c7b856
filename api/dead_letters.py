"""What went wrong, and another try: dead letters with their attempts, replay, retry.

An ended job stays as it is, so every further try is a new job that names the old one (docs/adr/0011).
"""

import orjson
from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from api.bodies import off_loop, parse_model, read_body, require_json
from api.deps import caller_of, private_router
from api.job_inputs import page_cursor
from api.job_views import DeadLetterListView, JobView, attempts_view, job_view
from api.jobs import answer_job, find_job, view_after_submit
from api.openapi import request_body
from api.queries import QueryModel, query_parameters, read_query
from api.views import page
from domain.errors import JobNotRetryable
from domain.first_error import FirstErrorModel
from domain.ids import external_id
from domain.jobs import JobStatus
from storage import job_attempts, job_retry
from storage.job_queries import JobRecord
from tasks.resubmit import Resubmission, resubmit

router = private_router()

RETRYABLE = frozenset({JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED})


class DeadLetterQuery(QueryModel):
    after: str | None = Field(default=None, description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=100)


class ReplayBody(FirstErrorModel):
    """POST .../replay; may be left out."""

    model_config = ConfigDict(extra="forbid")

    allow_poison: bool = Field(default=False, description="Run it, alone, although it crashed an engine within a day.")


@router.get(
    "/v1/dead_letters",
    responses={200: {"model": DeadLetterListView}},
    openapi_extra={"parameters": query_parameters(DeadLetterQuery)},
)
async def list_dead_letters(request: Request) -> Response:
    """The tenant's failed jobs with all their attempts, newest first. Go on with `after` = `last_id`."""
    services, tenant_id = caller_of(request)
    query = read_query(request, DeadLetterQuery)
    found = await services.read(
        job_attempts.list_dead_letters, tenant_id, after=page_cursor(query.after), limit=query.limit + 1
    )
    data = [
        job_view(JobRecord(job, None, None, worker=attempts[-1].worker_name if attempts else None))
        | {"attempts": attempts_view(job, attempts)}
        for job, attempts in found
    ]
    return Response(orjson.dumps(page(data, query.limit)), media_type="application/json")


@router.post(
    "/v1/dead_letters/{job_id}/replay",
    status_code=202,
    responses={200: {"model": JobView}, 202: {"model": JobView}},
    openapi_extra=request_body(ReplayBody, is_required=False),
)
async def replay_dead_letter(job_id: str, request: Request) -> Response:
    """A new job with the same request and nothing of the old output. The same call again answers with the same job."""
    raw = await read_body(request)
    if raw:
        require_json(request)
    body = await off_loop(request, parse_model, raw or b"{}", ReplayBody)
    how = Resubmission("replay", is_poison_allowed=body.allow_poison)
    return await _submit_again(job_id, request, how, allowed=frozenset({JobStatus.FAILED}))


@router.post("/v1/jobs/{job_id}/retry", status_code=202, responses={200: {"model": JobView}, 202: {"model": JobView}})
async def retry_job(job_id: str, request: Request) -> Response:
    """A new job that goes on behind the output of one that failed, expired or was cancelled, while its model revision
    is served; else from the start. The same call again answers with the same job."""
    return await _submit_again(job_id, request, Resubmission("retry", keeps_output=True), allowed=RETRYABLE)


async def _submit_again(job_id: str, request: Request, how: Resubmission, *, allowed: frozenset[JobStatus]) -> Response:
    services, tenant_id = caller_of(request)
    record = await find_job(services, job_id, tenant_id, with_request=True, with_result=False)
    if record.job.status not in allowed:
        raise JobNotRetryable(
            f"the job is {record.job.status}; {how.verb} takes one that is {' or '.join(sorted(allowed))}",
            param="job_id",
        )
    max_queued_jobs = services.settings.max_queued_jobs
    submitted = await resubmit(
        services.submitter,
        record,
        how,
        lambda new_job, keeps_output: services.write(
            job_retry.retry, new_job, keeps_output, max_queued_jobs=max_queued_jobs
        ),
    )
    view = await view_after_submit(services, tenant_id, submitted, is_waited=how.keeps_output)
    headers = {"location": f"/v1/jobs/{external_id(submitted.job_id)}", "x-job-id": external_id(submitted.job_id)}
    if not submitted.is_new:
        headers["idempotent-replayed"] = "true"
    return answer_job(view, headers, pending_status=202)
