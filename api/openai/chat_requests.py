"""A chat completion's body as a job's request: messages, tools, and what the output must look like."""

from typing import Any

from api.openai.chat_schemas import ChatCompletionBody, FunctionTool, Message, NamedTool, ResponseFormat
from api.openai.output_shapes import answer_of
from api.openai.schemas import build, build_at, refuse_idle_stream_options, spelling_of_params, strings, take_effort
from api.openai.tool_requests import AskedTools, output_of, spelling_of_output, tools_of
from domain.errors import InvalidRequest
from domain.requests import NO_BOUND, ChatMessage, GenerationRequest
from domain.structured_output import StructuredOutput
from tasks.models import ModelView

SCHEMA_PLACE = "response_format.json_schema.schema"


def to_generation_request(body: ChatCompletionBody, view: ModelView) -> GenerationRequest:
    """`view` is that of the body's model. Raises InvalidRequest, also for tools that the model cannot be given."""
    refuse_idle_stream_options(body)
    take_effort(body.reasoning_effort, view, place="reasoning_effort")
    asked = _asked_tools(body)
    tools = tools_of(asked, view)
    params = body.sampling(
        max_tokens=_max_tokens(body),
        stop=strings(body.stop),
        logprobs=_num_logprobs(body),
        structured_output=output_of(asked, view, tools, _answer(body)),
    )
    messages = [to_message(message, number) for number, message in enumerate(body.messages)]
    request: dict[str, Any] = {"model": body.model, "messages": messages, "tools": tools, "params": params}
    return build(GenerationRequest, request | {"parallel_tool_calls": body.parallel_tool_calls})


def spelling_of(body: ChatCompletionBody) -> dict[str, str]:
    spelling = spelling_of_params(**spelling_of_output(_asked_tools(body), _places_of_answer(body)))
    return spelling if body.max_completion_tokens is None else spelling | {"max_tokens": "max_completion_tokens"}


def _places_of_answer(body: ChatCompletionBody) -> dict[str, str]:
    if body.structured_output is not None or not _is_formatted(body):
        return {}
    return {"structured_output.json_schema": SCHEMA_PLACE, "structured_output.json_object": "response_format"}


def to_message(message: Message, number: int) -> ChatMessage:
    """`number` is its place in the body. Raises InvalidRequest."""
    place = f"messages.{number}"
    if message.content is None and not (message.role == "assistant" and (message.tool_calls or message.refusal)):
        raise InvalidRequest(f"{place}.content is missing; add it", param=f"{place}.content")
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{place} is no assistant's, so it has no tool_calls", param=f"{place}.tool_calls")
    if (message.role == "tool") != (message.tool_call_id is not None):
        raise InvalidRequest(
            f"{place} has the role {message.role}; tool_call_id belongs to messages of the role tool, and only to them",
            param=f"{place}.tool_call_id",
        )
    calls = [{"id": call.id} | call.function.model_dump() for call in message.tool_calls or ()]
    fields: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content_text(message),
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
    }
    return build_at(place, ChatMessage, fields)


def content_text(message: Message) -> str:
    """Parts are put together with line breaks, as the templates for plain text expect it. A refusal is said in place of
    an answer."""
    if message.content is None:
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text or part.refusal or "" for part in message.content)


def _asked_tools(body: ChatCompletionBody) -> AskedTools:
    choice = body.tool_choice
    return AskedTools(
        definitions={
            number: tool.function.model_dump()
            for number, tool in enumerate(body.tools or ())
            if isinstance(tool, FunctionTool)
        },
        place="tools.{}.function",
        mode="named" if isinstance(choice, NamedTool) else choice or "auto",
        name=choice.function.name if isinstance(choice, NamedTool) else None,
        name_place="tool_choice.function.name",
        is_parallel=body.parallel_tool_calls is not False,
    )


def _answer(body: ChatCompletionBody) -> StructuredOutput | None:
    """What an output that is no calls must look like."""
    if not _is_formatted(body):
        return body.structured_output
    if body.structured_output is not None:
        raise InvalidRequest(
            "structured_output and response_format both shape the output; send one of them", param="response_format"
        )
    assert body.response_format is not None
    return _formatted(body.response_format)


def _is_formatted(body: ChatCompletionBody) -> bool:
    return body.response_format is not None and body.response_format.type != "text"


def _formatted(format: ResponseFormat) -> StructuredOutput:
    if format.type == "json_object":
        return StructuredOutput(json_object=True)
    if format.json_schema is None:
        raise InvalidRequest("response_format.json_schema is missing; add it", param="response_format.json_schema")
    schema = format.json_schema.schema_
    if schema is None:
        return StructuredOutput(json_object=True)
    return answer_of(schema, is_strict=format.json_schema.strict is True, place=SCHEMA_PLACE)


def _max_tokens(body: ChatCompletionBody) -> int | None:
    given = {asked for asked in (body.max_tokens, body.max_completion_tokens) if asked is not None}
    bounds = given - {NO_BOUND}
    if len(bounds) > 1:
        raise InvalidRequest(
            f"max_tokens is {body.max_tokens}, max_completion_tokens {body.max_completion_tokens}; send one",
            param="max_tokens",
        )
    return next(iter(bounds or given), None)


def _num_logprobs(body: ChatCompletionBody) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(
            f"top_logprobs is {body.top_logprobs} but logprobs is not true; set it, too", param="top_logprobs"
        )
    return (body.top_logprobs or 0) if body.logprobs else None
