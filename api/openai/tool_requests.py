"""The tools of a request, whichever route it came by: checked, shown to the model, and asked for by a grammar."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from api.bodies import invalid_request
from api.openai.output_parsing import MARKERS
from api.openai.output_shapes import callable_tool, with_calls
from api.openai.schemas import build_at
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.structured_output import StructuredOutput
from domain.tools import MAX_CALLS_BYTES, CallableTool, ToolCalls, ToolDefinition
from tasks.models import ModelView


@dataclass(frozen=True, slots=True)
class AskedTools:
    """What a body says of tools. `definitions` are those of functions, by their numbers among its tools; `place` is the
    path of a tool in it, with a `{}` for its number."""

    definitions: Mapping[int, dict[str, Any]]
    place: str
    mode: str  # none, auto, required, or named
    name: str | None = None  # of the one that must be called
    name_place: str = "tool_choice.name"
    is_parallel: bool = True

    @property
    def must_call(self) -> bool:
        return self.mode in ("required", "named")


def tools_of(asked: AskedTools, view: ModelView) -> tuple[ToolDefinition, ...]:
    """Those that the model is shown: none where it must not call any. Raises InvalidRequest."""
    if not asked.definitions:
        if asked.must_call:
            raise InvalidRequest(
                "tool_choice asks for a call but there are no functions in tools; add them", param="tools"
            )
        return ()
    tools = tuple(
        build_at(asked.place.format(number), ToolDefinition, definition)
        for number, definition in asked.definitions.items()
    )
    if len({tool.name for tool in tools}) < len(tools):
        raise InvalidRequest("two tools have the same name; rename one", param="tools")
    if asked.mode == "none":
        return ()
    if view.output_format.tools is None:
        raise UnsupportedParameter(
            f"the chat template of {view.spec.id} has no tool calls that can be read here; remove tools", param="tools"
        )
    return tools


def output_of(
    asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...], answer: StructuredOutput | None
) -> StructuredOutput | None:
    """What the output must be: calls where one must be made; where one may be made, calls or what `answer` says, if it
    says anything. Raises InvalidRequest."""
    if not tools or (answer is None and not asked.must_call):
        return answer
    return with_calls(None if asked.must_call else answer, _calls(asked, view, tools))


def spelling_of_output(asked: AskedTools, answer: Mapping[str, str]) -> dict[str, str]:
    """Where the parts of a structured output stand in the body; `answer` says it of those that are no calls."""
    places = [
        (f"structured_output.calls.tools.{index}", f"{asked.place.format(number)}.parameters")
        for index, (number, _) in enumerate(_callable_ones(asked))
    ]
    return {**answer, **dict(places), "structured_output.calls": "tools"}


def _callable_ones(asked: AskedTools) -> list[tuple[int, dict[str, Any]]]:
    """With their numbers among all tools."""
    return [pair for pair in asked.definitions.items() if asked.name in (None, pair[1]["name"])]


def _calls(asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...]) -> ToolCalls:
    assert view.output_format.tools is not None
    if not _callable_ones(asked):
        raise InvalidRequest(
            f"tool_choice names {str(asked.name)[:64]!r}, which is none of the tools", param=asked.name_place
        )
    fields = {
        "format": view.output_format.tools,
        "tools": _callable_tools(asked, tools),
        "is_single": asked.name is not None or not asked.is_parallel,
        "marker_token_id": _marker_token_id(view),
    }
    try:
        return ToolCalls.model_validate(fields)
    except ValidationError as exc:
        refusal = invalid_request(exc, ToolCalls)
        raise InvalidRequest(f"tools: {refusal.message}", param="tools") from None


def _callable_tools(asked: AskedTools, tools: tuple[ToolDefinition, ...]) -> list[CallableTool]:
    """No more than one beyond what may be sent."""
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


def _marker_token_id(view: ModelView) -> int | None:
    """Of the special token that the model has learnt to write before its calls."""
    marker = MARKERS.get(view.output_format.tools) if view.output_format.tools else None
    if marker is None or view.vocabulary is None:
        return None
    tokenizer = view.vocabulary.tokenizer
    token_id = tokenizer.token_to_id(marker)
    if token_id is None or token_id >= view.vocab_size:
        return None
    added = tokenizer.get_added_tokens_decoder().get(token_id)
    return token_id if added is not None and added.special else None
