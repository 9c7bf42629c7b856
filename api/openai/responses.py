"""/v1/responses: create, stream, read, continue, cancel and delete responses."""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from pydantic import Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.inputs import (
    PageQuery,
    QueryModel,
    known_body,
    listing,
    noted_fields,
    off_loop,
    query_parameters,
    read_body,
    read_for_model,
    read_query,
    require_json,
)
from api.known_bodies import Key, ReadBody
from api.openai.answers import WholeAnswer
from api.openai.conversation_turns import accept_in, context_in, end_turn_of
from api.openai.item_references import with_referenced_items
from api.openai.response_records import (
    as_it_ended,
    as_it_stands,
    body_of,
    conversation_of,
    find_response,
    parser_for,
)
from api.openai.response_streams import ResponseStream, error_event
from api.openai.running import Asked, Run, start
from api.openapi import request_body, streamed_or
from api.services import Services, caller_of, private_router
from api.sse import (
    ABANDONED,
    EventStream,
    frame,
)
from dialects.bodies import parse_model, with_body_names
from dialects.errors import refuse_unfinished
from dialects.fields import HINT_TREE
from dialects.openai_compaction import CompactBody
from dialects.openai_response_items import CompactionItem, ReferableItem, listed_items, with_summaries
from dialects.openai_response_objects import InputItemListView, InputTokensView, ResponseView, ending_of
from dialects.openai_response_requests import (
    ContextBody,
    Includable,
    InputTokensBody,
    ResponseBody,
    spelling_of,
    to_generation_request,
)
from dialects.openai_views import DeletedView, page
from domain.errors import CeleriacError, InvalidRequest
from domain.job_options import ConversationTurn
from domain.jobs import Endpoint, JobStatus, external_id
from domain.requests import GenerationRequest
from storage import jobs, tenants
from storage.job_queries import JobRecord

CANCEL_SECONDS = 2.0  # longer than a step; if the worker was lost, cancelling takes longer than this

POLL_HEADERS = {"retry-after": "1", "openai-poll-after-ms": "1000"}

Included = list[Includable]

router = private_router("OpenAI")


class ResponseIdConvertor(StringConvertor):
    """Excludes /v1/responses/input_tokens and /v1/responses/compact, which are not responses: they have their own
    routes, and other methods get a 405."""

    regex = "(?!(?:input_tokens|compact)$)[^/]+"


register_url_convertor("response_id", ResponseIdConvertor())


class RetrieveQuery(QueryModel):
    stream: bool = False
    starting_after: Annotated[int, Field(ge=-1, le=2**53)] = -1
    include_obfuscation: bool | None = None  # accepted and ignored
    include: Included | None = None  # ignored: the request that created the response decides


class ItemsQuery(PageQuery):
    order: Literal["asc", "desc"] = "desc"
    include: Included | None = None


@router.post(
    "/v1/responses",
    responses=streamed_or(ResponseView),
    openapi_extra=request_body(ResponseBody),
)
async def create_response(request: Request) -> Response:
    """A response like OpenAI's. It is a job like any other. If it is stored or in the background, it continues when its
    client disconnects, and can be read by its id."""
    require_json(request)
    content = await read_body(request)
    services, _ = caller_of(request)
    known, key = known_body(request, content, ResponseBody)
    if known is None:
        body = await off_loop(request, parse_model, content, ResponseBody, HINT_TREE, default_model=key.default_model)
        run = await start_response(request, _refuse_unreadable(body), key=key)
    else:
        body = known.body
        run = await start(request, known.generation, _asked(services, body, None))
    if not (body.stream or body.background):
        return WholeAnswer([run], lambda records: as_it_ended(services, records[0]), refuse=_refuse_without_answer)
    record = await run.read(with_request=True)
    if body.stream:
        return _stream(services, record, run=run)
    return _answer(await as_it_stands(services, record), run.headers)


def _refuse_unreadable(body: ResponseBody) -> ResponseBody:
    if body.background and not body.is_stored:
        raise InvalidRequest(
            "background is true but store is false, so the answer could never be read; change one of them",
            param="store",
        )
    return body


async def start_response(
    request: Request, body: ResponseBody, *, passing: Collection[UUID] = (), key: Key | None = None
) -> Run:
    """Returns once its job is committed. The response may continue those of the jobs `passing`, although they are not
    stored. By its `key`, a body that refers to nothing else is known if its answer was. Raises CeleriacError."""
    services, tenant_id = caller_of(request)
    whole = await with_referenced_items(request, body, passing)
    view = services.views.get(whole.model)
    generation, turn = await _generation(request, whole, passing)
    run = await start(request, generation, _asked(services, whole, turn))
    if run.record is not None and key is not None and body.is_self_contained:
        services.known_bodies.note(ReadBody(tenant_id, key, body, generation, view, noted_fields()))
    return run


@router.post(
    "/v1/responses/input_tokens",
    responses={200: {"model": InputTokensView}},
    openapi_extra=request_body(InputTokensBody),
)
async def count_input_tokens(request: Request) -> Response:
    """Count the tokens of the prompt that a response with this body would have."""
    services, _ = caller_of(request)
    counted = await read_for_model(request, InputTokensBody, HINT_TREE)
    body = await with_referenced_items(request, await off_loop(request, _counted_as_response, counted))
    generation, _ = await _generation(request, body)
    try:
        num_tokens = await services.submitter.count_prompt_tokens(generation)
    except CeleriacError as exc:
        raise with_body_names(exc, spelling_of(body)) from None
    return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})


@router.get(
    "/v1/responses/{response_id:response_id}",
    responses=streamed_or(ResponseView),
    openapi_extra={"parameters": query_parameters(RetrieveQuery)},
)
async def read_response(response_id: str, request: Request) -> Response:
    """The response in its current state or, with `stream=true`, its events from the start or after `starting_after`."""
    services, tenant_id = caller_of(request)
    query = read_query(request, RetrieveQuery)
    record = await find_response(services, tenant_id, response_id)
    if query.stream:
        services.slots.refuse_if_full()
        return _stream(services, record, starting_after=query.starting_after)
    return _answer(await as_it_stands(services, record), {"x-job-id": external_id(record.job.id)})


@router.post("/v1/responses/{response_id}/cancel", responses={200: {"model": ResponseView}})
async def cancel_response(response_id: str, request: Request) -> Response:
    """Stop a background response. Waits for it, usually for less than a step; the text so far is kept. A response that
    has ended is returned unchanged."""
    services, tenant_id = caller_of(request)
    record = await find_response(services, tenant_id, response_id)
    if not body_of(record).background:
        raise InvalidRequest(
            "only responses created with background=true can be cancelled; close the connection instead",
            param="response_id",
        )
    if await services.cancel(record.job.id, tenant_id) is JobStatus.IN_PROGRESS:
        await services.wait_for_end(record.job.id, CANCEL_SECONDS)
    record = await find_response(services, tenant_id, response_id)
    return _answer(await as_it_stands(services, record), {"x-job-id": external_id(record.job.id)})


@router.delete("/v1/responses/{response_id:response_id}", responses={200: {"model": DeletedView}})
async def delete_response(response_id: str, request: Request) -> Response:
    """Erase the response with its input. One that is not finished is stopped."""
    services, tenant_id = caller_of(request)
    record = await find_response(services, tenant_id, response_id)
    await services.cancel(record.job.id, tenant_id)
    await end_turn_of(services, tenant_id, record.job.id)
    await services.write(jobs.delete, record.job.id, tenant_id)
    return json_response({"id": external_id(record.job.id, "resp"), "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items", **listing(InputItemListView, ItemsQuery))
async def list_input_items(response_id: str, request: Request) -> Response:
    """The items of the request's `input`, without those of earlier responses in the conversation."""
    services, tenant_id = caller_of(request)
    query = read_query(request, ItemsQuery)
    record = await find_response(services, tenant_id, response_id)
    items = listed_items(record.job.id, body_of(record).input)
    if query.order == "desc":
        items.reverse()
    listed = page(query.items_after(items), query.limit)
    # The SDKs expect strings here, even for an empty list.
    return json_response(listed | {"first_id": listed["first_id"] or "", "last_id": listed["last_id"] or ""})


async def _generation(
    request: Request, body: ResponseBody, passing: Collection[UUID] = ()
) -> tuple[GenerationRequest, ConversationTurn | None]:
    """The request, and the turn that it is in a conversation. Raises CeleriacError."""
    services, tenant_id = caller_of(request)
    view = services.views.get(body.model)
    opened = await with_opened_input(request, body)
    context, turn = await context_of_request(services, tenant_id, body, passing)
    return await off_loop(request, to_generation_request, opened, view, context), turn


async def context_of_request(
    services: Services, tenant_id: UUID, body: ContextBody, passing: Collection[UUID] = ()
) -> tuple[Sequence[dict[str, Any]], ConversationTurn | None]:
    """The messages before the input, and the turn that follows if they are a conversation's. Raises CeleriacError."""
    if body.previous_response_id is not None and body.conversation_id is not None:
        raise InvalidRequest(
            "previous_response_id and conversation are both set; send only one of them", param="conversation"
        )
    if body.previous_response_id is not None:
        return await conversation_of(services, tenant_id, body.previous_response_id, passing), None
    if body.conversation_id is not None:
        return await context_in(services, tenant_id, body.conversation_id)
    return (), None


Body = TypeVar("Body", ResponseBody, CompactBody)


async def with_opened_input(request: Request, body: Body) -> Body:
    """The body, whose input has messages in place of compactions. Raises InvalidRequest for one that is not ours."""
    if body.input is None or isinstance(body.input, str):
        return body
    return body.model_copy(update={"input": await opened_items(request, body.input, place="input")})


async def opened_items(request: Request, items: Sequence[ReferableItem], *, place: str) -> Sequence[ReferableItem]:
    """The items, with messages in place of compactions. `place` is their name in the body. Raises InvalidRequest for a
    compaction that is not ours."""
    services, tenant_id = caller_of(request)
    if not any(isinstance(item, CompactionItem) for item in items):
        return items
    key = await services.read(tenants.seal_key, tenant_id)
    return await off_loop(request, with_summaries, items, key, place=place)


def _counted_as_response(counted: InputTokensBody) -> ResponseBody:
    return ResponseBody.model_validate(counted.model_dump(by_alias=True, exclude_unset=True))


def _asked(services: Services, body: ResponseBody, turn: ConversationTurn | None) -> Asked:
    return Asked(
        endpoint=Endpoint.RESPONSES,
        has_stream=bool(body.stream),
        is_stored=body.is_stored,
        service_tier=body.service_tier,
        metadata=body.metadata,
        spelling=spelling_of(body),
        endpoint_body=body.model_dump_json(by_alias=True, exclude_unset=True),
        turn=turn,
        use_cache=body.use_cache,
        timeouts=body.timeouts,
        accept=None if turn is None else accept_in(services, turn, body),
    )


def _refuse_without_answer(record: JobRecord) -> None:
    """Raises CeleriacError for a job without an answer. An incomplete response is an answer, whatever cut it short."""
    if ending_of(record.job).status != "incomplete":
        refuse_unfinished(record)


def _stream(services: Services, record: JobRecord, *, starting_after: int = -1, run: Run | None = None) -> EventStream:
    parser = parser_for(services, record)
    body = body_of(record)
    stream = ResponseStream(services, record, body, parser, starting_after=starting_after)

    def on_end(reason: str) -> None:
        if run is not None and reason == "complete":
            run.note_delivered()
        elif run is not None and reason in ABANDONED:
            run.note_disconnected()

    async def unserved() -> bytes:
        assert run is not None
        return frame("error", error_event(await run.wait_until_unserved()))

    return EventStream(
        stream.frames(),
        heartbeat_seconds=services.settings.stream_heartbeat_seconds,
        lifetime_seconds=services.settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining if body.background else services.last_call,
        headers=run.headers if run is not None else {"x-job-id": external_id(record.job.id)},
        early_end_frame=frame("error", stream.early_end),
        on_end=on_end,
        unserved=None if run is None or body.background else unserved,
    )


def _answer(view: Mapping[str, Any], headers: dict[str, str]) -> Response:
    return json_response(view, headers=headers | (POLL_HEADERS if view["status"] in ("queued", "in_progress") else {}))
