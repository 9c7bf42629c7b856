"""A response's body as a job's request: the conversation so far, tools, and what the output must look like."""

from collections.abc import Sequence
from typing import Any

from api.openai.output_shapes import answer_of
from api.openai.response_input import messages_of
from api.openai.response_schemas import ResponseBody, ResponseFunctionTool, ResponseNamedTool, TextFormat
from api.openai.schemas import (
    build,
    refuse_idle_stream_options,
    spelling_of_params,
    strings,
    take_effort,
    with_body_names,
)
from api.openai.tool_requests import AskedTools, output_of, spelling_of_output, tools_of
from domain.errors import InvalidRequest
from domain.requests import GenerationRequest
from domain.structured_output import StructuredOutput
from tasks.models import ModelView

SCHEMA_PLACE = "text.format.schema"


def to_generation_request(
    body: ResponseBody, view: ModelView, context: Sequence[dict[str, Any]] = ()
) -> GenerationRequest:
    """`view` is that of the body's model, `context` the messages of the conversation that the response goes on from.
    Raises InvalidRequest."""
    try:
        return _generation_request(body, view, context)
    except InvalidRequest as exc:
        if (exc.param or "").startswith("messages"):
            # Items are no messages: they are counted otherwise, and there may be more messages than these.
            exc.message, exc.param = exc.message.replace(str(exc.param), "input", 1), "input"
        raise with_body_names(exc, spelling_of(body)) from None


def _generation_request(body: ResponseBody, view: ModelView, context: Sequence[dict[str, Any]]) -> GenerationRequest:
    refuse_idle_stream_options(body)
    take_effort(body.reasoning.effort if body.reasoning else None, view, place="reasoning.effort")
    asked = _asked_tools(body)
    tools = tools_of(asked, view)
    params = body.sampling(
        max_tokens=body.max_output_tokens,
        stop=strings(body.stop),
        logprobs=(body.top_logprobs or 0) if body.has_logprobs else None,
        structured_output=output_of(asked, view, tools, _answer(body)),
    )
    messages = messages_of(body.input, instructions=body.instructions, context=context)
    request: dict[str, Any] = {"model": body.model, "messages": messages, "tools": tools, "params": params}
    return build(GenerationRequest, request | {"parallel_tool_calls": body.parallel_tool_calls})


def spelling_of(body: ResponseBody) -> dict[str, str]:
    output = spelling_of_output(_asked_tools(body), _places_of_answer(body))
    return spelling_of_params(**output, max_tokens="max_output_tokens", messages="input")


def _places_of_answer(body: ResponseBody) -> dict[str, str]:
    if _format_of(body) is None or body.structured_output is not None:
        return {}
    return {"structured_output.json_schema": SCHEMA_PLACE, "structured_output.json_object": "text.format"}


def _asked_tools(body: ResponseBody) -> AskedTools:
    choice = body.tool_choice
    return AskedTools(
        definitions={
            number: tool.model_dump(exclude={"type"})
            for number, tool in enumerate(body.tools or ())
            if isinstance(tool, ResponseFunctionTool)
        },
        place="tools.{}",
        mode="named" if isinstance(choice, ResponseNamedTool) else choice or "auto",
        name=choice.name if isinstance(choice, ResponseNamedTool) else None,
        is_parallel=body.parallel_tool_calls is not False,
    )


def _answer(body: ResponseBody) -> StructuredOutput | None:
    """What an output that is no calls must look like."""
    format = _format_of(body)
    if format is None:
        return body.structured_output
    if body.structured_output is not None:
        raise InvalidRequest(
            "structured_output and text.format both shape the output; send one of them", param="text.format"
        )
    return _formatted(format)


def _format_of(body: ResponseBody) -> TextFormat | None:
    """None where any text will do."""
    format = body.text.format if body.text else None
    return None if format is None or format.type == "text" else format


def _formatted(format: TextFormat) -> StructuredOutput:
    if format.type == "json_object":
        return StructuredOutput(json_object=True)
    if format.schema_ is None:
        raise InvalidRequest("text.format.schema is missing; add it", param="text.format.schema")
    if format.name is None:
        raise InvalidRequest("text.format.name is missing; add it", param="text.format.name")
    return answer_of(format.schema_, is_strict=format.strict is True, place=SCHEMA_PLACE)
