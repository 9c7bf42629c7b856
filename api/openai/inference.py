"""/v1/chat/completions, /v1/completions and /v1/embeddings, stored chat completions, and /v1/models.

Chat completions created with store=true can be listed, read, updated and deleted while their jobs are kept. A job that
is not completed is not a chat completion yet, so it is found under /v1/jobs only.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal
from uuid import UUID

from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import (
    PageQuery,
    list_page,
    listing,
    off_loop,
    read_body,
    read_for_model,
    read_generation,
    read_model,
    read_query,
    require_json,
)
from api.openai.answers import WholeAnswer, stream_answer, stream_answers
from api.openai.running import Asked, start, start_all
from api.openapi import request_body, streamed_or
from api.services import Caller, Services, caller_of, private_router, services_of
from dialects.anthropic_answers import AnthropicModelListView, AnthropicModelView, anthropic_page, model_object
from dialects.fields import HINT_TREE
from dialects.native import NO_NUL
from dialects.openai import Metadata, OpenAIModel
from dialects.openai_chat import (
    ChatCompletionBody,
    ChatStream,
    asked_ids,
    from_result,
    spelling_of,
    to_generation_request,
)
from dialects.openai_completions import (
    CompletionBody,
    CompletionStream,
    Prompt,
    from_results,
    prompt_of,
    to_generation_requests,
    usage_chunk,
)
from dialects.openai_embeddings import (
    EmbeddingBody,
    EmbeddingListView,
    embeddings_from_result,
    spelling_of_embeddings,
    to_embedding_request,
)
from dialects.openai_views import (
    ChatCompletionListView,
    ChatCompletionView,
    CompletionView,
    DeletedView,
    ModelCardView,
    ModelListView,
    StoredChatCompletionView,
    StoredMessageListView,
    StoredMessageView,
    page,
)
from domain.errors import JobNotFound, ModelNotFound
from domain.jobs import Endpoint, JobStatus, external_id, parse_id
from domain.model_names import parse_model_name
from domain.requests import ChatMessage, GenerationRequest
from storage import job_queries, jobs
from storage.job_queries import JobRecord
from text.models import ModelView
from text.outputs import OutputFormat

router = private_router("OpenAI")


@router.post(
    "/v1/chat/completions",
    responses=streamed_or(ChatCompletionView),
    openapi_extra=request_body(ChatCompletionBody),
)
async def create_chat_completion(request: Request) -> Response:
    """A chat completion like OpenAI's. It is a job like any other: the `x-job-id` header has its id for /v1/jobs."""
    require_json(request)
    content = await read_body(request)
    read = await read_generation(request, content, ChatCompletionBody, to_generation_request, HINT_TREE)
    body, generation, view = read.body, read.generation, read.view
    run = await start(request, generation, _asked(body))
    if run.record is not None:
        run.services.known_bodies.note(read)
    ids = await off_loop(request, asked_ids, body, generation, view)
    if not body.stream:
        return WholeAnswer(
            [run],
            lambda records: from_result(records[0], generation, view.output_format, body.service_tier, ids),
            needs_token_ids=bool(body.return_token_ids),
        )
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    stream = ChatStream(
        run, generation, view.output_format, has_usage=has_usage, service_tier=body.service_tier, ids=ids
    )
    return stream_answer(run, stream)


def _asked(body: ChatCompletionBody) -> Asked:
    return Asked(
        endpoint=Endpoint.CHAT,
        has_stream=bool(body.stream),
        is_stored=bool(body.store),
        service_tier=body.service_tier,
        metadata=body.metadata,
        spelling=spelling_of(body),
        use_cache=body.use_cache,
        timeouts=body.timeouts,
    )


@router.post(
    "/v1/completions",
    responses=streamed_or(CompletionView),
    openapi_extra=request_body(CompletionBody),
)
async def create_completion(request: Request) -> Response:
    """A completion like OpenAI's. Each prompt has `n` consecutive choices: choice `i * n + j` is answer `j` to prompt
    `i`."""
    require_json(request)
    content = await read_body(request)
    read = await read_generation(request, content, CompletionBody, lambda b, _: to_generation_requests(b), HINT_TREE)
    body, generations, view = read.body, read.generation, read.view
    runs = await start_all(request, generations, _asked_completion(body))
    if all(run.record is not None for run in runs):
        runs[0].services.known_bodies.note(read)
    prompts = await off_loop(request, _prompts_of, body, generations, view)
    if not body.stream:
        return WholeAnswer(
            runs,
            lambda records: from_results(records, prompts, body.service_tier),
            needs_token_ids=bool(body.return_token_ids),
        )
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    streams = [
        CompletionStream(runs[0], prompt, has_usage=has_usage, service_tier=body.service_tier) for prompt in prompts
    ]
    return stream_answers(runs, streams, lambda records: usage_chunk(records, body.service_tier) if has_usage else ())


def _prompts_of(body: CompletionBody, generations: Sequence[GenerationRequest], view: ModelView) -> list[Prompt]:
    return [prompt_of(body, generation, view, number) for number, generation in enumerate(generations)]


def _asked_completion(body: CompletionBody) -> Asked:
    return Asked(
        endpoint=Endpoint.COMPLETIONS,
        has_stream=bool(body.stream),
        service_tier=body.service_tier,
        metadata=body.metadata,
        use_cache=body.use_cache,
        timeouts=body.timeouts,
    )


@router.post(
    "/v1/embeddings",
    responses={200: {"model": EmbeddingListView}},
    openapi_extra=request_body(EmbeddingBody),
)
async def create_embeddings(request: Request) -> Response:
    """Embeddings like OpenAI's. They are a job like any other: the `x-job-id` header has its id for /v1/jobs."""
    body = await read_for_model(request, EmbeddingBody, HINT_TREE, task="embedding")
    view = services_of(request).views.get(body.model)
    asked = Asked(
        endpoint=Endpoint.EMBEDDINGS, has_stream=False, spelling=spelling_of_embeddings(body), timeouts=body.timeouts
    )
    run = await start(request, await off_loop(request, to_embedding_request, body, view), asked)
    return WholeAnswer([run], lambda records: embeddings_from_result(records[0], body))


class MessagesQuery(PageQuery):
    order: Literal["asc", "desc"] = "asc"


class ChatListQuery(MessagesQuery):
    model: str | None = Field(default=None, max_length=256, pattern=NO_NUL)
    metadata: Metadata = Field(default_factory=dict, max_length=16)


class MetadataBody(OpenAIModel):
    metadata: Metadata | None


@router.get("/v1/chat/completions", **listing(ChatCompletionListView, ChatListQuery))
async def list_chat_completions(request: Request) -> Response:
    query = read_query(request, ChatListQuery)
    return await list_page(
        request,
        query,
        job_queries.list_stored,
        partial(stored_completion, services_of(request)),
        endpoint=Endpoint.CHAT,
        model=query.model,
        metadata=query.metadata,
        order=query.order,
    )


@router.get("/v1/chat/completions/{completion_id}", responses={200: {"model": StoredChatCompletionView}})
async def read_chat_completion(completion_id: str, request: Request) -> Response:
    caller = caller_of(request)
    return json_response(stored_completion(caller.services, await _find(caller, completion_id)))


@router.post(
    "/v1/chat/completions/{completion_id}",
    responses={200: {"model": StoredChatCompletionView}},
    openapi_extra=request_body(MetadataBody),
)
async def update_chat_completion(completion_id: str, request: Request) -> Response:
    """Replace the metadata, which is all that can be changed."""
    caller = caller_of(request)
    body = await read_model(request, MetadataBody)
    record = await _find(caller, completion_id)
    await caller.services.write(job_queries.set_metadata, record.job.id, caller.tenant_id, body.metadata or {})
    return json_response(stored_completion(caller.services, await _find(caller, completion_id)))


@router.delete("/v1/chat/completions/{completion_id}", responses={200: {"model": DeletedView}})
async def delete_chat_completion(completion_id: str, request: Request) -> Response:
    """Erase the job with its input and output."""
    caller = caller_of(request)
    record = await _find(caller, completion_id)
    await caller.services.write(jobs.delete, record.job.id, caller.tenant_id)
    name = external_id(record.job.id, "chatcmpl")
    return json_response({"id": name, "object": "chat.completion.deleted", "deleted": True})


@router.get("/v1/chat/completions/{completion_id}/messages", **listing(StoredMessageListView, MessagesQuery))
async def list_messages(completion_id: str, request: Request) -> Response:
    """The messages of the request. Their ids are the completion's id with a number from 0."""
    query = read_query(request, MessagesQuery)
    record = await _find(caller_of(request), completion_id)
    assert isinstance(record.request, GenerationRequest)
    prefix = external_id(record.job.id, "chatcmpl")
    messages = [
        _message_object(f"{prefix}-{number}", message) for number, message in enumerate(record.request.messages or ())
    ]
    ordered = messages if query.order == "asc" else messages[::-1]
    return json_response(page(query.items_after(ordered), query.limit))


def stored_completion(services: Services, record: JobRecord) -> StoredChatCompletionView:
    assert isinstance(record.request, GenerationRequest)
    try:
        format = services.views.output_format(record.job.model)
    except ModelNotFound:
        format = OutputFormat()  # the model is no longer served; its output is still readable as text
    return {**from_result(record, record.request, format), "metadata": record.job.job_metadata}


async def _find(caller: Caller, completion_id: str) -> JobRecord:
    """Raises JobNotFound, with the same message for a job that is unknown, not stored, not completed, or of another
    tenant."""
    record = await _read(caller, completion_id)
    if record is None or not _is_stored_chat(record):
        raise JobNotFound(
            f"there is no stored chat completion {completion_id[:64]!r}; only completed ones with store=true are kept",
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


def _message_object(id_: str, message: ChatMessage) -> StoredMessageView:
    view: StoredMessageView = {"id": id_, "role": message.role, "content": message.content}
    if message.tool_calls:
        view["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.name is not None:
        view["name"] = message.name
    if message.tool_call_id is not None:
        view["tool_call_id"] = message.tool_call_id
    return view


@router.get("/v1/models", responses={200: {"model": ModelListView | AnthropicModelListView}})
async def list_models(request: Request) -> Response:
    services, _ = caller_of(request)
    catalog = services.catalog
    names = [name for entry in catalog for name in entry.names]
    models = [_model_object(services, name) for name in dict.fromkeys([*names, *catalog.unavailable])]
    if "anthropic-version" in request.headers:
        return json_response(anthropic_page([model_object(model) for model in models], len(models)))
    return json_response({"object": "list", "data": models})


@router.get("/v1/models/{model:path}", responses={200: {"model": ModelCardView | AnthropicModelView}})
async def get_model(model: str, request: Request) -> Response:
    """A slash in the model's name may be percent-encoded, as the SDKs do, or not. `base:adapter` is an adapter."""
    services, _ = caller_of(request)
    if not model:
        raise HTTPException(404)
    if model not in services.catalog.unavailable:
        services.catalog.get(model)
    card = _model_object(services, model)
    return json_response(model_object(card) if "anthropic-version" in request.headers else card)


def _model_object(services: Services, name: str) -> ModelCardView:
    model, adapter = parse_model_name(name)
    reason = services.catalog.unavailable.get(model)
    return {
        "id": name,
        "object": "model",
        "created": _created(services),
        "owned_by": "celeriac",
        "max_model_len": services.views.get(model).max_model_len if reason is None else None,
        "loaded": _is_loaded(services, model) if reason is None else False,
        "load_percent": queue.load_percent if (queue := services.monitor.queues.get(model)) else None,
        "unavailable": reason,
        "parent": None if adapter is None else model,
        "task": services.catalog.get(model).task if reason is None else None,
    }


def _created(services: Services) -> int:
    """The modification time of the models file, as the age of a model itself is not known; 0 if there is no such
    file."""
    try:
        return int(services.settings.models_file.stat().st_mtime)
    except OSError:
        return 0


def _is_loaded(services: Services, model: str) -> bool | None:
    """From the queue figures, so that it costs no query; None while they are not known."""
    queue = services.monitor.queues.get(model)
    return None if queue is None else queue.num_workers > 0  # a worker is counted once it has loaded its model
