"""/v1/responses: an answer as an object that is created, waited for or streamed, read again, and gone on from."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import Request
from pydantic import Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import Response

from api.bodies import off_loop, read_model
from api.deps import caller_of, private_router
from api.openai.answers import WholeAnswer
from api.openai.hints import HINT_TREE
from api.openai.response_input import listed_items
from api.openai.response_objects import ending_of
from api.openai.response_requests import spelling_of, to_generation_request
from api.openai.response_schemas import Includable, InputTokensBody, ResponseBody
from api.openai.response_stream import ResponseStream, error_event
from api.openai.response_views import InputItemListView, InputTokensView, ResponseView
from api.openai.running import Asked, Run, refuse_unfinished, start
from api.openai.schemas import with_body_names
from api.openai.stored_responses import (
    as_it_ended,
    as_it_stands,
    body_of,
    conversation_of,
    find_response,
    parser_for,
)
from api.openapi import request_body, streamed_or
from api.queries import QueryModel, query_parameters, read_query
from api.services import Services
from api.sse import EventStream, frame
from api.views import DeletedView, page
from domain.errors import CeleriacError, InvalidRequest
from domain.ids import external_id
from domain.jobs import Endpoint, JobStatus
from domain.requests import GenerationRequest
from storage import jobs
from storage.job_queries import JobRecord

CANCEL_SECONDS = 2.0  # more than a step; a worker that was lost takes longer
POLL_HEADERS = {"retry-after": "1", "openai-poll-after-ms": "1000"}

Included = list[Includable]

router = private_router()


class ResponseIdConvertor(StringConvertor):
    """/v1/responses/input_tokens is no response: it has a route of its own, and any other method gets a 405."""

    regex = "(?!input_tokens$)[^/]+"


register_url_convertor("response_id", ResponseIdConvertor())


class RetrieveQuery(QueryModel):
    stream: bool = False
    starting_after: Annotated[int, Field(ge=-1, le=2**53)] = -1
    include_obfuscation: bool | None = None  # there is none
    include: Included | None = None  # they are there if the request asked for them


class ItemsQuery(QueryModel):
    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    include: Included | None = None


@router.post(
    "/v1/responses",
    responses=streamed_or(ResponseView),
    openapi_extra=request_body(ResponseBody),
)
async def create_response(request: Request) -> Response:
    """A response as OpenAI's, and a job as any other. In the background, and wherever it is stored, it goes on without
    its client, who reads it again by its id."""
    body = await read_model(request, ResponseBody, HINT_TREE)
    if body.background and not body.is_stored:
        raise InvalidRequest(
            "background is true and store false, so nobody could read the answer; change one", param="store"
        )
    services, _ = caller_of(request)
    run = await start(request, await _generation(request, body), _asked(body))
    if not (body.stream or body.background):
        return WholeAnswer([run], lambda records: as_it_ended(services, records[0]), refuse=_refuse_without_answer)
    record = await run.read(with_request=True)
    if body.stream:
        return _stream(services, record, run=run)
    return _answer(await as_it_stands(services, record), run.headers)


@router.post(
    "/v1/responses/input_tokens",
    responses={200: {"model": InputTokensView}},
    openapi_extra=request_body(InputTokensBody),
)
async def count_input_tokens(request: Request) -> Response:
    """How many tokens the prompt of such a response would have."""
    services, _ = caller_of(request)
    counted = await read_model(request, InputTokensBody, HINT_TREE)
    body = await off_loop(request, _counted_as_response, counted)
    generation = await _generation(request, body)
    try:
        num_tokens = await services.submitter.count_prompt_tokens(generation)
    except CeleriacError as exc:
        raise with_body_names(exc, spelling_of(body)) from None
    return _json({"object": "response.input_tokens", "input_tokens": num_tokens})


@router.get(
    "/v1/responses/{response_id:response_id}",
    responses=streamed_or(ResponseView),
    openapi_extra={"parameters": query_parameters(RetrieveQuery)},
)
async def read_response(response_id: str, request: Request) -> Response:
    """As it stands, with the text so far; or its events from the start, or after one, for as long as it is kept."""
    services, tenant_id = caller_of(request)
    query = read_query(request, RetrieveQuery)
    record = await find_response(services, tenant_id, response_id)
    if query.stream:
        services.slots.refuse_if_full()
        return _stream(services, record, starting_after=query.starting_after)
    return _answer(await as_it_stands(services, record), {"x-job-id": external_id(record.job.id)})


@router.post("/v1/responses/{response_id}/cancel", responses={200: {"model": ResponseView}})
async def cancel_response(response_id: str, request: Request) -> Response:
    """One in the background is stopped within a step, for which this waits; its text so far is kept. One that has
    ended stays as it is."""
    services, tenant_id = caller_of(request)
    record = await find_response(services, tenant_id, response_id)
    if not body_of(record).background:
        raise InvalidRequest(
            "only a response that was created with background=true can be cancelled; close the connection instead",
            param="response_id",
        )
    if await services.cancel(record.job.id, tenant_id) is JobStatus.IN_PROGRESS:
        await services.wait_for_end(record.job.id, CANCEL_SECONDS)
    record = await find_response(services, tenant_id, response_id)
    return _answer(await as_it_stands(services, record), {"x-job-id": external_id(record.job.id)})


@router.delete("/v1/responses/{response_id:response_id}", responses={200: {"model": DeletedView}})
async def delete_response(response_id: str, request: Request) -> Response:
    """Erases it with its input; one that is under way is stopped."""
    services, tenant_id = caller_of(request)
    record = await find_response(services, tenant_id, response_id)
    await services.cancel(record.job.id, tenant_id)
    await services.write(jobs.delete, record.job.id, tenant_id)
    return _json({"id": external_id(record.job.id, "resp"), "object": "response", "deleted": True})


@router.get(
    "/v1/responses/{response_id}/input_items",
    responses={200: {"model": InputItemListView}},
    openapi_extra={"parameters": query_parameters(ItemsQuery)},
)
async def list_input_items(response_id: str, request: Request) -> Response:
    """What was sent as `input`, an item each; the conversation before it belongs to the responses before it."""
    services, tenant_id = caller_of(request)
    query = read_query(request, ItemsQuery)
    record = await find_response(services, tenant_id, response_id)
    items = listed_items(record.job.id, body_of(record).input)
    if query.order == "desc":
        items.reverse()
    listed = page(items[_place_after(items, query.after) :], query.limit)
    # Clients know no null here.
    return _json(listed | {"first_id": listed["first_id"] or "", "last_id": listed["last_id"] or ""})


async def _generation(request: Request, body: ResponseBody) -> GenerationRequest:
    """Raises InvalidRequest."""
    services, tenant_id = caller_of(request)
    view = services.views.get(body.model)
    context: Sequence[dict[str, Any]] = ()
    if body.previous_response_id is not None:
        context = await conversation_of(services, tenant_id, body.previous_response_id)
    return await off_loop(request, to_generation_request, body, view, context)


def _counted_as_response(counted: InputTokensBody) -> ResponseBody:
    return ResponseBody.model_validate(counted.model_dump(by_alias=True, exclude_unset=True))


def _asked(body: ResponseBody) -> Asked:
    return Asked(
        endpoint=Endpoint.RESPONSES,
        has_stream=bool(body.stream),
        is_stored=body.is_stored,
        service_tier=body.service_tier,
        metadata=body.metadata,
        spelling=spelling_of(body),
        endpoint_body=body.model_dump_json(by_alias=True, exclude_unset=True),
    )


def _refuse_without_answer(record: JobRecord) -> None:
    """Raises CeleriacError. An incomplete response is an answer, whatever cut it off."""
    if ending_of(record.job).status != "incomplete":
        refuse_unfinished(record)


def _stream(services: Services, record: JobRecord, *, starting_after: int = -1, run: Run | None = None) -> EventStream:
    parser = parser_for(services, record)
    body = body_of(record)
    stream = ResponseStream(services, record, body, parser, starting_after=starting_after)

    def on_end(reason: str) -> None:
        if run is not None and reason == "complete":
            run.note_delivered()
        elif run is not None and reason in ("disconnected", "slow", "unserved"):
            run.note_disconnected()

    async def unserved() -> bytes:
        assert run is not None
        return frame("error", error_event(await run.wait_until_unserved()))

    return EventStream(
        stream.frames(),
        heartbeat_seconds=services.settings.stream_heartbeat_seconds,
        lifetime_seconds=services.settings.stream_lifetime_seconds,
        slots=services.slots,
        draining=services.draining,
        headers=run.headers if run is not None else {"x-job-id": external_id(record.job.id)},
        early_end_frame=stream.early_end_frame,
        on_end=on_end,
        unserved=None if run is None or body.background else unserved,
    )


def _answer(view: Mapping[str, Any], headers: dict[str, str]) -> Response:
    return _json(view, headers | (POLL_HEADERS if view["status"] in ("queued", "in_progress") else {}))


def _json(answer: Mapping[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(answer), headers=headers, media_type="application/json")


def _place_after(items: Sequence[Mapping[str, Any]], after: str | None) -> int:
    if after is None:
        return 0
    place = next((place for place, item in enumerate(items) if item["id"] == after), None)
    if place is None:
        raise InvalidRequest(f"after is {after[:64]!r}, no item of this response; send a last_id", param="after")
    return place + 1
