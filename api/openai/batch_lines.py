"""The lines of batches: which routes they may be for, and how a line becomes that route's request and answer."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import StringConstraints

from api.bodies import parse_model
from api.errors import HTTP_BY_CODE
from api.job_schemas import NO_NUL
from api.openai import chat_output, chat_requests, response_objects, response_requests
from api.openai.chat_schemas import ChatCompletionBody
from api.openai.completion_output import from_results
from api.openai.completions import CompletionBody, prompt_of, to_generation_requests
from api.openai.output_parsing import parser_of
from api.openai.response_schemas import ResponseBody
from api.openai.running import refuse_unfinished
from api.openai.schemas import GenerationBody, OpenAIModel
from domain.batches import LineRefusal
from domain.errors import CeleriacError, InvalidRequest, UnsupportedParameter
from domain.requests import GenerationRequest
from storage.job_queries import JobRecord
from tasks.batch_surface import BatchSurface, LineRequest
from tasks.models import ModelView, ModelViews

Body = TypeVar("Body", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class LineRoute(Generic[Body]):
    """The pure functions of a route. All raise CeleriacError."""

    body: type[Body]
    to_request: Callable[[Body, ModelView], GenerationRequest]
    from_result: Callable[[JobRecord, GenerationRequest, Body, ModelView], Mapping[str, object]]


def _chat_answer(
    record: JobRecord, request: GenerationRequest, body: ChatCompletionBody, view: ModelView
) -> Mapping[str, object]:
    return chat_output.from_result(record, request, view.output_format)


def _response_request(body: ResponseBody, view: ModelView) -> GenerationRequest:
    if body.background:
        raise UnsupportedParameter(
            "background is true, but a line of a batch always is; leave it out", param="background"
        )
    if body.previous_response_id is not None:
        raise UnsupportedParameter(
            "previous_response_id is not supported in a batch; send the conversation as input",
            param="previous_response_id",
        )
    return response_requests.to_generation_request(body, view)


def _response_answer(
    record: JobRecord, request: GenerationRequest, body: ResponseBody, view: ModelView
) -> Mapping[str, object]:
    parser = parser_of(request, view.output_format)
    return response_objects.from_result(replace(record, request=request), body, parser)


def _completion_request(body: CompletionBody, view: ModelView) -> GenerationRequest:
    requests = to_generation_requests(body)
    if len(requests) > 1:
        raise UnsupportedParameter(
            f"prompt is a list of {len(requests)}; in a batch send one prompt a line", param="prompt"
        )
    return requests[0]


def _completion_answer(
    record: JobRecord, request: GenerationRequest, body: CompletionBody, view: ModelView
) -> Mapping[str, object]:
    return from_results([record], [prompt_of(body, request, view, 0)], None)


#: Every route that a batch may be for.
ROUTES: dict[str, LineRoute[Any]] = {
    "/v1/chat/completions": LineRoute(ChatCompletionBody, chat_requests.to_generation_request, _chat_answer),
    "/v1/responses": LineRoute(ResponseBody, _response_request, _response_answer),
    "/v1/completions": LineRoute(CompletionBody, _completion_request, _completion_answer),
}


class Line(OpenAIModel):
    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=NO_NUL)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def batch_surface(views: ModelViews) -> BatchSurface:
    return BatchSurface(lambda content, url: read_line(content, url, views), refuse_unfinished, refusal_of)


def read_line(content: bytes, url: str, views: ModelViews) -> LineRequest:
    """Raises CeleriacError whose `param` is a field of the line."""
    line = parse_model(content, Line)
    if line.url != url:
        raise InvalidRequest(f"url is {line.url[:64]!r}, but the batch is for {url}; send it there", param="url")
    try:
        return _read_body(line, ROUTES[url], views)
    except CeleriacError as exc:
        exc.param = f"body.{exc.param}" if exc.param else "body"
        raise


def _read_body(line: Line, route: LineRoute[Body], views: ModelViews) -> LineRequest:
    body = parse_model(json.dumps(line.body).encode(), route.body)
    if body.stream:
        raise UnsupportedParameter(
            "stream is true, but nobody can watch a line of a batch; leave it out", param="stream"
        )
    view = views.get(body.model)
    request = route.to_request(body, view)

    def answer(record: JobRecord) -> Mapping[str, object]:
        refuse_unfinished(record)
        return route.from_result(record, request, body, view)

    return LineRequest(line.custom_id, request, body.metadata or {}, answer)


def refusal_of(exc: CeleriacError) -> LineRefusal:
    """In the words of the body: what is a parameter of ours is at top level there."""
    http = HTTP_BY_CODE[exc.code]
    message, param = exc.message.replace("params.", ""), exc.param and exc.param.removeprefix("params.")
    return LineRefusal(status_code=http.status, type=http.type, code=exc.code, message=message, param=param)
