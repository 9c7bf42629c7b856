"""The parser for the output of a request, by the format of its model."""

from dataclasses import replace

from domain.requests import GenerationRequest
from text.harmony import HarmonyParser
from text.outputs import OutputFormat, OutputParser
from text.passed_on import PassedOnParser


def parser_of(request: GenerationRequest, format: OutputFormat) -> OutputParser:
    """The parser for a choice of this request. Structured output starts at the first character, so without
    reasoning."""
    structured = request.params.structured_output
    tool_names = frozenset(tool.name for tool in request.tools)
    max_calls = None if request.parallel_tool_calls else 1
    is_harmony = format.tools == "harmony"
    if is_harmony and (structured is None or structured.calls is not None):
        return HarmonyParser(tool_names=tool_names, max_calls=max_calls, follows_grammar=structured is not None)
    return (PassedOnParser if format.is_quoted else OutputParser)(
        replace(format, reasoning=format.reasoning_of(request) if structured is None else None),
        tool_names=frozenset() if is_harmony else tool_names,
        parameters={tool.name: tool.parameters for tool in request.tools},
        max_calls=max_calls,
        follows_grammar=structured is not None,
    )
