"""Fields of a request that are taken and left out: the one table of them, and the header that names them.

Fields of a request that were taken and left out, and the header that names them to its client.

Fields of OpenAI's and of others that are taken and left out: the one table of them, which docs/api.md shows.

A field is here if the answer without it is one that the client could have got with it: it speaks of the client, of its
bill, of caches, or of the way that the answer takes; it asks for something beside the answer that there is not; it is
what a client keeps beside a message; or it has the value that stands for what happens anyway. What would change the
answer, and is not done, is refused. Fields that a body knows are read, whatever stands here.
"""

import re
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

HEADER = "x-ignored-fields"

MAX_NAMED = 32

#: Of the request under way; a list that the request's outermost layer makes, so that all below it share it.
ignored_fields_context: ContextVar[list[str] | None] = ContextVar("ignored_fields", default=None)


class Hint(NamedTuple):
    """Why a field may be left out. Where only some of its values may, `values` says which."""

    reason: str
    values: tuple[object, ...] = ()
    covers_item: Callable[[object], bool] | None = None  # of items that are no plain values

    def covers(self, value: object) -> bool:
        if self.covers_item is not None:
            return self.covers_item(value)
        return not self.values or any(value == known and _is_truth(value) == _is_truth(known) for known in self.values)


Hints = Mapping[str, Hint]  # by place: steps with dots between them, where `*` is any item of a list

HintTree = dict[str, Any]  # step -> the tree of the steps behind it; HERE -> the Hint of this place itself

HERE = ""


def tree_of(hints: Hints) -> HintTree:
    tree: HintTree = {}
    for place, hint in hints.items():
        part = tree
        for step in place.split("."):
            part = part.setdefault(step, {})
        part[HERE] = hint
    return tree


def take_hints(body: object, tree: HintTree, *, own_fields: Container[str] = ()) -> list[str]:
    """Take the fields that the hints cover out of `body`, but for its `own_fields`; items of lists keep their places,
    for the model to know them. The paths of both, the outer ones first."""
    found: list[str] = []
    waiting: deque[tuple[Any, HintTree, str]] = deque([(body, tree, "")])
    while waiting:
        part, steps, place = waiting.popleft()
        for name, inner, behind in _steps_into(part, steps):
            hint = None if part is body and name in own_fields else behind.get(HERE)
            if hint is None or not hint.covers(inner):
                waiting.append((inner, behind, f"{place}{name}."))
                continue
            found.append(f"{place}{name}")
            if isinstance(part, dict):
                del part[name]
    return found


def _steps_into(part: object, steps: HintTree) -> list[tuple[Any, Any, HintTree]]:
    """Each with its name or number, and the tree behind it."""
    if isinstance(part, dict):
        return [(name, part[name], steps[name]) for name in part if name in steps and name != HERE]
    if isinstance(part, list) and "*" in steps:
        return [(number, item, steps["*"]) for number, item in enumerate(part)]
    return []


def hint_at(tree: HintTree, path: Sequence[int | str]) -> Hint | None:
    for step in path:
        tree = tree.get("*" if isinstance(step, int) else step, {})
    return tree.get(HERE)


def _is_truth(value: object) -> bool:
    """Whether it is true or false, which Python counts among the numbers."""
    return isinstance(value, bool)


def note_ignored(paths: Iterable[str]) -> None:
    """For the answer of the request under way, if any: a line of a batch has none."""
    ignored = ignored_fields_context.get()
    if ignored is not None:
        ignored.extend(paths)


def header_value(ignored: Iterable[str]) -> str:
    """Their names in order, as many as a header should hold."""
    paths = list(dict.fromkeys(ignored))
    more = [f"{len(paths) - MAX_NAMED} more"] if len(paths) > MAX_NAMED else []
    return ", ".join(paths[:MAX_NAMED] + more)


#: The types of tools that are no functions: OpenAI's, and Anthropic's as bridges pass them on, without their dates.
FOREIGN_TOOLS: Final = frozenset(
    {
        *("apply_patch", "bash", "code_execution", "code_interpreter", "computer", "computer_use"),
        *("computer_use_preview", "custom", "file_search", "image_generation", "local_shell", "mcp", "memory"),
        *("namespace", "programmatic_tool_calling", "shell", "text_editor", "tool_search", "tool_search_tool_bm25"),
        *("tool_search_tool_regex", "web_fetch", "web_search", "web_search_preview"),
    }
)

_DATE = re.compile(r"_(\d{8}|\d{4}_\d{2}_\d{2})$")

#: What can be asked to be included, and is not there to be included.
NOT_INCLUDED: Final = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
)

_MESSAGES = ("messages.*.", "input.*.")

_PARTS = ("messages.*.content.*.", "input.*.content.*.", "input.*.output.*.")

_CALLS = ("messages.*.tool_calls.*.", "messages.*.tool_calls.*.function.")

_TOOLS = ("tools.*.", "tools.*.function.")

NEUTRAL: Final = "nothing: this value stands for what happens anyway"


def is_foreign_tool(tool: object) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and _DATE.sub("", kind) in FOREIGN_TOOLS


def _hints(reason: str, *names: str, places: Iterable[str] = ("",)) -> dict[str, Hint]:
    return {f"{place}{name}": Hint(reason) for name in names for place in places}


def _neutral(**values: object) -> dict[str, Hint]:
    return {name: Hint(NEUTRAL, (value,)) for name, value in values.items()}


_CALLER = "who asks, or on whose behalf"

_CACHE = "caches of prompts, which are kept here without being asked"

_ROUTE = "which provider, server or model does it when; here there is one"

_WIRE = "how the answer travels"

_BESIDE = "something beside the answer that there is not"

_KEPT = "what clients keep beside a message or a call, and no prompt has a place for"

_THOUGHTS = "what another model thought; no model reads it again"

HINTS: Final[Hints] = (
    _hints(_CALLER, "client_metadata", "litellm_metadata", "request_id", "session_id", "trace")
    | _hints(_CALLER, "metadata", "prompt_cache_key", "safety_identifier", "user")
    | _hints("whether the answer is kept: only those of chats and responses can be", "store")
    | _hints(_CACHE, "cache_prompt", "cache_salt", "prompt_cache_options", "prompt_cache_retention")
    | _hints(_CACHE, "cache_control", places=("", *_MESSAGES, *_PARTS, *_CALLS, *_TOOLS))
    | _hints(_CACHE, "prompt_cache_breakpoint", places=_PARTS)
    | _hints(_ROUTE, "id_slot", "keep_alive", "models", "priority", "provider", "route", "service_tier", "slot_id")
    | _hints(_ROUTE, "transforms", "ttl")
    | _hints("that the answer comes sooner", "draft_model", "prediction")
    | _hints(_WIRE, "continuous_usage_stats", "include_obfuscation", places=("stream_options.",))
    | _hints(_BESIDE, "include_reasoning", "return_progress", "timings_per_token", "usage")
    | {"include.*": Hint(_BESIDE, NOT_INCLUDED)}
    | _hints(_BESIDE, "generate_summary", "summary", places=("reasoning.",))
    | _hints("how wordy the answer should be, which no model here is told", "verbosity", "text.verbosity")
    | {
        "truncation": Hint(
            "that a conversation be cut where it is too long; it is refused instead", ("auto", "disabled")
        )
    }
    | {"tools.*": Hint("tools that are no functions; the model is not told of them", covers_item=is_foreign_tool)}
    | _hints("how a tool is loaded, called or billed", "allowed_callers", "async", "defer_loading", places=_TOOLS)
    | _hints("what a tool takes and gives, beside its schema", "input_examples", "output_schema", places=_TOOLS)
    | _hints(_KEPT, "created", "created_at", "created_by", "extra_content", "metadata", places=_MESSAGES)
    | _hints(_KEPT, "model", "object", "provider_specific_fields", "timestamp", places=_MESSAGES)
    | _hints(_KEPT, "annotations", "finish_reason", "id", "index", "parsed", "status", "type", places=("messages.*.",))
    | _hints(_KEPT, "async", "caller", "namespace", "parsed_arguments", places=("input.*.",))
    | _hints(_KEPT, "caller", "extra_content", "namespace", "parsed", "parsed_arguments", places=_CALLS)
    | _hints(_KEPT, "provider_specific_fields", "thought_signature", places=_CALLS)
    | _hints(_KEPT, "citations", "extra_content", "id", "index", "parsed", "provider_specific_fields", places=_PARTS)
    | _hints(_KEPT, "annotations", "logprobs", places=("messages.*.content.*.",))
    | _hints(_THOUGHTS, "reasoning", "reasoning_details", "reasoning_items", "thinking", places=("messages.*.",))
    | _hints(_THOUGHTS, "thinking_blocks", places=("messages.*.",))
    | _hints(_THOUGHTS, "encrypted_content", places=("input.*.",))
    | _neutral(add_generation_prompt=True, add_special_tokens=False, best_of=1, continue_final_message=False)
    | _neutral(detokenize=True, dry_multiplier=0, dynatemp_range=0, early_stopping=False, echo=False)
    | _neutral(include_stop_str_in_output=False, length_penalty=1, mirostat=0, n_predict=-1, repeat_penalty=1)
    | _neutral(return_token_ids=False, return_tokens_as_token_ids=False, skip_special_tokens=True, tfs_z=1)
    | _neutral(spaces_between_special_tokens=True, top_a=0, typical_p=1, use_beam_search=False, xtc_probability=0)
)

HINT_TREE: Final = tree_of(HINTS)
