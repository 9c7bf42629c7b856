"""Anthropic's Message Batches: many messages in one request, run when slots are free, with results as JSONL."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

import orjson
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from api.anthropic import ANTHROPIC_REFUSALS
from api.downloads import Download
from api.errors import json_response
from api.inputs import QueryModel, off_loop, query_parameters, read_model, read_query
from api.openai.files import HEADERS, content_of
from api.openai.job_headers import read_job_headers
from api.openapi import request_body
from api.root_path import absolute_link
from api.services import Caller, PrivateRoute, Services, caller_of
from dialects.anthropic_answers import anthropic_page
from dialects.anthropic_batches import (
    URL,
    DeletedMessageBatchView,
    MessageBatchBody,
    MessageBatchCountsView,
    MessageBatchListView,
    MessageBatchResultView,
    MessageBatchView,
    Outcome,
    counts_of,
    custom_ids_of,
    result_of,
    to_lines,
    unanswered,
)
from dialects.openai_views import optional_timestamp, timestamp
from domain.errors import BatchNotFound, InvalidCursor, InvalidRequest
from domain.jobs import BatchStatus, external_id, parse_id_of_other
from observability import traceparent_context
from storage import batches, files
from storage.files import Batch

MAX_BATCH_BYTES = 33_554_432  # per request, which is read as a whole

WINDOW_SECONDS = 86_400

NUM_REQUESTS = "num_requests"  # a key of the batch's metadata: the number is needed before the file is read

router = APIRouter(route_class=PrivateRoute, responses=ANTHROPIC_REFUSALS, tags=["Anthropic"])


class BatchesQuery(QueryModel):
    before_id: str | None = None
    after_id: str | None = None
    limit: int = Field(default=20, ge=1, le=1_000)
    beta: bool | None = None  # sent by the SDK's beta routes


@router.post(
    "/v1/messages/batches",
    responses={200: {"model": MessageBatchView}},
    openapi_extra=request_body(MessageBatchBody),
)
async def create_message_batch(request: Request) -> Response:
    """Every request is checked before this answers. If one is invalid, all are refused."""
    services, tenant_id = caller_of(request)
    body = await read_model(request, MessageBatchBody)
    job_headers = read_job_headers(request.headers)
    content = await off_loop(request, to_lines, body, services.views)
    file_name = f"msgbatch_{hashlib.sha256(content).hexdigest()[:32]}.jsonl"
    if job_headers.num_retries:
        earlier = await services.read(
            batches.find_with_file, tenant_id, file_name=file_name, within_seconds=job_headers.attach_seconds
        )
        if earlier is not None:
            return await _answer(request, earlier)
    batch = await services.write(
        batches.create_with_file,
        tenant_id,
        content,
        file_name=file_name,
        max_bytes=services.settings.max_file_bytes_per_tenant,
        endpoint=URL,
        completion_window="24h",
        window_seconds=WINDOW_SECONDS,
        metadata={NUM_REQUESTS: str(len(body.requests))},
        ttl_seconds=services.settings.file_ttl_seconds,
        key_id=request.state.key_id,
        timeouts=body.timeouts.or_else(job_headers.timeouts),
        traceparent=traceparent_context.get(),
    )
    return await _answer(request, batch)


@router.get(
    "/v1/messages/batches",
    responses={200: {"model": MessageBatchListView}},
    openapi_extra={"parameters": query_parameters(BatchesQuery)},
)
async def list_message_batches(request: Request) -> Response:
    """Newest first. While `has_more`, continue with `after_id` = `last_id`; go back with `before_id` = `first_id`."""
    services, tenant_id = caller_of(request)
    query = read_query(request, BatchesQuery)
    if query.before_id is not None and query.after_id is not None:
        raise InvalidRequest("before_id and after_id are both given; send one of them", param="before_id")
    cursor = query.after_id or query.before_id
    found = await services.read(
        batches.list_batches,
        tenant_id,
        after=None if cursor is None else _parse_cursor(cursor),
        limit=query.limit + 1,
        order="desc" if query.before_id is None else "asc",
        endpoint=URL,
    )
    shown = anthropic_page([await _object(request, batch) for batch in found[: query.limit]], query.limit)
    if query.before_id is not None:
        shown |= {"data": shown["data"][::-1], "first_id": shown["last_id"], "last_id": shown["first_id"]}
    return json_response(shown | {"has_more": len(found) > query.limit})


@router.get("/v1/messages/batches/{message_batch_id}", responses={200: {"model": MessageBatchView}})
async def read_message_batch(message_batch_id: str, request: Request) -> Response:
    return await _answer(request, await _find(caller_of(request), message_batch_id))


@router.post("/v1/messages/batches/{message_batch_id}/cancel", responses={200: {"model": MessageBatchView}})
async def cancel_message_batch(message_batch_id: str, request: Request) -> Response:
    """No more of its requests begin, running ones are stopped, and finished ones can be read. A batch that has ended
    stays as it is."""
    caller = caller_of(request)
    batch = await _find(caller, message_batch_id)
    cancelled = await caller.services.write(batches.cancel, batch.id, caller.tenant_id)
    return await _answer(request, cancelled or batch)


@router.delete("/v1/messages/batches/{message_batch_id}", responses={200: {"model": DeletedMessageBatchView}})
async def delete_message_batch(message_batch_id: str, request: Request) -> Response:
    """Delete the batch with its requests and results. Refused if it has not ended."""
    caller = caller_of(request)
    batch = await _find(caller, message_batch_id)
    if not await caller.services.write(batches.delete_ended, batch.id, caller.tenant_id):
        raise InvalidRequest(
            f"{message_batch_id} has not ended; cancel it, and delete it once it has ended", param="message_batch_id"
        )
    return json_response({"id": external_id(batch.id, "msgbatch"), "type": "message_batch_deleted"})


@router.get(
    "/v1/messages/batches/{message_batch_id}/results",
    response_class=Response,
    responses={200: {"content": {"application/x-jsonl": {"schema": {"type": "string"}}}, "description": "JSONL."}},
)
async def read_message_batch_results(message_batch_id: str, request: Request) -> Response:
    """One line per request, in any order: match them by `custom_id`."""
    caller = caller_of(request)
    caller.services.downloads.refuse_if_full()
    batch = await _find(caller, message_batch_id)
    if not batch.status.is_terminal:
        raise InvalidRequest(
            f"{message_batch_id} has not ended, so it has no results yet; ask again when it has ended",
            param="message_batch_id",
        )
    for file_id in _result_files(batch):
        if await caller.services.read(files.get, file_id, caller.tenant_id) is None:
            raise BatchNotFound(f"the results of {message_batch_id} are no longer kept", param="message_batch_id")
    results = _results(caller.services, batch)
    return Download(results, caller.services.downloads, headers=HEADERS, media_type="application/x-jsonl")


async def _results(services: Services, batch: Batch) -> AsyncIterator[bytes]:
    seen: set[str] = set()
    for file_id in _result_files(batch):
        async for lines in _lines_of(services, file_id):
            results = await asyncio.to_thread(_translated, lines)
            seen.update(result["custom_id"] for result in results)
            yield b"".join(orjson.dumps(result) + b"\n" for result in results)
    if len(seen) == _num_requests(batch):
        return
    async for lines in _lines_of(services, batch.input_file_id):
        for custom_id in custom_ids_of(lines):
            if custom_id not in seen:
                yield orjson.dumps({"custom_id": custom_id, "result": unanswered(_outcome_of_rest(batch))}) + b"\n"


def _translated(lines: Sequence[bytes]) -> list[MessageBatchResultView]:
    return [result_of(line) for line in lines]


async def _lines_of(services: Services, file_id: UUID) -> AsyncIterator[list[bytes]]:
    """The lines of a file in groups, without empty ones."""
    rest = b""
    async for piece in content_of(services, file_id):
        *lines, rest = (rest + piece).split(b"\n")
        yield [line for line in lines if line]
    if rest:
        yield [rest]


def _result_files(batch: Batch) -> list[UUID]:
    return [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id is not None]


def _num_requests(batch: Batch) -> int:
    return int(batch.batch_metadata.get(NUM_REQUESTS) or batch.num_lines)


def _outcome_of_rest(batch: Batch) -> Outcome:
    """The outcome of the requests that the ended batch never reached."""
    if batch.status is BatchStatus.CANCELLED:
        return "canceled"
    return "expired" if batch.status is BatchStatus.EXPIRED else "errored"


async def _counts(services: Services, batch: Batch) -> MessageBatchCountsView:
    num_requests = _num_requests(batch)
    if not batch.status.is_terminal:
        return counts_of([], num_processing=num_requests)
    outcomes: list[str] = ["succeeded"] * batch.num_completed
    if batch.error_file_id is not None:
        async for lines in _lines_of(services, batch.error_file_id):
            outcomes += [result["result"]["type"] for result in await asyncio.to_thread(_translated, lines)]
    outcomes += [_outcome_of_rest(batch)] * (num_requests - len(outcomes))
    return counts_of(outcomes)


async def _object(request: Request, batch: Batch) -> MessageBatchView:
    services, _ = caller_of(request)
    id_ = external_id(batch.id, "msgbatch")
    is_ended = batch.status.is_terminal
    is_canceling = batch.cancelling_at is not None
    ends = (batch.completed_at, batch.failed_at, batch.cancelled_at, batch.expired_at)
    return {
        "id": id_,
        "type": "message_batch",
        "processing_status": "ended" if is_ended else "canceling" if is_canceling else "in_progress",
        "request_counts": await _counts(services, batch),
        "created_at": timestamp(batch.created_at),
        "expires_at": timestamp(batch.expires_at),
        "ended_at": optional_timestamp(next((end for end in ends if end is not None), None) if is_ended else None),
        "cancel_initiated_at": optional_timestamp(batch.cancelling_at),
        "archived_at": None,
        "results_url": absolute_link(request, f"/v1/messages/batches/{id_}/results") if is_ended else None,
    }


async def _answer(request: Request, batch: Batch) -> Response:
    headers = {} if batch.status.is_terminal else {"retry-after": "2"}
    return json_response(await _object(request, batch), headers=headers)


async def _find(caller: Caller, message_batch_id: str) -> Batch:
    """Raises BatchNotFound, also for a batch of another tenant or for another route."""
    try:
        batch = await caller.services.read(
            batches.get, parse_id_of_other(message_batch_id, "msgbatch"), caller.tenant_id
        )
    except ValueError:
        batch = None
    if batch is None or batch.endpoint != URL:
        raise BatchNotFound(f"there is no batch {message_batch_id[:64]!r}; check the id", param="message_batch_id")
    return batch


def _parse_cursor(cursor: str) -> UUID:
    try:
        return parse_id_of_other(cursor, "msgbatch")
    except ValueError as exc:
        raise InvalidCursor(f"{exc}; send the first_id or last_id of a page", param="after_id") from None
