"""How a model writes tool calls and reasoning into its text, told by its chat template: no model says it otherwise.

| format  | what the model writes                                               | told by                     |
|---------|---------------------------------------------------------------------|-----------------------------|
| hermes  | <tool_call>{"name": …, "arguments": {…}}</tool_call>, repeated      | <tool_call> (Qwen, Hermes)  |
| mistral | [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                      | [TOOL_CALLS]                |
| llama3  | {"name": …, "parameters": {…}}, alone, perhaps behind <|python_tag|> | "parameters" and ipython    |

Markers that are special tokens never reach the text, so mistral and llama3 are known by how the output begins.
"""

from dataclasses import dataclass
from enum import StrEnum

import orjson

from domain.tools import ToolDefinition


class ToolFormat(StrEnum):
    HERMES = "hermes"
    MISTRAL = "mistral"
    LLAMA3 = "llama3"


class ReasoningFormat(StrEnum):
    TAGGED = "tagged"  # the output may begin with <think>…</think>
    OPENED = "opened"  # the prompt ends in <think>, so the output begins within


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """None: the model has no such thing."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None


def output_format_of(template_source: str, rendered_prompt: str) -> OutputFormat:
    """`rendered_prompt` is any that the template makes."""
    reasoning = ReasoningFormat.TAGGED if "<think>" in template_source else None
    if rendered_prompt.rstrip().endswith("<think>"):
        reasoning = ReasoningFormat.OPENED
    return OutputFormat(_tool_format_of(template_source), reasoning)


def _tool_format_of(source: str) -> ToolFormat | None:
    if "tools" not in source or "<function=" in source or "[ARGS]" in source:
        return None
    if "<tool_call>" in source:
        return ToolFormat.HERMES
    if "[TOOL_CALLS]" in source:
        return ToolFormat.MISTRAL
    return ToolFormat.LLAMA3 if "ipython" in source and "parameters" in source else None


def tool_call_grammar(format: ToolFormat, tools: list[ToolDefinition], *, max_calls: int | None) -> str:
    """A Lark grammar, llguidance's, of an output that is calls of `tools` and nothing else."""
    rules = [f"tool_{number}: %json {_call_schema(format, tool)}" for number, tool in enumerate(tools)]
    any_tool = " | ".join(f"tool_{number}" for number in range(len(tools)))
    is_single = max_calls == 1
    shapes = {
        ToolFormat.HERMES: 'start: wrapped\nwrapped: "<tool_call>\\n" call "\\n</tool_call>"'
        if is_single
        else 'start: wrapped ("\\n" wrapped)*\nwrapped: "<tool_call>\\n" call "\\n</tool_call>"',
        ToolFormat.MISTRAL: 'start: "[" call "]"' if is_single else 'start: "[" call (", " call)* "]"',
        ToolFormat.LLAMA3: "start: call",
    }
    return "\n".join([shapes[format], f"call: {any_tool}", *rules])


def _call_schema(format: ToolFormat, tool: ToolDefinition) -> str:
    arguments = "parameters" if format is ToolFormat.LLAMA3 else "arguments"
    schema = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, arguments: tool.parameters or {"type": "object"}},
        "required": ["name", arguments],
        "additionalProperties": False,
    }
    return orjson.dumps(schema).decode()
