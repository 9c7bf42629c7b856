"""/v1/jobs and /v1/dead_letters: submit, read, wait for, stream, cancel, delete, replay and retry jobs.

Every other endpoint is a view of these jobs. A job that has ended never changes, so each replay or retry is a new job
that names the old one (docs/adr/0011).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.events import JobEventStream, JobToStream, choices_of, read_all_chunks, start_of
from api.inputs import (
    EventsQuery,
    ListQuery,
    OutputQuery,
    PageQuery,
    WaitQuery,
    accepts_json,
    idempotency_key,
    included,
    list_page,
    listing,
    off_loop,
    preferred_wait,
    query_parameters,
    read_body,
    read_generation,
    read_query,
    require_json,
    stream_cursor,
)
from api.limits import size_of
from api.model_queues import queue_headers
from api.openai.job_headers import read_job_headers, with_headers
from api.openapi import EVENTS, TEXT, request_body
from api.request_headers import header_of
from api.root_path import link
from api.services import Services, caller_of, private_router, services_of, stream_router
from api.sse import EventStream
from dialects.bodies import parse_model
from dialects.native import (
    BODY_SCHEMA,
    DeadLetterListView,
    EmbeddingJobBody,
    JobBody,
    JobListView,
    JobOutputView,
    JobVectorsView,
    JobView,
    OutputView,
    attempts_view,
    body_class,
    job_view,
    new_job_view,
    output_view,
)
from dialects.openai_views import DeletedView, page
from domain.errors import JobNotFound, JobNotRetryable
from domain.jobs import FirstErrorModel, JobKind, JobStatus, external_id, parse_id
from domain.requests import JobRequest
from metrics import stream_resumes_total
from observability import job_id_context
from storage import job_queries, jobs
from storage.job_queries import JobRecord
from storage.tables import Job, JobAttempt
from tasks.submit import CACHE_HEADER, Resubmission, Submitted, resubmit

router = private_router("Jobs")

readers = stream_router("Jobs")

POLL_MILLISECONDS = 1_000  # how often a client that does not use long polling should poll


@router.post(
    "/v1/jobs",
    status_code=202,
    responses={200: {"model": JobView}, 202: {"model": JobView}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": BODY_SCHEMA}},
        },
        "parameters": [
            {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
            for name in ("Idempotency-Key", "Prefer")
        ],
    },
)
async def submit_job(request: Request) -> Response:
    """Answers 202 once the job is committed. With `Prefer: wait=N`, 200 and the result if it ends within N seconds."""
    services, tenant_id = caller_of(request)
    require_json(request)
    submitted = await _submit(request, await read_body(request))
    wait_seconds = preferred_wait(header_of(request.scope, b"prefer"))
    job_id = external_id(submitted.job_id)
    job_id_context.set(job_id)
    if wait_seconds and submitted.record is None:
        await services.wait_for_end(submitted.job_id, wait_seconds)
    view = await view_after_submit(services, tenant_id, submitted, is_waited=bool(wait_seconds))
    headers = {"location": link(request, f"/v1/jobs/{job_id}"), "x-job-id": job_id}
    if wait_seconds is not None:
        headers["preference-applied"] = f"wait={wait_seconds}"
    if not submitted.is_new:
        headers["idempotent-replayed"] = "true"
    if submitted.cache is not None:
        headers[CACHE_HEADER] = submitted.cache
    return answer_job(view, headers, pending_status=202)


async def _submit(request: Request, content: bytes) -> Submitted:
    services = services_of(request)
    if await off_loop(request, body_class, content) is EmbeddingJobBody:
        default_model = services.catalog.default_id_for("embedding")
        body = await off_loop(request, parse_model, content, EmbeddingJobBody, default_model=default_model)
        return await _submit_body(request, body, body.to_request())
    read = await read_generation(request, content, JobBody, lambda body, view: body.to_request())
    submitted = await _submit_body(request, read.body, read.generation)
    if submitted.record is not None:
        services.known_bodies.note(read)
    return submitted


async def _submit_body(request: Request, body: JobBody | EmbeddingJobBody, asked: JobRequest) -> Submitted:
    services, tenant_id = caller_of(request)
    options = with_headers(body.to_options(idempotency_key(request, body)), body, read_job_headers(request.headers))
    return await services.submitter.submit(tenant_id, asked, options)


@router.get("/v1/jobs", **listing(JobListView, ListQuery))
async def list_jobs(request: Request) -> Response:
    """The tenant's jobs, newest first, without their output. For the next page send `after` = `last_id`."""
    services, tenant_id = caller_of(request)
    query = read_query(request, ListQuery)
    found = await services.read(
        job_queries.list_jobs,
        tenant_id,
        status=query.status,
        model=query.model,
        created_after=query.created_after,
        metadata=query.metadata,
        idempotency_key=query.idempotency_key,
        batch=query.batch,
        after=query.cursor(),
        limit=query.limit + 1,
        order=query.order,
    )
    names = await services.read(job_queries.worker_names, [job.id for job in found])
    records = [JobRecord(job, None, None, worker=names.get(job.id)) for job in found]
    data = [job_view(record, services.monitor.place_of(record.job)) for record in records]
    return json_response(page(data, query.limit))


@router.get(
    "/v1/jobs/{job_id}",
    responses={200: {"model": JobView}},
    openapi_extra={"parameters": query_parameters(WaitQuery)},
)
async def read_job(job_id: str, request: Request) -> Response:
    """The current state of the job. With `wait`, the answer is held until the job ends or the time is over."""
    services, tenant_id = caller_of(request)
    query = read_query(request, WaitQuery)
    include = included(query.include, {"input", "output", "attempts"})
    record = await find_job(services, job_id, tenant_id, with_request="input" in include)
    if query.wait and not record.job.status.is_terminal:
        await services.wait_for_end(record.job.id, query.wait)
        record = await find_job(services, job_id, tenant_id, with_request="input" in include)
    view = await _view(services, record)
    if "output" in include and record.result is None and record.job.kind is JobKind.GENERATION:
        view["output"] = await _partial_output(services, record.job.id)
    if "attempts" in include:
        attempts = await services.read(job_queries.attempts_of, [record.job.id])
        view["attempts"] = attempts_view(record.job, attempts[record.job.id], worker=record.worker)
    return answer_job(view, {"x-job-id": str(view["id"])}, pending_status=200)


@readers.get(
    "/v1/jobs/{job_id}/events",
    response_class=Response,
    responses={200: EVENTS, 204: {"description": "The client has already received the last event."}},
    openapi_extra={"parameters": query_parameters(EventsQuery)},
)
async def stream_job(job_id: str, request: Request) -> Response:
    """The job as server-sent events: from the start, after a cursor (`Last-Event-ID` or `starting_after`), from a
    snapshot, or from now on."""
    services, tenant_id = caller_of(request)
    query = read_query(request, EventsQuery)
    include = included(query.include, {"token_ids"})
    cursor = stream_cursor(request.headers.get("last-event-id"), query.starting_after)
    is_now = cursor is None and query.from_ == "now"
    job = await find_job_to_stream(services, job_id, tenant_id, after=None if is_now else cursor or 0)
    start = start_of(job, cursor, query.from_)
    if start is None:
        return Response(status_code=204)  # makes a browser's EventSource stop reconnecting
    services.slots.refuse_if_full()
    if cursor is not None:
        stream_resumes_total.inc()
    settings = services.settings
    return EventStream(
        JobEventStream(services, job, start, with_token_ids="token_ids" in include).frames(),
        heartbeat_seconds=settings.stream_heartbeat_seconds,
        lifetime_seconds=settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining,
        headers={"x-job-id": external_id(job.id)},
    )


@router.get(
    "/v1/jobs/{job_id}/output",
    response_class=Response,
    responses={200: {"model": JobOutputView | JobVectorsView, **TEXT}},
    openapi_extra={"parameters": query_parameters(OutputQuery)},
)
async def read_output(job_id: str, request: Request) -> Response:
    """One choice as text/plain or, if `Accept` asks for it, all choices as JSON. Partial while the job runs."""
    services, tenant_id = caller_of(request)
    query = read_query(request, OutputQuery)
    record = await find_job(services, job_id, tenant_id)
    is_text = record.job.kind is JobKind.GENERATION
    shown = await services.large_work.run(size_of(record.result), output_view, record.result)
    output: Any = shown or (await _partial_output(services, record.job.id) if is_text else {})
    headers = {
        "x-job-id": external_id(record.job.id),
        "x-job-status": record.job.status.value,
        "x-content-type-options": "nosniff",  # the text of a model: no browser may render it as a page
        "vary": "accept",
    }
    if not is_text or accepts_json(request.headers.get("accept", "")):
        answer = {"id": external_id(record.job.id), "object": "job.output", "status": record.job.status, **output}
        return json_response(answer, headers=headers)
    text = next((choice["text"] for choice in output["choices"] if choice["index"] == query.index), "")
    return Response(text, headers=headers, media_type="text/plain")


@router.post("/v1/jobs/{job_id}/cancel", responses={200: {"model": JobView}})
async def cancel_job(job_id: str, request: Request) -> Response:
    """A queued job is cancelled at once, a running one within one step of its engine; the output so far is kept. A job
    that has ended is returned unchanged."""
    services, tenant_id = caller_of(request)
    id_ = _parse_job_id(job_id)
    if await services.cancel(id_, tenant_id) is None:
        raise _not_found(job_id)
    record = await find_job(services, job_id, tenant_id)
    return answer_job(await _view(services, record), {"x-job-id": external_id(id_)}, pending_status=200)


@router.delete("/v1/jobs/{job_id}", responses={200: {"model": DeletedView}})
async def delete_job(job_id: str, request: Request) -> Response:
    """Erase the job with its input, output and stream. A running job is stopped."""
    services, tenant_id = caller_of(request)
    record = await find_job(services, job_id, tenant_id, with_result=False)
    if not await services.write(jobs.delete, record.job.id, tenant_id):
        raise _not_found(job_id)
    if record.job.status is JobStatus.IN_PROGRESS:
        services.dispatcher.revoke_running(record.job.id)
    await services.announce(record.job.id, JobStatus.CANCELLED)  # wakes open streams, which find the job gone
    deleted = {"id": external_id(record.job.id), "object": "job", "deleted": True}
    return json_response(deleted)


async def find_job(
    services: Services, job_id: str, tenant_id: UUID, *, with_request: bool = False, with_result: bool = True
) -> JobRecord:
    """Raises JobNotFound, with the same message for a malformed id, an unknown one and one of another tenant."""
    id_ = _parse_job_id(job_id)
    record = await services.read(job_queries.get, id_, tenant_id, with_request=with_request, with_result=with_result)
    if record is None:
        raise _not_found(job_id)
    job_id_context.set(external_id(id_))
    return record


async def find_job_to_stream(
    services: Services, job_id: str, tenant_id: UUID, *, after: int | None = None
) -> JobToStream:
    """As `find_job`. With `after` it may be a moment old, but has that chunk: thousands may begin to read one job at
    once."""
    id_ = _parse_job_id(job_id)
    job = None if after is None else _known_job(services, id_, tenant_id, after)
    if job is None:
        record = await services.streamed_jobs.read(
            (id_, tenant_id), partial(_read_job_to_stream, services, id_, tenant_id)
        )
        if record is None:
            raise _not_found(job_id)
        job = JobToStream.of(record.job)
    job_id_context.set(external_id(id_))
    return job


def _known_job(services: Services, id_: UUID, tenant_id: UUID, after: int) -> JobToStream | None:
    known = services.streams.known.record(id_)
    if known is None:
        return None
    record, state = known
    if record.job.tenant_id != tenant_id or state.committed_sequence_number < after:
        return None
    return JobToStream.of(record.job)._replace(committed_sequence_number=state.committed_sequence_number)


async def _read_job_to_stream(services: Services, id_: UUID, tenant_id: UUID) -> JobRecord | None:
    version = services.streams.version_of(id_)
    record = await services.read(job_queries.get, id_, tenant_id, with_result=False)
    if record is not None:
        services.streams.known.keep_record(id_, version, record)
    return record


def _parse_job_id(job_id: str) -> UUID:
    try:
        return parse_id(job_id)
    except ValueError:
        raise _not_found(job_id) from None


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(
        f"there is no job {job_id[:64]!r}; check the id, as the job may have been deleted", param="job_id"
    )


async def view_after_submit(services: Services, tenant_id: UUID, submitted: Submitted, *, is_waited: bool) -> JobView:
    """The view of a new job is built without a query. If the request waited, or the job existed before, it is read."""
    if submitted.record is not None:
        return await _view(services, replace(submitted.record, request=None))
    if submitted.is_new and not is_waited:
        queue = services.monitor.joining(submitted)
        services.monitor.accepted(submitted.new_job)
        return new_job_view(submitted.new_job, submitted.created_at, queue)
    record = await find_job(services, external_id(submitted.job_id), tenant_id)
    return await _view(services, record)


async def _view(services: Services, record: JobRecord) -> JobView:
    if record.job.status is not JobStatus.QUEUED:
        return await services.large_work.run(size_of(record.result), job_view, record)
    queue = await services.position(record.job.id, record.job.model)
    return job_view(record, queue or services.monitor.place_of(record.job))


async def _partial_output(services: Services, job_id: UUID) -> OutputView:
    choices = choices_of(await read_all_chunks(services, job_id))
    return {"text": choices[0]["text"] if choices else "", "choices": choices}


def answer_job(view: JobView, headers: dict[str, str], *, pending_status: int) -> Response:
    """A job's view. Until the job has ended, headers suggest when to poll again and give its place in the queue."""
    is_terminal = view["finished_at"] is not None
    if not is_terminal:
        headers |= {"retry-after": "1", "openai-poll-after-ms": str(POLL_MILLISECONDS)}
    headers |= queue_headers(view["queue"])
    status = 200 if is_terminal else pending_status
    return json_response(view, status, headers)


RETRYABLE = frozenset({JobStatus.FAILED, JobStatus.EXPIRED, JobStatus.CANCELLED})


class ReplayBody(FirstErrorModel):
    """The body of POST .../replay, which is optional."""

    model_config = ConfigDict(extra="forbid")

    allow_poison: bool = Field(
        default=False,
        description="Run the job although it has crashed an engine within the last day. It then runs alone.",
    )


@router.get("/v1/dead_letters", **listing(DeadLetterListView, PageQuery))
async def list_dead_letters(request: Request) -> Response:
    """The tenant's failed jobs with all their attempts, newest first. For the next page send `after` = `last_id`."""
    return await list_page(request, read_query(request, PageQuery), job_queries.list_dead_letters, _dead_letter_view)


@router.post(
    "/v1/dead_letters/{job_id}/replay",
    status_code=202,
    responses={200: {"model": JobView}, 202: {"model": JobView}},
    openapi_extra=request_body(ReplayBody, is_required=False),
)
async def replay_dead_letter(job_id: str, request: Request) -> Response:
    """Submit the same request as a new job, without the old output. Idempotent: a repeated call returns the same
    job."""
    raw = await read_body(request)
    if raw:
        require_json(request)
    body = await off_loop(request, parse_model, raw or b"{}", ReplayBody)
    how = Resubmission("replay", is_poison_allowed=body.allow_poison)
    return await _submit_again(job_id, request, how, allowed=frozenset({JobStatus.FAILED}))


@router.post("/v1/jobs/{job_id}/retry", status_code=202, responses={200: {"model": JobView}, 202: {"model": JobView}})
async def retry_job(job_id: str, request: Request) -> Response:
    """Submit a new job that continues the output of one that failed, expired or was cancelled, or starts over if its
    model revision is no longer served. Idempotent: a repeated call returns the same job."""
    return await _submit_again(job_id, request, Resubmission("retry", keeps_output=True), allowed=RETRYABLE)


def _dead_letter_view(found: tuple[Job, Sequence[JobAttempt]]) -> JobView:
    job, attempts = found
    worker = attempts[-1].worker_name if attempts else None
    return {**job_view(JobRecord(job, None, None, worker=worker)), "attempts": attempts_view(job, attempts)}


async def _submit_again(job_id: str, request: Request, how: Resubmission, *, allowed: frozenset[JobStatus]) -> Response:
    services, tenant_id = caller_of(request)
    record = await find_job(services, job_id, tenant_id, with_request=True, with_result=False)
    if record.job.status not in allowed:
        raise JobNotRetryable(
            f"the job is {record.job.status}; {how.verb} is for jobs that are {' or '.join(sorted(allowed))}",
            param="job_id",
        )
    max_queued_jobs = services.settings.max_queued_jobs
    submitted = await resubmit(
        services.submitter,
        record,
        how,
        lambda new_job, keeps_output: services.system_write(  # the new job's turn depends on other tenants
            jobs.retry, new_job, keeps_output, max_queued_jobs=max_queued_jobs
        ),
    )
    view = await view_after_submit(services, tenant_id, submitted, is_waited=how.keeps_output)
    id_ = external_id(submitted.job_id)
    headers = {"location": link(request, f"/v1/jobs/{id_}"), "x-job-id": id_}
    if not submitted.is_new:
        headers["idempotent-replayed"] = "true"
    return answer_job(view, headers, pending_status=202)
