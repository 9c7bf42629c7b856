"""What an output must look like: a schema that a body gives, calls of its tools, or one of the two.

A strict schema is enforced whole, or refused by the keyword that cannot be. Of any other, what cannot be enforced is
left out, as JSON Schema has it for keywords and formats that a reader does not know.
"""

import functools
import json
from typing import Any

from pydantic import ValidationError

from api.bodies import invalid_request
from domain.closed_schemas import closed
from domain.enforceable_schemas import enforceable
from domain.errors import InvalidRequest
from domain.schema_bounds import bounded, check_keywords, check_structure
from domain.schema_references import gather
from domain.structured_output import StructuredOutput
from domain.tools import CallableTool, ToolCalls, ToolDefinition

MAX_REMEMBERED = 1_024  # parameters of tools, of at most `schema_bounds.MAX_SCHEMA_BYTES` each


def answer_of(schema: dict[str, Any], *, is_strict: bool, place: str) -> StructuredOutput:
    """`place` is the schema's path in the body. Raises InvalidRequest."""
    try:
        if is_strict:
            return _output(place, json_schema=schema)
        kept = bounded(schema)
        check_structure(kept)
        return _output(place, json_schema=enforceable(gather(kept)))
    except ValueError as exc:
        raise _refusal(exc, place) from None


def callable_tool(tool: ToolDefinition, *, place: str) -> CallableTool:
    """`place` is the path of its parameters in the body. Raises InvalidRequest."""
    schema = tool.parameters or {"type": "object", "properties": {}}
    try:
        arguments = _arguments_of(json.dumps(bounded(schema)), is_strict=tool.strict is True)
        return CallableTool(name=tool.name, arguments=arguments)
    except ValueError as exc:
        raise _refusal(exc, place) from None


@functools.lru_cache(maxsize=MAX_REMEMBERED)
def _arguments_of(schema_json: str, *, is_strict: bool) -> dict[str, Any]:
    """Remembered, since agents send the same tools at every turn. Nobody changes what it returns."""
    schema = json.loads(schema_json)
    check_structure(schema)
    if is_strict:
        check_keywords(schema)
        return closed(gather(schema), is_strict=True)
    return closed(enforceable(gather(schema)), is_strict=False)


def with_calls(answer: StructuredOutput | None, calls: ToolCalls) -> StructuredOutput:
    return StructuredOutput(calls=calls) if answer is None else answer.model_copy(update={"calls": calls})


def _output(place: str, **fields: Any) -> StructuredOutput:
    try:
        return StructuredOutput(**fields)
    except ValidationError as exc:
        refusal = invalid_request(exc, StructuredOutput)
        raise InvalidRequest(f"{place}: {refusal.message}", param=place) from None


def _refusal(exc: ValueError, place: str) -> InvalidRequest:
    return InvalidRequest(f"{place}: {exc}", param=place)
