"""Fields of Anthropic's request bodies that are accepted, ignored, and named in the answer.

The rule is that of dialects/fields.py: the answer without the field is one that the client could also have got with it.
docs/anthropic.md has the table.
"""

from collections.abc import Iterable
from typing import Final

from dialects.fields import FOREIGN_TOOLS, Hint, Hints, kind_of_tool, tree_of

#: Types of tools without a schema, without their dates. These tools run at Anthropic, or only its models know them.
FOREIGN_ANTHROPIC_TOOLS: Final = FOREIGN_TOOLS - {"custom"} | {"browser_toolset", "computer_toolset", "mcp_toolset"}


def is_foreign_anthropic_tool(tool: object) -> bool:
    return kind_of_tool(tool) in FOREIGN_ANTHROPIC_TOOLS


_MESSAGE = "messages.*."

_BLOCK = "messages.*.content.*."

_INNER_BLOCK = "messages.*.content.*.content.*."  # within a tool's result


def _hints(reason: str, *names: str, places: Iterable[str] = ("",)) -> dict[str, Hint]:
    return {f"{place}{name}": Hint(reason) for name in names for place in places}


_KEPT = "what clients store with a message or block, which is not part of the prompt"

ANTHROPIC_HINTS: Final[Hints] = (
    _hints("prompt caching, which is automatic here", "cache_control", places=("", "system.*.", _MESSAGE, "tools.*."))
    | _hints("prompt caching, which is automatic here", "cache_control", places=(_BLOCK, _INNER_BLOCK))
    | _hints("the client or its bill", "billing_policy", "fallback_credit_token", "user_profile_id")
    | _hints("the choice of a provider, server or model, of which there is only one here", "fallbacks", "inference_geo")
    | _hints("a faster answer", "speed")
    | _hints("an extra that is not available here", "betas", "diagnostics")
    | _hints("shortening of long conversations, which are refused instead", "compaction", "context_management")
    | _hints("tools that run elsewhere, which the model is not told about", "mcp_servers")
    | {
        "tools.*": Hint(
            "tools without a schema, which the model is not told about", covers_item=is_foreign_anthropic_tool
        )
    }
    | _hints(
        "how a tool is loaded, called or billed",
        *("allowed_callers", "defer_loading", "eager_input_streaming"),
        places=("tools.*.",),
    )
    | _hints("inputs of a tool besides its schema", "input_examples", places=("tools.*.",))
    | _hints(_KEPT, "citations", places=("system.*.", _BLOCK, _INNER_BLOCK))
    | _hints(_KEPT, "caller", "parsed_output", "toolset_name", places=(_BLOCK,))
    | _hints(_KEPT, "container", "diagnostics", "id", "model", "stop_details", "stop_reason", places=(_MESSAGE,))
    | _hints(_KEPT, "context_management", "stop_sequence", "type", "usage", places=(_MESSAGE,))
)

ANTHROPIC_HINT_TREE: Final = tree_of(ANTHROPIC_HINTS)
