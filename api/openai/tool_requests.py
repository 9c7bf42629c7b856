"""The tools of a request, whichever route it came by: checked, shown to the model, and asked for by a grammar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from api.openai.schemas import build_at
from domain.errors import InvalidRequest, UnsupportedParameter
from domain.structured_output import StructuredOutput
from domain.tools import ToolDefinition
from tasks.models import ModelView
from tasks.output_formats import tool_call_grammar


@dataclass(frozen=True, slots=True)
class AskedTools:
    """What a body says of tools. `place` is the path of a definition in it, with a `{}` for its number."""

    definitions: Sequence[dict[str, Any]]
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
            raise InvalidRequest("tool_choice asks for a call but there are no tools; add them", param="tools")
        return ()
    tools = tuple(
        build_at(asked.place.format(number), ToolDefinition, definition)
        for number, definition in enumerate(asked.definitions)
    )
    if len({tool.name for tool in tools}) < len(tools):
        raise InvalidRequest("two tools have the same name; rename one", param="tools")
    if view.output_format.tools is None:
        raise UnsupportedParameter(
            f"the chat template of {view.spec.id} has no tool calls that can be read here; remove tools", param="tools"
        )
    return () if asked.mode == "none" else tools


def calls_only(asked: AskedTools, view: ModelView, tools: tuple[ToolDefinition, ...]) -> StructuredOutput:
    """The whole output is calls: of any tool, or one call of the tool that is named. Raises InvalidRequest."""
    assert view.output_format.tools is not None
    choices, max_calls = list(tools), None if asked.is_parallel else 1
    if asked.name is not None:
        choices, max_calls = [tool for tool in tools if tool.name == asked.name], 1
        if not choices:
            raise InvalidRequest(
                f"tool_choice names {asked.name[:64]!r}, which is none of the tools", param=asked.name_place
            )
    for tool in choices:
        if tool.parameters is not None:
            place = asked.place.format(tools.index(tool))
            build_at(f"{place}.parameters", StructuredOutput, {"json_schema": tool.parameters})
    grammar = tool_call_grammar(view.output_format.tools, choices, max_calls=max_calls)
    return build_at("tools", StructuredOutput, {"lark": grammar})
