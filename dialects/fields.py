"""Checks on fields before validation: limits on lengths, and the table of fields that are accepted but ignored.

The lists and objects of a body are counted before anything in them is inspected. The limits are those that the body's
JSON schema publishes, so every limit published there is enforced here.

A field may be ignored if the answer without it is one that the client could also have got with it: it describes the
client, its bill, caches or the transport; it asks for an extra that does not exist here; clients store it with a
message; or its value means the default behaviour. Fields that would change the answer but are not supported are
refused. A field that a body declares is read, whatever the table says. docs/api.md shows the table.
"""

import re
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from domain.seals import is_sealed

MAX_UNKNOWN_FIELDS = 64  # per object: up to this many are inspected one by one, to be named or ignored

Location = tuple[int | str, ...]

Schema = Mapping[str, Any]


class Overlong(NamedTuple):
    """A list or object with `length` entries, more than `bound`."""

    location: Location
    length: int
    bound: int


class UnknownFields(NamedTuple):
    """An object with too many unknown fields; `location` is that of the first one."""

    location: Location


@dataclass(frozen=True, slots=True)
class ListBounds:
    max_items: int | None
    items: "Bounds | None"


@dataclass(frozen=True, slots=True)
class ObjectBounds:
    max_entries: int | None
    field_names: frozenset[str] | None  # None: any name is allowed
    by_field: Mapping[str, "Bounds"]
    entries: "Bounds | None"  # of the values under other names


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits for a value that is a list or an object, and for the values in it."""

    of_list: ListBounds | None
    of_object: ObjectBounds | None


def first_excess(value: object, model: type[BaseModel]) -> Overlong | UnknownFields | None:
    """The first place at which a parsed body exceeds the limits of `model`. Its depth has been checked before."""
    return _excess(value, _bounds_of_model(model), ())


def _excess(value: object, bounds: Bounds | None, location: Location) -> Overlong | UnknownFields | None:
    if bounds is None:
        return None
    if isinstance(value, list) and bounds.of_list is not None:
        return _excess_of_list(value, bounds.of_list, location)
    if isinstance(value, dict) and bounds.of_object is not None:
        return _excess_of_object(value, bounds.of_object, location)
    return None


def _excess_of_list(items: list[object], bounds: ListBounds, location: Location) -> Overlong | UnknownFields | None:
    if bounds.max_items is not None and len(items) > bounds.max_items:
        return Overlong(location, len(items), bounds.max_items)
    if bounds.items is None:
        return None
    for number, item in enumerate(items):
        if (excess := _excess(item, bounds.items, (*location, number))) is not None:
            return excess
    return None


def _excess_of_object(
    fields: dict[str, object], bounds: ObjectBounds, location: Location
) -> Overlong | UnknownFields | None:
    if bounds.max_entries is not None and len(fields) > bounds.max_entries:
        return Overlong(location, len(fields), bounds.max_entries)
    if bounds.field_names is not None and len(fields) > len(bounds.field_names) + MAX_UNKNOWN_FIELDS:
        return UnknownFields((*location, next(name for name in fields if name not in bounds.field_names)))
    for name, value in fields.items():
        inner = bounds.by_field.get(name, bounds.entries)
        if inner is not None and (excess := _excess(value, inner, (*location, name))) is not None:
            return excess
    return None


@lru_cache
def _bounds_of_model(model: type[BaseModel]) -> Bounds | None:
    schema = model.model_json_schema()
    return _bounds_in(schema, schema.get("$defs", {}))


def _bounds_in(schema: object, definitions: Mapping[str, Schema]) -> Bounds | None:
    if not isinstance(schema, Mapping):
        return None  # true or absent: anything
    if "$ref" in schema:
        return _bounds_in(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if branches := (schema.get("anyOf") or schema.get("oneOf")):
        return _widest(_bounds_in(branch, definitions) for branch in branches)
    if schema.get("type") == "array":
        return Bounds(ListBounds(schema.get("maxItems"), _bounds_in(schema.get("items"), definitions)), None)
    if schema.get("type") == "object":
        return Bounds(None, _bounds_of_object(schema, definitions))
    return None


def _bounds_of_object(schema: Schema, definitions: Mapping[str, Schema]) -> ObjectBounds:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    by_field = {name: _bounds_in(part, definitions) for name, part in properties.items()}
    return ObjectBounds(
        max_entries=schema.get("maxProperties"),
        field_names=frozenset(properties) if others is False else None,
        by_field={name: bounds for name, bounds in by_field.items() if bounds is not None},
        entries=_bounds_in(others, definitions),
    )


def _widest(branches: Iterable[Bounds | None]) -> Bounds | None:
    """The widest limits of several kinds of value, as the kind of a value is determined only by validation."""
    known = [bounds for bounds in branches if bounds is not None]
    lists = [bounds.of_list for bounds in known if bounds.of_list is not None]
    objects = [bounds.of_object for bounds in known if bounds.of_object is not None]
    return Bounds(_widest_list(lists), _widest_object(objects)) if known else None


def _widest_list(lists: Sequence[ListBounds]) -> ListBounds | None:
    if len(lists) < 2:
        return lists[0] if lists else None
    return ListBounds(_largest([bounds.max_items for bounds in lists]), _widest(bounds.items for bounds in lists))


def _widest_object(objects: Sequence[ObjectBounds]) -> ObjectBounds | None:
    if len(objects) < 2:
        return objects[0] if objects else None
    fields = {name for bounds in objects for name in bounds.by_field}
    by_field = {name: _widest(bounds.by_field.get(name) for bounds in objects) for name in fields}
    known_names = [bounds.field_names for bounds in objects if bounds.field_names is not None]
    return ObjectBounds(
        max_entries=_largest([bounds.max_entries for bounds in objects]),
        field_names=frozenset().union(*known_names) if len(known_names) == len(objects) else None,
        by_field={name: bounds for name, bounds in by_field.items() if bounds is not None},
        entries=_widest(bounds.entries for bounds in objects),
    )


def _largest(bounds: Sequence[int | None]) -> int | None:
    """The largest limit; None if any of them is unlimited."""
    known = [bound for bound in bounds if bound is not None]
    return max(known) if len(known) == len(bounds) else None


HEADER = "x-ignored-fields"

MAX_NAMED = 32

#: The ignored fields of the current request; its outermost layer creates the list, so all layers below share it.
ignored_fields_context: ContextVar[list[str] | None] = ContextVar("ignored_fields", default=None)


class Hint(NamedTuple):
    """Why a field may be ignored. `values` lists the values to which this is limited, if any."""

    reason: str
    values: tuple[object, ...] = ()
    covers_item: Callable[[object], bool] | None = None  # for items that are not plain values

    def covers(self, value: object) -> bool:
        if self.covers_item is not None:
            return self.covers_item(value)
        return not self.values or any(value == known and _is_bool(value) == _is_bool(known) for known in self.values)


Hints = Mapping[str, Hint]  # by path: steps joined by dots, `*` meaning any item of a list

HintTree = dict[str, Any]  # step -> the tree of the steps after it; HERE -> the Hint of this place itself

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
    """Remove the fields that the hints cover from `body`, except its `own_fields`. List items keep their places, since
    the model must recognise them. Returns the paths of both, outer ones first."""
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
    """Each value with its name or number, and the tree after it."""
    if isinstance(part, dict):
        return [(name, part[name], steps[name]) for name in part if name in steps and name != HERE]
    if isinstance(part, list) and "*" in steps:
        return [(number, item, steps["*"]) for number, item in enumerate(part)]
    return []


def hint_at(tree: HintTree, path: Sequence[int | str]) -> Hint | None:
    for step in path:
        tree = tree.get("*" if isinstance(step, int) else step, {})
    return tree.get(HERE)


def _is_bool(value: object) -> bool:
    """For telling True from 1, which Python considers equal."""
    return isinstance(value, bool)


def note_ignored(paths: Iterable[str]) -> None:
    """Note ignored fields for the current request's answer; batch lines do not have one."""
    ignored = ignored_fields_context.get()
    if ignored is not None:
        ignored.extend(paths)


def header_value(ignored: Iterable[str]) -> str:
    """The field names in order, as many as fit a header."""
    paths = list(dict.fromkeys(ignored))
    more = [f"{len(paths) - MAX_NAMED} more"] if len(paths) > MAX_NAMED else []
    return ", ".join(paths[:MAX_NAMED] + more)


#: The types of tools other than functions: OpenAI's, and Anthropic's as bridges forward them, without their dates.
FOREIGN_TOOLS: Final = frozenset(
    {
        *("apply_patch", "bash", "code_execution", "code_interpreter", "computer", "computer_use"),
        *("computer_use_preview", "custom", "file_search", "image_generation", "local_shell", "mcp", "memory"),
        *("namespace", "programmatic_tool_calling", "shell", "text_editor", "tool_search", "tool_search_tool_bm25"),
        *("tool_search_tool_regex", "web_fetch", "web_search", "web_search_preview"),
    }
)

_DATE = re.compile(r"_(\d{8}|\d{4}_\d{2}_\d{2})$")

#: Values of `include` for things that do not exist here.
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

NEUTRAL: Final = "nothing, as this value is the default behaviour"


def is_foreign_tool(tool: object) -> bool:
    return kind_of_tool(tool) in FOREIGN_TOOLS


def kind_of_tool(tool: object) -> str:
    """Its type without the date; empty where it has none."""
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return _DATE.sub("", kind) if isinstance(kind, str) else ""


def _hints(reason: str, *names: str, places: Iterable[str] = ("",)) -> dict[str, Hint]:
    return {f"{place}{name}": Hint(reason) for name in names for place in places}


def _neutral(**values: object) -> dict[str, Hint]:
    return {name: Hint(NEUTRAL, (value,)) for name, value in values.items()}


_CALLER = "the client or its user"

_CACHE = "prompt caching, which is automatic here"

_ROUTE = "the choice of a provider, server or model, of which there is only one here"

_WIRE = "how the answer is transmitted"

_BESIDE = "an extra that is not available here"

_KEPT = "what clients store with a message or call, which is not part of the prompt"

_THOUGHTS = "earlier reasoning, which models do not read again"

HINTS: Final[Hints] = (
    _hints(_CALLER, "client_metadata", "litellm_metadata", "request_id", "session_id", "trace")
    | _hints(_CALLER, "metadata", "prompt_cache_key", "safety_identifier", "user")
    | _hints("whether the answer is stored, which only chat completions and responses can be", "store")
    | _hints(_CACHE, "cache_prompt", "cache_salt", "prompt_cache_options", "prompt_cache_retention")
    | _hints(_CACHE, "cache_control", places=("", *_MESSAGES, *_PARTS, *_CALLS, *_TOOLS))
    | _hints(_CACHE, "prompt_cache_breakpoint", places=_PARTS)
    | _hints(_ROUTE, "id_slot", "keep_alive", "models", "priority", "provider", "route", "service_tier", "slot_id")
    | _hints(_ROUTE, "transforms", "ttl")
    | _hints("a faster answer", "draft_model", "prediction")
    | _hints(_WIRE, "continuous_usage_stats", "include_obfuscation", places=("stream_options.",))
    | _hints(_BESIDE, "include_reasoning", "return_progress", "timings_per_token", "usage")
    | _hints("which library enforces a grammar", "guided_decoding_backend")
    | _hints("spaces that only vLLM's slow tokenizers add", "spaces_between_special_tokens")
    | {"include.*": Hint(_BESIDE, NOT_INCLUDED)}
    | _hints(_BESIDE, "generate_summary", "summary", places=("reasoning.",))
    | _hints("verbosity, which models here are not told about", "verbosity", "text.verbosity")
    | {"truncation": Hint("truncation of long conversations, which are refused instead", ("auto", "disabled"))}
    | _hints("shortening of long conversations, which are refused instead", "context_management")
    | {"tools.*": Hint("tools other than functions, which the model is not told about", covers_item=is_foreign_tool)}
    | _hints("how a tool is loaded, called or billed", "allowed_callers", "async", "defer_loading", places=_TOOLS)
    | _hints("inputs and outputs of a tool besides its schema", "input_examples", "output_schema", places=_TOOLS)
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
    | {"input.*.encrypted_content": Hint(_THOUGHTS, covers_item=lambda value: not is_sealed(value))}
    | _neutral(add_generation_prompt=True, add_special_tokens=False, best_of=1, continue_final_message=False)
    | _neutral(detokenize=True, dry_multiplier=0, dynatemp_range=0, early_stopping=False, echo=False)
    | _neutral(include_stop_str_in_output=False, length_penalty=1, mirostat=0)
    | _neutral(return_token_ids=False, return_tokens_as_token_ids=False, skip_special_tokens=True, tfs_z=1)
    | _neutral(do_sample=True, frequency_penalty_range=0, num_beams=1, separate_reasoning=True, stream_reasoning=True)
    | _neutral(min_keep=0, return_full_text=False, watermark=False, top_a=0)
    | _neutral(typical_p=1, use_beam_search=False, xtc_probability=0)
)

HINT_TREE: Final = tree_of(HINTS)
