"""Tool calls as a grammar: in the words in which their model calls, with arguments held to each tool's schema.

Beside calls an answer in JSON may be allowed. The two are told apart by their first characters, also where a call is
bare JSON: the calls' own keys are followed by a colon and a blank, and JSON that a grammar leads has no blanks.
"""

import json

from domain.tools import CallableTool, ToolCalls, ToolFormat

#: Without whitespace: a model that may write some can write it for ever. What cannot be kept is refused (`lenient`).
JSON_OPTIONS = {"whitespace_flexible": False, "coerce_one_of": False, "lenient": False}

#: One call, and any number of them.
_SHAPES = {
    ToolFormat.HERMES: (
        r'"<tool_call>\n" call "\n</tool_call>"',
        r'"<tool_call>\n" call "\n</tool_call>" ("\n<tool_call>\n" call "\n</tool_call>")*',
    ),
    ToolFormat.MISTRAL: ('"[" call "]"', '"[" call (", " call)* "]"'),
    ToolFormat.LLAMA3: ("call", "call"),
}
_ARGUMENTS_KEYS = {ToolFormat.HERMES: "arguments", ToolFormat.MISTRAL: "arguments", ToolFormat.LLAMA3: "parameters"}


def calls_in_lark(calls: ToolCalls, *, alternative: str | None = None) -> str:
    """llguidance's variant of Lark. `alternative` is the rule of an output that is no calls."""
    shape = _SHAPES[calls.format][0 if calls.is_single else 1]
    marker = "" if calls.marker_token_id is None else f"<[{calls.marker_token_id}]>? "
    any_tool = " | ".join(f"tool_{number}" for number in range(len(calls.tools)))
    key = _ARGUMENTS_KEYS[calls.format]
    rules = [rule for number, tool in enumerate(calls.tools) for rule in _rules_of(number, tool, key)]
    start = "calls" if alternative is None else f"calls | {alternative}"
    return "\n".join([f"start: {start}", f"calls: {marker}{shape}", f"call: {any_tool}", *rules])


def _rules_of(number: int, tool: CallableTool, key: str) -> tuple[str, str]:
    """The schema stands by itself, so that what it refers to is found in it. The pieces of the head are those in which
    a JSON answer is read: of a longer one, its first character would already decide for a call."""
    head = ("{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{key}"', ": ")
    schema = tool.arguments | {"x-guidance": JSON_OPTIONS}
    return (
        f'tool_{number}: {" ".join(map(json.dumps, head))} arguments_{number} "}}"',
        f"arguments_{number}: %json {json.dumps(schema)}",
    )
