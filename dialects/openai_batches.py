"""Batch lines: parsed to the request of their route, and answered in the form of that route.

Error codes and the first words of messages are OpenAI's, taken from its batches and from public integration tests of
other servers (test_batches_errors.py of Llama Stack).
"""

import json
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Generic, Literal, NoReturn, TypeVar

from pydantic import StringConstraints

from dialects import (
    anthropic_answers,
    anthropic_requests,
    openai_chat,
    openai_embeddings,
    openai_response_objects,
    openai_response_requests,
)
from dialects.anthropic_fields import ANTHROPIC_HINT_TREE
from dialects.anthropic_requests import MessagesBody
from dialects.bodies import parse_model, with_body_names
from dialects.errors import HTTP_BY_CODE, refuse_unfinished
from dialects.fields import HINT_TREE, HintTree
from dialects.native import NO_NUL
from dialects.openai import GenerationBody, OpenAIModel, spelling_of_params
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_completions import CompletionBody, from_results, prompt_of, to_generation_requests
from dialects.openai_embeddings import EmbeddingBody
from dialects.openai_response_requests import ResponseBody
from domain.catalog import Task
from domain.errors import (
    CeleriacError,
    InvalidJsonLine,
    InvalidUrl,
    MissingParameter,
    StreamingUnsupported,
    UnsupportedParameter,
)
from domain.job_options import Timeouts
from domain.jobs import LineRefusal
from domain.requests import EmbeddingRequest, GenerationRequest, JobRequest
from storage.job_queries import JobRecord
from text.models import ModelView, ModelViews
from text.parsers import parser_of


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A valid line. `in_words` renames the fields in an error to those of the body; `answer` makes the route's answer
    from the finished job, or raises the CeleriacError that says why there is none."""

    custom_id: str
    request: JobRequest
    metadata: Mapping[str, str]
    timeouts: Timeouts
    in_words: Callable[[CeleriacError], CeleriacError]
    answer: Callable[[JobRecord], Mapping[str, object]]


Body = TypeVar("Body", bound=GenerationBody | EmbeddingBody | MessagesBody)

Request = TypeVar("Request", bound=JobRequest)


@dataclass(frozen=True, slots=True)
class LineRoute(Generic[Body, Request]):
    """The pure functions of a route. `to_request` and `from_result` raise CeleriacError; `spelling_of` has the body's
    names for the fields of the request."""

    body: type[Body]
    to_request: Callable[[Body, ModelView], Request]
    spelling_of: Callable[[Body], Mapping[str, str]]
    from_result: Callable[[JobRecord, Request, Body, ModelView], Mapping[str, object]]
    hints: HintTree = field(default_factory=lambda: HINT_TREE)
    default_for: Task | None = "generation"  # which default model a line may leave out


def _refuse_ids(body: ChatCompletionBody | CompletionBody) -> None:
    if body.return_token_ids:
        raise UnsupportedParameter(
            "return_token_ids is not supported in a batch; leave it out, or send single requests",
            param="return_token_ids",
        )


def _chat_request(body: ChatCompletionBody, view: ModelView) -> GenerationRequest:
    _refuse_ids(body)
    return openai_chat.to_generation_request(body, view)


def _chat_answer(
    record: JobRecord, request: GenerationRequest, body: ChatCompletionBody, view: ModelView
) -> Mapping[str, object]:
    ids = openai_chat.asked_ids(body, request, view)
    return openai_chat.from_result(record, request, view.output_format, ids=ids)


def _response_request(body: ResponseBody, view: ModelView) -> GenerationRequest:
    if body.background:
        raise UnsupportedParameter(
            "background is true, but batch lines always run in the background; leave it out", param="background"
        )
    if body.previous_response_id is not None:
        raise UnsupportedParameter(
            "previous_response_id is not supported in a batch; send the conversation as input",
            param="previous_response_id",
        )
    if body.conversation is not None:
        raise UnsupportedParameter(
            "conversation is not supported in a batch; send its items as input", param="conversation"
        )
    return openai_response_requests.to_generation_request(body, view)


def _response_answer(
    record: JobRecord, request: GenerationRequest, body: ResponseBody, view: ModelView
) -> Mapping[str, object]:
    parser = parser_of(request, view.output_format)
    return openai_response_objects.from_result(replace(record, request=request), body, parser)


def _completion_request(body: CompletionBody, view: ModelView) -> GenerationRequest:
    _refuse_ids(body)
    requests = to_generation_requests(body)
    if len(requests) > 1:
        raise UnsupportedParameter(
            f"prompt is a list of {len(requests)} prompts; in a batch, send one prompt per line", param="prompt"
        )
    return requests[0]


def _completion_answer(
    record: JobRecord, request: GenerationRequest, body: CompletionBody, view: ModelView
) -> Mapping[str, object]:
    return from_results([record], [prompt_of(body, request, view, 0)], None)


def _embedding_request(body: EmbeddingBody, view: ModelView) -> EmbeddingRequest:
    return openai_embeddings.to_embedding_request(body, view)


def _embedding_answer(
    record: JobRecord, _: EmbeddingRequest, body: EmbeddingBody, __: ModelView
) -> Mapping[str, object]:
    return openai_embeddings.embeddings_from_result(record, body)


def _message_answer(
    record: JobRecord, request: GenerationRequest, body: MessagesBody, view: ModelView
) -> Mapping[str, object]:
    return anthropic_answers.from_result(record, request, body, view.output_format)


def _spelling_of_completions(_: CompletionBody) -> Mapping[str, str]:
    return spelling_of_params()


#: Every route that a batch may use.
ROUTES: dict[str, LineRoute[Any, Any]] = {
    "/v1/chat/completions": LineRoute(ChatCompletionBody, _chat_request, openai_chat.spelling_of, _chat_answer),
    "/v1/responses": LineRoute(ResponseBody, _response_request, openai_response_requests.spelling_of, _response_answer),
    "/v1/completions": LineRoute(CompletionBody, _completion_request, _spelling_of_completions, _completion_answer),
    "/v1/embeddings": LineRoute(
        EmbeddingBody,
        _embedding_request,
        openai_embeddings.spelling_of_embeddings,
        _embedding_answer,
        default_for="embedding",
    ),
    "/v1/messages": LineRoute(
        MessagesBody,
        anthropic_requests.to_generation_request,
        anthropic_requests.spelling_of,
        _message_answer,
        ANTHROPIC_HINT_TREE,
        default_for=None,
    ),
}


class Line(OpenAIModel):
    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=NO_NUL)]
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def read_line(content: bytes, url: str, views: ModelViews) -> LineRequest:
    """Parse a line. Raises CeleriacError whose `param` is a field of the line."""
    _refuse_odd_line(content)
    line = parse_model(content, Line)
    if line.url != url:
        raise InvalidUrl(
            f"The URL provided for this request does not match the batch endpoint: url is {line.url[:64]!r} but "
            f"the batch is for {url}; change one of them",
            param="url",
        )
    try:
        return _read_body(line, ROUTES[url], views)
    except CeleriacError as exc:
        exc.param = f"body.{exc.param}" if exc.param else "body"
        raise


def _refuse_odd_line(content: bytes) -> None:
    """Refuse a line that is not a JSON object or lacks a field. Raises InvalidJsonLine or MissingParameter."""
    try:
        line = json.loads(content.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        return  # the parser of bodies reports how deep is too deep
    except UnicodeDecodeError as exc:
        utf_16 = " (it looks like UTF-16)" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else ""
        raise _not_json(f"byte {exc.start} is not UTF-8{utf_16}; save the file as UTF-8") from None
    except json.JSONDecodeError as exc:
        remedy = "end lines with a line feed, not only a carriage return" if b"\r" in content.strip() else ""
        raise _not_json(f"{exc.msg} at column {exc.colno}; {remedy or 'send one JSON object per line'}") from None
    except ValueError as exc:
        raise _not_json(f"{exc}; send numbers of at most 64 bits") from None
    if not isinstance(line, dict):
        raise _not_json("it is not an object; send one JSON object per line")
    for name in Line.model_fields:
        if name not in line:
            raise MissingParameter(f"Missing required parameter: '{name}'; add it to the line", param=name)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"it contains {constant}, which is not JSON")


def _not_json(reason: str) -> InvalidJsonLine:
    return InvalidJsonLine(f"This line is not parseable as valid JSON: {reason}")


def _read_body(line: Line, route: LineRoute[Body, Request], views: ModelViews) -> LineRequest:
    default_model = None if route.default_for is None else views.catalog.default_id_for(route.default_for)
    content = json.dumps(line.body).encode()
    body = parse_model(content, route.body, route.hints, default_model=default_model)
    metadata = _metadata_of(body)
    view = views.get(body.model)
    request = route.to_request(body, view)

    def answer(record: JobRecord) -> Mapping[str, object]:
        refuse_unfinished(record)
        return route.from_result(record, request, body, view)

    def in_words(exc: CeleriacError) -> CeleriacError:
        return with_body_names(exc, route.spelling_of(body))

    return LineRequest(line.custom_id, request, metadata, body.timeouts, in_words, answer)


def _metadata_of(body: GenerationBody | EmbeddingBody | MessagesBody) -> Mapping[str, str]:
    """The metadata of a line. Raises StreamingUnsupported for a body that asks for a stream."""
    if isinstance(body, EmbeddingBody):
        return {}
    if body.stream:
        raise StreamingUnsupported(
            "Streaming is not supported in the Batch API: stream is true; leave it out", param="stream"
        )
    return body.job_metadata if isinstance(body, MessagesBody) else body.metadata or {}


def refusal_of(exc: CeleriacError) -> LineRefusal:
    """The error in the form in which a route would answer it."""
    http = HTTP_BY_CODE[exc.code]
    return LineRefusal(status_code=http.status, type=http.type, code=exc.code, message=exc.message, param=exc.param)
