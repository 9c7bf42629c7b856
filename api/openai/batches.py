"""/v1/batches: run a file of requests with the lowest priority; the answers are written to a file."""

import re
from datetime import datetime
from typing import Annotated, Literal, cast
from uuid import UUID

from pydantic import Field, StringConstraints
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import PageQuery, list_page, listing, read_model, read_query
from api.openai.files import MAX_TTL_SECONDS, MIN_TTL_SECONDS, parse_file_id, refuse_odd_ttl
from api.openai.job_headers import read_job_headers
from api.openapi import ERROR, request_body
from api.services import caller_of, private_router
from dialects.openai import Metadata, OpenAIModel, TimeoutFields
from dialects.openai_batches import ROUTES
from dialects.openai_views import InputTokensDetailsView, OutputTokensDetailsView, PageView, View
from domain.errors import BatchNotFound, InvalidRequest
from domain.jobs import BatchErrors, BatchStatus, external_id, parse_id_of_other
from observability import request_id_context, traceparent_context
from storage import batch_waits, batches
from storage.batch_waits import ToldBatch
from storage.files import Batch

router = private_router("OpenAI")

MAX_WINDOW_HOURS = 7 * 24
ENDED_BEFORE_CANCEL = frozenset({BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED})


class ExpiresAfter(OpenAIModel):
    anchor: Literal["created_at"]
    seconds: int = Field(json_schema_extra={"minimum": MIN_TTL_SECONDS, "maximum": MAX_TTL_SECONDS})


class BatchBody(TimeoutFields):
    input_file_id: Annotated[str, StringConstraints(max_length=128)]
    endpoint: Annotated[str, StringConstraints(max_length=128)] = Field(json_schema_extra={"enum": list(ROUTES)})
    completion_window: Annotated[str, StringConstraints(max_length=16)] = Field(
        description="1h to 7d, such as 24h.", json_schema_extra={"pattern": "^([1-9][0-9]?h|[1-7]d)$"}
    )
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchErrorView(View):
    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrorListView(View):
    object: Literal["list"]
    data: list[BatchErrorView]


class RequestCountsView(View):
    total: int
    completed: int
    failed: int


class BatchUsageView(View):
    input_tokens: int
    input_tokens_details: InputTokensDetailsView
    output_tokens: int
    output_tokens_details: OutputTokensDetailsView
    total_tokens: int


class BatchWaitView(View):
    code: Annotated[str, Field(description="That with which a request would be refused.")]
    message: str
    until: int


class BatchView(View):
    """All times are seconds since 1970."""

    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrorListView | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCountsView
    usage: BatchUsageView
    metadata: dict[str, str] | None
    waiting_for: Annotated[
        BatchWaitView | None, Field(description="An extension: why lines wait, if a budget of tokens is spent.")
    ]


class BatchListView(PageView):
    data: list[BatchView]


@router.post(
    "/v1/batches",
    responses={200: {"model": BatchView}},
    openapi_extra=request_body(BatchBody),
)
async def create_batch(request: Request) -> Response:
    """Create a batch. Its file is validated afterwards: problems are listed in the batch's `errors`, with line
    numbers."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, BatchBody)
    job_headers = read_job_headers(request.headers)
    input_file_id = parse_file_id(body.input_file_id, "input_file_id")
    endpoint, window_seconds = (_endpoint(body.endpoint), _window_seconds(body.completion_window))
    ttl_seconds = services.settings.file_ttl_seconds
    if body.output_expires_after is not None:
        ttl_seconds = refuse_odd_ttl(body.output_expires_after.seconds, "output_expires_after.seconds")
    if job_headers.num_retries:
        earlier = await services.read(
            batches.find_again,
            tenant_id,
            input_file_id=input_file_id,
            endpoint=endpoint,
            within_seconds=job_headers.attach_seconds,
        )
        if earlier is not None:
            return _answer(ToldBatch(earlier))
    batch = await services.write(
        batches.create,
        tenant_id,
        input_file_id=input_file_id,
        endpoint=endpoint,
        completion_window=body.completion_window,
        window_seconds=window_seconds,
        metadata=body.metadata or {},
        output_ttl_seconds=ttl_seconds,
        key_id=request.state.key_id,
        timeouts=body.timeouts.or_else(job_headers.timeouts),
        traceparent=traceparent_context.get(),
    )
    return _answer(ToldBatch(batch))


@router.get("/v1/batches", **listing(BatchListView, PageQuery))
async def list_batches(request: Request) -> Response:
    """The tenant's batches, newest first. For the next page send `after` = `last_id`."""
    query = read_query(request, PageQuery)
    return await list_page(request, query, batch_waits.list_batches, batch_object, prefix="batch")


@router.get("/v1/batches/{batch_id}", responses={200: {"model": BatchView}})
async def read_batch(batch_id: str, request: Request) -> Response:
    services, tenant_id = caller_of(request)
    told = await services.read(batch_waits.get, _parse_batch_id(batch_id), tenant_id)
    if told is None:
        raise _not_found(batch_id)
    return _answer(told)


@router.post(
    "/v1/batches/{batch_id}/cancel",
    responses={200: {"model": BatchView}, 409: {"description": "It has ended.", **ERROR}},
)
async def cancel_batch(batch_id: str, request: Request) -> Response:
    """No further lines are started, running ones are stopped, and finished ones stay readable. Repeating it changes
    nothing. 409 if the batch has already completed, failed or expired."""
    services, tenant_id = caller_of(request)
    batch = await services.write(batches.cancel, _parse_batch_id(batch_id), tenant_id)
    if batch is None:
        raise _not_found(batch_id)
    return _answer(ToldBatch(batch)) if batch.status not in ENDED_BEFORE_CANCEL else _too_late(batch)


def _too_late(batch: Batch) -> Response:
    """The only 409 in this API, as OpenAI's answer is one. Clients retry a 409, so a header tells them not to."""
    message = f"Cannot cancel a batch with status '{batch.status.value}'."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "batch_not_cancellable"}
    body = {"error": error, "request_id": request_id_context.get()}
    return json_response(body, 409, {"x-should-retry": "false"})


def batch_object(told: ToldBatch) -> BatchView:
    batch, wait = told.batch, told.wait
    return {
        "id": external_id(batch.id, "batch"),
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": _errors(batch.errors),
        "input_file_id": external_id(batch.input_file_id, "file"),
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": _file_id(batch.output_file_id),
        "error_file_id": _file_id(batch.error_file_id),
        "created_at": int(batch.created_at.timestamp()),
        "expires_at": int(batch.expires_at.timestamp()),
        "in_progress_at": _seconds(batch.in_progress_at),
        "finalizing_at": _seconds(batch.finalizing_at),
        "completed_at": _seconds(batch.completed_at),
        "failed_at": _seconds(batch.failed_at),
        "expired_at": _seconds(batch.expired_at),
        "cancelling_at": _seconds(batch.cancelling_at),
        "cancelled_at": _seconds(batch.cancelled_at),
        "request_counts": {"total": batch.num_lines, "completed": batch.num_completed, "failed": batch.num_failed},
        "usage": _usage(batch),
        "metadata": batch.batch_metadata or None,
        "waiting_for": None
        if wait is None
        else {"code": wait.code, "message": wait.message, "until": int(wait.until.timestamp())},
    }


def _usage(batch: Batch) -> BatchUsageView:
    return {
        "input_tokens": batch.prompt_tokens,
        "input_tokens_details": {"cached_tokens": batch.cached_tokens},
        "output_tokens": batch.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": batch.prompt_tokens + batch.completion_tokens,
    }


def _errors(errors: BatchErrors | None) -> BatchErrorListView | None:
    if errors is None or not errors.data:
        return None
    return {"object": "list", "data": [cast(BatchErrorView, error.model_dump()) for error in errors.data]}


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _file_id(id_: UUID | None) -> str | None:
    return None if id_ is None else external_id(id_, "file")


def _answer(told: ToldBatch) -> Response:
    headers = {} if told.batch.status.is_terminal else {"retry-after": "2", "openai-poll-after-ms": "2000"}
    return json_response(batch_object(told), headers=headers)


def _endpoint(endpoint: str) -> str:
    if endpoint not in ROUTES:
        raise InvalidRequest(f"endpoint is {endpoint[:64]!r}; send one of: {', '.join(ROUTES)}", param="endpoint")
    return endpoint


def _window_seconds(window: str) -> int:
    match = re.fullmatch(r"(\d{1,3})([hd])", window)
    hours = int(match[1]) * (24 if match[2] == "d" else 1) if match else 0
    if not 1 <= hours <= MAX_WINDOW_HOURS:
        raise InvalidRequest(f"completion_window is {window!r}; send 1h to 7d, such as 24h", param="completion_window")
    return hours * 3_600


def _parse_batch_id(batch_id: str) -> UUID:
    try:
        return parse_id_of_other(batch_id, "batch")
    except ValueError:
        raise _not_found(batch_id) from None


def _not_found(batch_id: str) -> BatchNotFound:
    return BatchNotFound(f"there is no batch {batch_id[:64]!r}; check the id", param="batch_id")
