"""/v1/responses: create, stream, read, continue, cancel and delete responses.

A response's events are numbered from 0 and are the same whenever they are read: the numbers are derived from the job's
committed chunks. So a cursor stays valid for as long as the job is kept, whichever API process serves it and however
many workers the job has had.
"""

from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from api.errors import json_response
from api.events import ABANDONED, EventStream, frame, read_all_chunks, retry_until_storage_answers
from api.inputs import PageQuery, QueryModel, listing, off_loop, query_parameters, read_for_model, read_query
from api.openai.answers import WholeAnswer
from api.openai.running import Asked, Run, start
from api.openapi import request_body, streamed_or
from api.services import Services, caller_of, private_router
from dialects.bodies import with_body_names
from dialects.errors import refuse_unfinished
from dialects.fields import HINT_TREE
from dialects.openai_response_objects import (
    Ending,
    InputItemListView,
    InputTokensView,
    ResponseEvent,
    ResponseOutput,
    ResponseView,
    ending_of,
    from_result,
    response_object,
)
from dialects.openai_response_requests import (
    Includable,
    InputTokensBody,
    ResponseBody,
    add_output,
    listed_items,
    spelling_of,
    to_generation_request,
)
from dialects.openai_views import DeletedView, page
from domain.errors import (
    CeleriacError,
    InvalidRequest,
    JobNotFound,
    ModelNotFound,
    PreviousResponseNotFound,
    ServerOverloaded,
)
from domain.jobs import Endpoint, JobStatus, external_id, parse_id
from domain.requests import GenerationRequest, TokenChunk
from storage import job_queries, jobs
from storage.job_queries import JobRecord
from text.outputs import OutputFormat, OutputParser
from text.parsers import parser_of


async def find_response(services: Services, tenant_id: UUID, response_id: str) -> JobRecord:
    """The job of a stored response, with its request. Raises JobNotFound, with the same message for a malformed id, one
    of another tenant, and a job that is not a stored response."""
    not_found = JobNotFound(
        f"there is no response {response_id[:64]!r}; it may have expired, or have been created with store=false",
        param="response_id",
    )
    try:
        id_ = parse_id(response_id)
    except ValueError:
        raise not_found from None
    record = await services.read(job_queries.get, id_, tenant_id, with_request=True)
    if record is None or record.job.endpoint is not Endpoint.RESPONSES or not record.job.is_stored:
        raise not_found
    return record


def body_of(record: JobRecord) -> ResponseBody:
    """The body that the client sent. `record` must include its request."""
    assert record.endpoint_body is not None
    return ResponseBody.model_validate(record.endpoint_body)


def parser_for(services: Services, record: JobRecord) -> OutputParser:
    """A parser for the job's output; for plain text if its model is no longer served."""
    assert isinstance(record.request, GenerationRequest)
    try:
        format = services.views.output_format(record.job.model)
    except ModelNotFound:
        format = OutputFormat()
    return parser_of(record.request, format)


def as_it_ended(services: Services, record: JobRecord) -> ResponseView:
    """The response of a job that has ended."""
    return from_result(record, body_of(record), parser_for(services, record))


async def as_it_stands(services: Services, record: JobRecord) -> ResponseView:
    """The response in its current state, with the text so far."""
    if record.job.status.is_terminal:
        return as_it_ended(services, record)
    output = ResponseOutput(record.job.id, parser_for(services, record))
    for chunk in await read_all_chunks(services, record.job.id):
        list(output.push(chunk.text, chunk.logprobs))
    return response_object(record, body_of(record), ending_of(record.job), output)


async def conversation_of(services: Services, tenant_id: UUID, response_id: str) -> list[dict[str, Any]]:
    """The messages and output of a completed response, as the start of the next conversation turn. Without its
    instructions, which apply to one response only. Raises InvalidRequest."""
    try:
        record = await find_response(services, tenant_id, response_id)
    except JobNotFound as exc:
        raise PreviousResponseNotFound(exc.message, param="previous_response_id") from None
    previous = as_it_ended(services, record)
    if previous["status"] not in ("completed", "incomplete"):
        raise InvalidRequest(
            f"{previous['id']} is {previous['status']}; send the id of a completed response",
            param="previous_response_id",
        )
    assert isinstance(record.request, GenerationRequest)
    dumped = [message.model_dump(exclude_defaults=True) for message in record.request.messages or ()]
    messages = dumped[1:] if previous["instructions"] else dumped
    add_output(messages, previous["output"])
    return messages


LAST_EVENTS = {"completed": "response.completed", "incomplete": "response.incomplete"}


class ResponseStream:
    """The encoded events of one response for one reader. The caller has checked that the job belongs to the reader."""

    def __init__(
        self, services: Services, record: JobRecord, body: ResponseBody, parser: OutputParser, *, starting_after: int
    ) -> None:
        """`record` must include its request. `starting_after` is the number of the last event that the reader has, or
        -1 for none."""
        self._services = services
        self._record = record
        self._body = body
        self._output = ResponseOutput(record.job.id, parser)
        self._starting_after = starting_after
        self._number = -1  # of the last event, sent or skipped

    async def frames(self) -> AsyncGenerator[bytes, None]:
        for data in self._numbered(self._beginning()):
            yield data
        has_begun = has_text = False
        async with aclosing(self._services.streams.read(self._record.job.id)) as events:
            async for event in events:
                if not has_begun and (isinstance(event, TokenChunk) or event.attempt > 0):
                    has_begun = True
                    for data in self._numbered(self._start()):
                        yield data
                if isinstance(event, TokenChunk) and event.is_reset and (has_text or self._starting_after >= 0):
                    yield frame("error", error_event(_started_over(self._record)))
                    return
                if isinstance(event, TokenChunk) and not event.is_reset:
                    has_text = True
                    for data in self._numbered(self._output.push(event.text, event.logprobs)):
                        yield data
        for data in self._numbered(await self._end()):
            yield data

    def _beginning(self) -> Iterator[ResponseEvent]:
        """Only a background response is ever shown as queued; others are in progress from the start."""
        begun = self._response(Ending("queued" if self._body.background else "in_progress"))
        yield {"type": "response.created", "response": begun}
        yield {"type": f"response.{begun['status']}", "response": begun}

    def _start(self) -> Iterator[ResponseEvent]:
        if self._body.background:
            yield {"type": "response.in_progress", "response": self._response(Ending("in_progress"))}

    async def _end(self) -> list[ResponseEvent]:
        job = self._record.job
        record = await retry_until_storage_answers(
            lambda: self._services.read(job_queries.get, job.id, job.tenant_id, with_request=True)
        )
        if record is None:
            return [error_event(JobNotFound(f"{external_id(job.id, 'resp')} was deleted"))]
        self._record = record
        ending = ending_of(record.job)
        events = list(self._output.finish(ending.item_status))
        kind = LAST_EVENTS.get(ending.status, "response.failed")
        return [*events, {"type": kind, "response": self._response(ending)}]

    def _response(self, ending: Ending) -> ResponseView:
        return response_object(self._record, self._body, ending, self._output)

    def _numbered(self, events: Iterable[ResponseEvent]) -> Iterator[bytes]:
        for event in events:
            self._number += 1
            if self._number > self._starting_after:
                yield frame(str(event["type"]), {**event, "sequence_number": self._number})

    @property
    def early_end_frame(self) -> bytes:
        """The event to send if this server ends the stream before the job is done."""
        name = external_id(self._record.job.id, "resp")
        event = error_event(ServerOverloaded(f"this stream ends early, but {name} continues: retrieve it"))
        return frame("error", event)


def _started_over(record: JobRecord) -> CeleriacError:
    """For a job that starts over: events that were numbered and sent cannot be retracted."""
    name = external_id(record.job.id, "resp")
    return ServerOverloaded(
        f"the model was replaced while {name} ran, so its output starts over: discard what you received, and retrieve "
        f"{name} without starting_after"
    )


def error_event(exc: CeleriacError) -> ResponseEvent:
    return {"type": "error", "code": exc.code, "message": exc.message, "param": exc.param}


CANCEL_SECONDS = 2.0  # longer than a step; if the worker was lost, cancelling takes longer than this

POLL_HEADERS = {"retry-after": "1", "openai-poll-after-ms": "1000"}

Included = list[Includable]

router = private_router("OpenAI")


class ResponseIdConvertor(StringConvertor):
    """Excludes /v1/responses/input_tokens, which is not a response: it has its own route, and other methods get a
    405."""

    regex = "(?!input_tokens$)[^/]+"


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
    body = await read_for_model(request, ResponseBody, HINT_TREE)
    if body.background and not body.is_stored:
        raise InvalidRequest(
            "background is true but store is false, so the answer could never be read; change one of them",
            param="store",
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
    """Count the tokens of the prompt that a response with this body would have."""
    services, _ = caller_of(request)
    counted = await read_for_model(request, InputTokensBody, HINT_TREE)
    body = await off_loop(request, _counted_as_response, counted)
    generation = await _generation(request, body)
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
        draining=services.draining,
        headers=run.headers if run is not None else {"x-job-id": external_id(record.job.id)},
        early_end_frame=stream.early_end_frame,
        on_end=on_end,
        unserved=None if run is None or body.background else unserved,
    )


def _answer(view: Mapping[str, Any], headers: dict[str, str]) -> Response:
    return json_response(view, headers=headers | (POLL_HEADERS if view["status"] in ("queued", "in_progress") else {}))
