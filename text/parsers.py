"""The parser for the output of a request, by the format of its model."""

from domain.requests import GenerationRequest
from domain.structured_output import ToolFormat
from text.harmony import HarmonyParser
from text.outputs import OutputFormat, OutputParser


def parser_of(request: GenerationRequest, format: OutputFormat) -> OutputParser:
    """The parser for a choice of this request. Structured output starts at the first character, so without
    reasoning."""
    structured = request.params.structured_output
    tool_names = frozenset(tool.name for tool in request.tools)
    max_calls = None if request.parallel_tool_calls else 1
    if format.tools is ToolFormat.HARMONY and structured is None:
        return HarmonyParser(tool_names=tool_names, max_calls=max_calls)
    return OutputParser(
        OutputFormat(format.tools, format.reasoning_of(request) if structured is None else None),
        tool_names=tool_names if format.tools is not ToolFormat.HARMONY else frozenset(),
        max_calls=max_calls,
        follows_grammar=structured is not None,
    )
