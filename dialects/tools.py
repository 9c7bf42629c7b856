"""The tools and the JSON schema that a body asks for, and what the output must be for them. All dialects use this.

A strict schema is enforced completely, or refused with the keyword that cannot be. From any other schema, what cannot
be enforced is removed, as JSON Schema prescribes for unknown keywords and formats.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

from pydantic import ValidationError

from dialects.bodies import invalid_request
from dialects.openai import build_at
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.json_schemas import gather
from domain.shares import SharedMemory, current_tenant
from domain.strict_schemas import closed, enforceable
from domain.structured_output import (
    MAX_CALLS_BYTES,
    CallableTool,
    StructuredOutput,
    ToolCalls,
    ToolDefinition,
    bounded,
    check_keywords,
    check_structure,
)
from text.call_formats import CallFormat, call_format
from text.models import ModelView

MAX_REMEMBERED = 1_024  # tool parameters, of at most MAX_SCHEMA_BYTES each


def answer_of(schema: dict[str, Any], *, is_strict: bool, place: str) -> StructuredOutput:
    """The structured output for a JSON schema. `place` is the schema's path in the body. Raises InvalidRequest."""
    try:
        if is_strict:
            return _output(place, json_schema=schema)
        kept = bounded(schema)
        check_structure(kept)
        return _output(place, json_schema=enforceable(gather(kept)))
    except ValueError as exc:
        raise _refusal(exc, place) from None


def callable_tool(tool: ToolDefinition, *, place: str) -> CallableTool:
    """The tool with its arguments' schema. `place` is the path of its parameters in the body. Raises InvalidRequest."""
    schema = tool.parameters or {"type": "object", "properties": {}}
    try:
        arguments = _arguments_of(json.dumps(bounded(schema)), is_strict=tool.strict is True)
        return CallableTool(name=tool.name, arguments=arguments)
    except ValueError as exc:
        raise _refusal(exc, place) from None


#: By tenant, or else one could tell by the time whether another has used a tool.
_remembered: SharedMemory[tuple[str, bool], dict[str, Any]] = SharedMemory(MAX_REMEMBERED)

_remembering = Lock()  # large bodies are read in a thread of their own


def _arguments_of(schema_json: str, *, is_strict: bool) -> dict[str, Any]:
    """Remembered, since agents send the same tools at every turn. Callers must not modify the result."""
    tenant_id, key = current_tenant.get(), (schema_json, is_strict)
    with _remembering:
        known = _remembered.find(tenant_id, key)
    if known is not None:
        return known
    arguments = _closed_arguments(schema_json, is_strict=is_strict)
    with _remembering:
        _remembered.keep(tenant_id, key, arguments)
    return arguments


def _closed_arguments(schema_json: str, *, is_strict: bool) -> dict[str, Any]:
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


@dataclass(frozen=True, slots=True)
class AskedTools:
    """What a body says about tools. `definitions` are its functions, by their index among all tools; `place` is the
    path of a tool in the body, with `{}` for the index."""

    definitions: Mapping[int, dict[str, Any]]
    place: str
    mode: str  # none, auto, required, or named
    name: str | None = None  # of the function that must be called
    name_place: str = "tool_choice.name"
    is_parallel: bool = True
    allowed: frozenset[str] | None = None  # the names of the functions that may be called; None: all

    @property
    def must_call(self) -> bool:
        return self.mode in ("required", "named")


def tools_of(asked: AskedTools, view: ModelView) -> tuple[ToolDefinition, ...]:
    """The tools that the model is shown: none if it must not call any. Raises InvalidRequest."""
    if not asked.definitions:
        if asked.must_call:
            raise InvalidRequest("tool_choice requires a call but tools has no functions; add some", param="tools")
        return ()
    tools = tuple(
        build_at(asked.place.format(number), ToolDefinition, definition)
        for number, definition in asked.definitions.items()
    )
    if len({tool.name for tool in tools}) < len(tools):
        raise InvalidRequest("two tools have the same name; rename one", param="tools")
    if asked.mode == "none":
        return ()
    if asked.allowed is not None:
        tools = _allowed_tools(asked.allowed, tools)
    if view.output_format.tools is None:
        raise UnsupportedParameter(
            f"the chat template of {view.spec.id} has no tool call format that is supported here; remove tools",
            param="tools",
        )
    return tools


def _allowed_tools(allowed: frozenset[str], tools: tuple[ToolDefinition, ...]) -> tuple[ToolDefinition, ...]:
    """The others are not shown to the model, which so cannot call them. Raises InvalidRequest."""
    unknown = min(allowed - {tool.name for tool in tools}, default=None)
    if unknown is not None or not allowed:
        raise InvalidRequest(
            f"tool_choice allows {str(unknown or 'nothing')[:64]!r}, which is not one of the tools; name some of them",
            param="tool_choice",
        )
    return tuple(tool for tool in tools if tool.name in allowed)


def output_of(
    asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...], answer: StructuredOutput | None
) -> StructuredOutput | None:
    """What the output must be. Calls if one is required; if one is only allowed, calls or `answer`, provided there is
    an `answer`. Raises InvalidRequest."""
    if not tools or (answer is None and not asked.must_call):
        return answer
    return with_calls(None if asked.must_call else answer, _calls(asked, view, tools))


def spelling_of_output(asked: AskedTools, answer: Mapping[str, str]) -> dict[str, str]:
    """The path in the body of each part of a structured output. `answer` has those of parts other than calls."""
    places = [
        (f"structured_output.calls.tools.{index}", f"{asked.place.format(number)}.parameters")
        for index, (number, _) in enumerate(_callable_ones(asked))
    ]
    return {**answer, **dict(places), "structured_output.calls": "tools"}


def _callable_ones(asked: AskedTools) -> list[tuple[int, dict[str, Any]]]:
    """The functions that may be called, with their index among all tools."""
    return [
        (number, definition)
        for number, definition in asked.definitions.items()
        if asked.name in (None, definition["name"]) and (asked.allowed is None or definition["name"] in asked.allowed)
    ]


def _calls(asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...]) -> ToolCalls:
    assert view.output_format.tools is not None
    if not _callable_ones(asked):
        raise InvalidRequest(
            f"tool_choice names {str(asked.name)[:64]!r}, which is not one of the tools; name one of them",
            param=asked.name_place,
        )
    format = call_format(view.output_format.tools)
    token_ids = _special_token_ids(view, format)
    has_optional_marker = format.is_bare is not None
    fields = {
        "format": format.name,
        "tools": _callable_tools(asked, tools),
        "is_single": asked.name is not None or not asked.is_parallel,
        "marker_token_id": next(filter(None, map(token_ids.get, format.begins)), None) if has_optional_marker else None,
        "token_ids": {} if has_optional_marker else token_ids,
    }
    try:
        return ToolCalls.model_validate(fields)
    except ValidationError as exc:
        refusal = invalid_request(exc, ToolCalls)
        raise InvalidRequest(f"tools: {refusal.message}", param="tools") from None


def _callable_tools(asked: AskedTools, tools: tuple[ToolDefinition, ...]) -> list[CallableTool]:
    """The callable tools, up to the first that exceeds the limit on their size, which is then refused."""
    by_name = {tool.name: tool for tool in tools}
    callable_tools: list[CallableTool] = []
    num_bytes = 0
    for number, definition in _callable_ones(asked):
        place = f"{asked.place.format(number)}.parameters"
        callable_tools.append(callable_tool(by_name[definition["name"]], place=place))
        num_bytes += len(json.dumps(callable_tools[-1].arguments))
        if num_bytes > 2 * MAX_CALLS_BYTES:
            break
    return callable_tools


def _special_token_ids(view: ModelView, format: CallFormat) -> dict[str, int]:
    """Those of the format's markers that are special tokens, with their ids."""
    if view.vocabulary is None:
        return {}
    added = view.vocabulary.tokenizer.get_added_tokens_decoder()
    return {
        token.content: token_id
        for token_id, token in added.items()
        if token.special and token.content in format.markers and token_id < view.vocab_size
    }
