"""Chat completions that were asked for with store=true: listed, read, labelled and deleted while their jobs are kept.

What is not completed is no completion yet, so it is not found here; `/v1/jobs` has it.
"""

from typing import Any, Literal
from uuid import UUID

import orjson
from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from api.bodies import read_model
from api.deps import Caller, caller_of, private_router
from api.job_inputs import page_cursor
from api.job_schemas import NO_NUL
from api.openai.chat_output import from_result
from api.openai.schemas import Metadata, OpenAIModel
from api.openai.views import ChatCompletionListView, ChatCompletionView, StoredMessageListView
from api.openapi import request_body
from api.queries import QueryModel, query_parameters, read_query
from api.services import Services
from api.views import DeletedView, page
from domain.errors import InvalidCursor, JobNotFound, ModelNotFound
from domain.ids import external_id, parse_id
from domain.jobs import Endpoint, JobStatus
from domain.requests import ChatMessage, GenerationRequest
from storage import endpoint_jobs, job_queries, jobs
from storage.job_queries import JobRecord
from tasks.output_formats import OutputFormat

router = private_router()


class PageQuery(QueryModel):
    after: str | None = None
    limit: int = Field(default=20, ge=1, le=100)
    order: Literal["asc", "desc"] = "asc"


class ChatListQuery(PageQuery):
    model: str | None = Field(default=None, max_length=256, pattern=NO_NUL)
    metadata: Metadata = Field(default_factory=dict, max_length=16)


class MetadataBody(OpenAIModel):
    metadata: Metadata | None


@router.get(
    "/v1/chat/completions",
    responses={200: {"model": ChatCompletionListView}},
    openapi_extra={"parameters": query_parameters(ChatListQuery)},
)
async def list_chat_completions(request: Request) -> Response:
    services, tenant_id = caller_of(request)
    query = read_query(request, ChatListQuery)
    records = await services.read(
        endpoint_jobs.list_stored,
        tenant_id,
        Endpoint.CHAT,
        model=query.model,
        metadata=query.metadata,
        after=page_cursor(query.after),
        limit=query.limit + 1,
        order=query.order,
    )
    completions = [stored_completion(services, record) for record in records]
    return _json(page(completions, query.limit))


@router.get("/v1/chat/completions/{completion_id}", responses={200: {"model": ChatCompletionView}})
async def read_chat_completion(completion_id: str, request: Request) -> Response:
    caller = caller_of(request)
    return _json(stored_completion(caller.services, await _find(caller, completion_id)))


@router.post(
    "/v1/chat/completions/{completion_id}",
    responses={200: {"model": ChatCompletionView}},
    openapi_extra=request_body(MetadataBody),
)
async def update_chat_completion(completion_id: str, request: Request) -> Response:
    """Replaces the metadata, which is all that may change."""
    caller = caller_of(request)
    body = await read_model(request, MetadataBody)
    record = await _find(caller, completion_id)
    await caller.services.write(endpoint_jobs.set_metadata, record.job.id, caller.tenant_id, body.metadata or {})
    return _json(stored_completion(caller.services, await _find(caller, completion_id)))


@router.delete("/v1/chat/completions/{completion_id}", responses={200: {"model": DeletedView}})
async def delete_chat_completion(completion_id: str, request: Request) -> Response:
    """Erases the job, input and output with it."""
    caller = caller_of(request)
    record = await _find(caller, completion_id)
    await caller.services.write(jobs.delete, record.job.id, caller.tenant_id)
    name = external_id(record.job.id, "chatcmpl")
    return _json({"id": name, "object": "chat.completion.deleted", "deleted": True})


@router.get(
    "/v1/chat/completions/{completion_id}/messages",
    responses={200: {"model": StoredMessageListView}},
    openapi_extra={"parameters": query_parameters(PageQuery)},
)
async def list_messages(completion_id: str, request: Request) -> Response:
    """The messages that were sent. Their ids are the completion's with their place."""
    query = read_query(request, PageQuery)
    record = await _find(caller_of(request), completion_id)
    assert isinstance(record.request, GenerationRequest)
    prefix = external_id(record.job.id, "chatcmpl")
    messages = [
        _message_object(f"{prefix}-{number}", message) for number, message in enumerate(record.request.messages or ())
    ]
    ordered = messages if query.order == "asc" else messages[::-1]
    return _json(page(ordered[_place_behind(query.after, ordered) :], query.limit))


def stored_completion(services: Services, record: JobRecord) -> dict[str, object]:
    assert isinstance(record.request, GenerationRequest)
    try:
        format = services.views.output_format(record.job.model)
    except ModelNotFound:
        format = OutputFormat()  # the model is not served any more, but its text is here
    return from_result(record, record.request, format) | {"metadata": record.job.job_metadata}


async def _find(caller: Caller, completion_id: str) -> JobRecord:
    """Raises JobNotFound, the same for what was not stored, is not completed, or is another tenant's."""
    record = await _read(caller, completion_id)
    if record is None or not _is_stored_chat(record):
        raise JobNotFound(
            f"there is no stored chat completion {completion_id[:64]!r}; only those with store=true are kept here",
            param="completion_id",
        )
    return record


async def _read(caller: Caller, completion_id: str) -> JobRecord | None:
    try:
        job_id: UUID = parse_id(completion_id)
    except ValueError:
        return None
    return await caller.services.read(job_queries.get, job_id, caller.tenant_id, with_request=True)


def _is_stored_chat(record: JobRecord) -> bool:
    job = record.job
    return job.is_stored and job.endpoint is Endpoint.CHAT and job.status is JobStatus.COMPLETED


def _message_object(id_: str, message: ChatMessage) -> dict[str, object]:
    plain: dict[str, Any] = {"id": id_, "role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return plain | {name: value for name, value in optional.items() if value is not None}


def _place_behind(after: str | None, messages: list[dict[str, object]]) -> int:
    if after is None:
        return 0
    for place, message in enumerate(messages, start=1):
        if message["id"] == after:
            return place
    raise InvalidCursor(f"after is {after[:64]!r}, which is no message here; send the last_id of the page before")


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
