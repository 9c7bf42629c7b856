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

from domain.tools import ToolFormat

THINK, END_THINK = "<think>", "</think>"


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
