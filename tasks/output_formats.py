"""How a model writes tool calls and reasoning into its text, told by its chat template: no model says it otherwise.

| format  | what the model writes                                               | told by                     |
|---------|---------------------------------------------------------------------|-----------------------------|
| hermes  | <tool_call>{"name": …, "arguments": {…}}</tool_call>, repeated      | <tool_call> (Qwen, Hermes)  |
| mistral | [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                      | [TOOL_CALLS]                |
| llama3  | {"name": …, "parameters": {…}}, alone, perhaps behind <|python_tag|> | "parameters" and ipython    |

Markers that are special tokens never reach the text, so mistral and llama3 are known by how the output begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import orjson

from domain.tools import ToolDefinition

THINK, END_THINK = "<think>", "</think>"


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
    reasoning = ReasoningFormat.TAGGED if THINK in template_source else None
    if rendered_prompt.rstrip().endswith(THINK):
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


def tool_call_grammar(format: ToolFormat, tools: Sequence[ToolDefinition], *, max_calls: int | None) -> str:
    """A Lark grammar, llguidance's, of an output that is calls of `tools` and nothing else."""
    is_single = max_calls == 1 or format is ToolFormat.LLAMA3
    shape = _SHAPES[format][0 if is_single else 1]
    any_tool = " | ".join(f"tool_{number}" for number in range(len(tools)))
    rules = [rule for number, tool in enumerate(tools) for rule in _rules_of(number, tool, _ARGUMENTS[format])]
    return "\n".join([f"start: {shape}", f"call: {any_tool}", *rules])


#: One call, and any number of them.
_SHAPES = {
    ToolFormat.HERMES: (
        r'"<tool_call>\n" call "\n</tool_call>"',
        r'"<tool_call>\n" call "\n</tool_call>" ("\n<tool_call>\n" call "\n</tool_call>")*',
    ),
    ToolFormat.MISTRAL: ('"[" call "]"', '"[" call (", " call)* "]"'),
    ToolFormat.LLAMA3: ("call", "call"),
}
_ARGUMENTS = {ToolFormat.HERMES: "arguments", ToolFormat.MISTRAL: "arguments", ToolFormat.LLAMA3: "parameters"}
_JSON_OPTIONS = {"whitespace_flexible": False, "coerce_one_of": False, "lenient": False}


def _rules_of(number: int, tool: ToolDefinition, arguments: str) -> tuple[str, str]:
    """The schema stands by itself, so that what it refers to is found in it."""
    schema = (tool.parameters or {"type": "object"}) | {"x-guidance": _JSON_OPTIONS}
    head = orjson.dumps('{"name": "' + tool.name + f'", "{arguments}": ').decode()
    return (
        f'tool_{number}: {head} arguments_{number} "}}"',
        f"arguments_{number}: %json {orjson.dumps(schema).decode()}",
    )
