"""A response's body as a job's request: the conversation so far, tools, and what the output must look like."""

from collections.abc import Sequence
from typing import Any

from api.openai.response_input import messages_of
from api.openai.response_schemas import NamedTool, ResponseBody, TextFormat
from api.openai.schemas import build, build_at, spelling_of_params, strings
from api.openai.tool_requests import AskedTools, calls_only, tools_of
from domain.errors import InvalidRequest
from domain.requests import GenerationRequest
from domain.structured_output import StructuredOutput
from domain.tools import ToolDefinition
from tasks.models import ModelView


def to_generation_request(
    body: ResponseBody, view: ModelView, context: Sequence[dict[str, Any]] = ()
) -> GenerationRequest:
    """`view` is that of the body's model, `context` the messages of the conversation that the response goes on from.
    Raises InvalidRequest."""
    asked = _asked_tools(body)
    tools = tools_of(asked, view)
    params = body.sampling(
        max_tokens=body.max_output_tokens,
        stop=strings(body.stop),
        logprobs=(body.top_logprobs or 0) if body.has_logprobs else None,
        structured_output=_structured_output(body, view, asked, tools),
    )
    messages = messages_of(body.input, instructions=body.instructions, context=context)
    request: dict[str, Any] = {"model": body.model, "messages": messages, "tools": tools, "params": params}
    try:
        return build(GenerationRequest, request | {"parallel_tool_calls": body.parallel_tool_calls})
    except InvalidRequest as exc:
        if (exc.param or "").startswith("messages"):
            exc.param = "input"
        raise


def spelling_of(body: ResponseBody) -> dict[str, str]:
    return spelling_of_params(structured_output=_structured_by(body), max_tokens="max_output_tokens")


def _structured_by(body: ResponseBody) -> str:
    """The parameter that says what the output must look like."""
    if body.structured_output is not None:
        return "structured_output"
    return "text.format" if _format_of(body) is not None else "tool_choice"


def _asked_tools(body: ResponseBody) -> AskedTools:
    choice = body.tool_choice
    return AskedTools(
        definitions=[tool.model_dump(exclude={"type"}) for tool in body.tools or ()],
        place="tools.{}",
        mode="named" if isinstance(choice, NamedTool) else choice or "auto",
        name=choice.name if isinstance(choice, NamedTool) else None,
        is_parallel=body.parallel_tool_calls is not False,
    )


def _structured_output(
    body: ResponseBody, view: ModelView, asked: AskedTools, tools: tuple[ToolDefinition, ...]
) -> StructuredOutput | None:
    format, must_call = _format_of(body), bool(tools) and asked.must_call
    if (body.structured_output is not None) + (format is not None) + must_call > 1:
        raise InvalidRequest(
            "structured_output, text.format and a required tool each shape the output; send one of them",
            param="text.format" if format is not None else "tool_choice",
        )
    if must_call:
        return calls_only(asked, view, tools)
    return body.structured_output if format is None else _formatted(format)


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
    return build_at("text.format", StructuredOutput, {"json_schema": format.schema_})
