"""Rewrites JSON schemas: closed, as strict tools require, or reduced to what can be enforced.

Closed (`closed`): JSON Schema lets an object have unlisted properties, but a function takes only listed arguments. So
an object is closed, at every depth, wherever it has `properties` but not `additionalProperties`. If its properties are
spread over `allOf`, `$ref` and the branches of `anyOf`, it is closed as a whole, as `unevaluatedProperties: false`
would do.

Reduced (`enforceable`): for clients that did not ask for strictness. JSON Schema 2020-12 (core, 6.5 and validation,
7.2.1) treats unknown keywords and formats as annotations, so what cannot be enforced is removed. Some keywords are
expressed in another way instead: `nullable` as a type, `propertyNames` as properties, `oneOf` as `anyOf`.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from domain.json_schemas import (
    COUNT_KEYWORDS,
    DEFINITIONS,
    FORMATS,
    TREATMENTS,
    JsonSchema,
    Treatment,
    is_foreign_regex,
    list_of,
    local_reference,
    map_of,
    with_children,
)
from domain.structured_output import MAX_PATTERN_CHARS, MAX_REPEAT, holds_long_repetition

MAX_CLOSED_SCHEMAS = 4_096  # per schema; a definition is closed separately for each path that leads to it

FREE_DEPTH = 5  # of unconstrained values, which a model might otherwise nest endlessly

_PARTS = ("allOf", "anyOf", "oneOf")

_SHAPING = frozenset({"properties", "patternProperties", "additionalProperties", "enum", "const"})

_NO_NAMES: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Declared:
    """What a schema and all that applies to the same value declare about properties. `is_listed`: properties are
    listed, even if the list is empty. `is_open`: others are allowed."""

    names: dict[str, None] = field(default_factory=dict)  # in their order
    patterns: dict[str, None] = field(default_factory=dict)
    is_listed: bool = False
    is_open: bool = False


def closed(schema: JsonSchema, *, is_strict: bool) -> JsonSchema:
    """The schema with all objects closed. `schema` must be a result of `json_schemas.gather`. A strict one is closed
    even where it is explicitly open. Raises ValueError."""
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError(f"type at # is {str(kind)[:64]!r}, but a function's arguments are an object; use object")
    closer = _Closer(map_of(schema, "$defs"), is_strict)
    bare = {keyword: value for keyword, value in schema.items() if keyword != "$defs"}
    if not {"$ref", *_PARTS, *_SHAPING} & set(bare):
        bare["properties"] = {}
    whole = closer.close(bare, _NO_NAMES)
    closer.finish()
    typed = {} if "$ref" in whole else {"type": "object"}
    definitions = closer.made | (_free_values() if closer.has_free_values else {})
    return {**whole, **typed, "$defs": definitions}


@dataclass(slots=True)
class _Closer:
    definitions: dict[str, Any]
    is_strict: bool
    made: dict[str, Any] = field(default_factory=dict)
    has_free_values: bool = False
    _names: dict[tuple[str, frozenset[str] | None], str] = field(default_factory=dict)
    _waiting: list[tuple[str, str, frozenset[str] | None]] = field(default_factory=list)
    _num_seen: int = 0

    def close(self, schema: Any, outside: frozenset[str]) -> Any:
        """`outside` has the names of properties that are declared elsewhere for the same value."""
        if not isinstance(schema, dict):
            return schema
        self._count()
        reference = _definition_of(schema)
        if reference is not None and set(schema) == {"$ref"}:
            return self._refer(reference, outside)
        own, declared = self._with_closed_values(schema), self._declared(schema)
        if declared.is_open:
            return _with_parts(own, self.open)
        if not declared.is_listed and not outside:
            return self._bounded(_with_parts(own, lambda part: self.close(part, _NO_NAMES)))
        parts = [keyword for keyword in _PARTS if keyword in schema]
        if reference is None and len(parts) == 1 and parts != ["allOf"]:
            return _with_parts(own, lambda part: self.close(part, outside.union(_own_names(schema))))
        return _shut(_with_parts(own, self.open), declared, outside)

    def open(self, schema: Any) -> Any:
        """Close only the values inside."""
        if not isinstance(schema, dict):
            return schema
        self._count()
        return _with_parts(self._with_closed_values(schema), self.open)

    def finish(self) -> None:
        """Build the definitions that are referred to."""
        while self._waiting:
            name, definition, outside = self._waiting.pop()
            target = self.definitions[definition]
            self.made[name] = self.open(target) if outside is None else self.close(target, outside)

    def _declared(self, schema: JsonSchema) -> _Declared:
        said, visited, waiting = _Declared(), set[str](), [schema]
        while waiting:
            found = waiting.pop()
            if not isinstance(found, dict):
                continue
            self._count()
            said.names |= _own_names(found)
            said.patterns |= dict.fromkeys(map_of(found, "patternProperties"))
            said.is_listed = said.is_listed or "properties" in found or "patternProperties" in found
            said.is_open = said.is_open or self._is_open(found)
            parts = [part for keyword in _PARTS for part in list_of(found, keyword)]
            reference = _definition_of(found)
            if reference is not None and reference not in visited:
                visited.add(reference)
                parts.insert(0, self.definitions[reference])
            waiting += reversed(parts)
        return said

    def _is_open(self, schema: JsonSchema) -> bool:
        if self.is_strict and "properties" in schema:
            return False
        return schema.get("additionalProperties", False) is not False

    def _with_closed_values(self, schema: JsonSchema) -> JsonSchema:
        """Close the schemas of values inside; parts that apply to the same value stay as they are."""
        here = {keyword: value for keyword, value in schema.items() if keyword not in _PARTS}
        parts = {keyword: value for keyword, value in schema.items() if keyword in _PARTS}
        reference = _definition_of(schema)
        referred = {} if reference is None else self._refer(reference, None)
        return with_children(here, lambda child, _: self._close_value(child)) | parts | referred

    def _close_value(self, schema: Any) -> Any:
        if schema is True or schema == {}:
            return self._free(FREE_DEPTH)
        if isinstance(schema, dict) and not {"type", "$ref", *_PARTS, *_SHAPING} & set(schema):
            return {"allOf": [self.open(schema), self._free(FREE_DEPTH)]}
        return self.close(schema, _NO_NAMES)

    def _bounded(self, schema: JsonSchema) -> JsonSchema:
        """Limit the depth of unconstrained objects and lists; in a strict schema, such objects are empty."""
        kinds = schema.get("type")
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if "object" in kinds and not _SHAPING & set(schema):
            schema = schema | {"additionalProperties": False if self.is_strict else self._free(FREE_DEPTH - 1)}
        if "array" in kinds and not {"items", "prefixItems", "enum", "const"} & set(schema):
            schema = schema | {"items": self._free(FREE_DEPTH - 1)}
        return schema

    def _refer(self, definition: str, outside: frozenset[str] | None) -> JsonSchema:
        """A reference to the definition, closed together with the names in `outside`, or left open (None)."""
        key = (definition, outside)
        if key not in self._names:
            name = self._names[key] = str(len(self._names))
            self._waiting.append((name, definition, outside))
        return {"$ref": f"{DEFINITIONS}{self._names[key]}"}

    def _free(self, depth: int) -> JsonSchema:
        self.has_free_values = True
        return _free_value(depth)

    def _count(self) -> None:
        self._num_seen += 1
        if self._num_seen > MAX_CLOSED_SCHEMAS:
            raise ValueError("its references can be combined in too many ways; use fewer in allOf and anyOf")


def _definition_of(schema: JsonSchema) -> str | None:
    reference = local_reference(schema)
    return None if reference is None else reference.removeprefix(DEFINITIONS)


def _own_names(schema: JsonSchema) -> dict[str, None]:
    """The names of the schema's own properties; required ones count, too."""
    if "properties" not in schema and "patternProperties" not in schema:
        return {}
    required = [name for name in list_of(schema, "required") if isinstance(name, str)]
    return dict.fromkeys([*map_of(schema, "properties"), *required])


def _shut(own: JsonSchema, declared: _Declared, outside: frozenset[str]) -> JsonSchema:
    kind = own.get("type")
    is_object = kind in (None, "object") or (isinstance(kind, list) and "object" in kind)
    if not is_object or own.get("additionalProperties") is False:
        return own
    given = map_of(own, "properties")
    others = [name for name in [*declared.names, *sorted(outside)] if name not in given]
    shut = own | {"properties": given | dict.fromkeys(others, True)}
    if declared.patterns:
        shut |= {"patternProperties": dict.fromkeys(declared.patterns, True) | map_of(own, "patternProperties")}
    typed = {"type": "object"} if kind is None and "properties" in own else {}
    return shut | typed | {"additionalProperties": False}


def _with_parts(own: JsonSchema, change: Callable[[Any], Any]) -> JsonSchema:
    return own | {keyword: [change(part) for part in list_of(own, keyword)] for keyword in _PARTS if keyword in own}


def _free_value(depth: int) -> JsonSchema:
    return {"$ref": f"{DEFINITIONS}free{depth}"}


def _free_values() -> dict[str, JsonSchema]:
    scalars = ["string", "number", "boolean", "null"]
    values: dict[str, JsonSchema] = {"free0": {"type": scalars}}
    for depth in range(1, FREE_DEPTH + 1):
        inner = _free_value(depth - 1)
        kinds = [*scalars, "array", "object"]
        values[f"free{depth}"] = {"type": kinds, "items": inner, "additionalProperties": inner}
    return values


#: Beyond this, neighbouring integers are the same double (RFC 8259, section 6), so a bound could not be enforced
#: exactly.
MAX_BOUND = 2**53

MIN_BOUND = 1e-15  # except 0

MAX_DIVISOR, MIN_DIVISOR = 10_000, 1e-9  # of multipleOf: the automaton has as many states as the divisor

_BEGINNING = re.compile(r"\^([A-Za-z0-9_-]+)(?![*?{+|])")  # characters that every name must begin with

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def enforceable(schema: Any) -> Any:
    """The schema without what cannot be enforced. `schema` must be a result of `json_schemas.gather` that has passed
    `check_structure`."""
    if not isinstance(schema, dict):
        return schema
    expressed = _with_conditional_properties(_with_numeric_bounds(_with_prefix_items(schema)))
    expressed = _with_names_as_properties(expressed)
    kept = {
        keyword: value
        for keyword, value in expressed.items()
        if TREATMENTS.get(keyword) is Treatment.ENFORCED and _is_enforceable(keyword, value, expressed)
    }
    kept = with_children(kept, lambda child, _: enforceable(child))
    return _with_null(_with_any_of(kept), schema)


def _is_enforceable(keyword: str, value: Any, schema: JsonSchema) -> bool:
    if keyword in COUNT_KEYWORDS:
        least = max(1, len(list_of(schema, "required")))
        bound = least if keyword == "minProperties" else MAX_REPEAT
        return _is_number(value) and 0 <= value <= bound and value == int(value)
    if keyword in _BOUNDS:
        return _is_number(value) and (value == 0 or MIN_BOUND <= abs(value) <= MAX_BOUND)
    if keyword == "multipleOf":
        return _is_number(value) and MIN_DIVISOR <= value <= MAX_DIVISOR
    if keyword == "pattern":
        return isinstance(value, str) and _is_followed(value)
    if keyword == "format":
        return value in FORMATS and schema.get("type") in (None, "string", ["string"], ["string", "null"])
    if keyword == "$ref":
        return local_reference(schema) is not None
    return keyword != "required" or isinstance(value, list)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_followed(pattern: str) -> bool:
    is_short = len(pattern) <= MAX_PATTERN_CHARS and not holds_long_repetition(pattern)
    return is_short and not is_foreign_regex(pattern)


def _with_prefix_items(schema: JsonSchema) -> JsonSchema:
    """Tuples in the syntax of drafts before 2020-12, as `prefixItems`."""
    if not isinstance(schema.get("items"), list):
        return schema
    others = {keyword: value for keyword, value in schema.items() if keyword not in ("items", "additionalItems")}
    rest = {"items": schema["additionalItems"]} if "additionalItems" in schema else {}
    return others | {"prefixItems": schema["items"]} | rest


def _with_numeric_bounds(schema: JsonSchema) -> JsonSchema:
    """`exclusiveMinimum: true` beside `minimum`, as in draft 4 and OpenAPI 3.0, as a number."""
    changed = dict(schema)
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if changed.get(exclusive) is True and inclusive in changed:
            changed[exclusive] = changed.pop(inclusive)
    return changed


def _with_names_as_properties(schema: JsonSchema) -> JsonSchema:
    """`propertyNames` as properties; drops `patternProperties` that overlap or cannot be enforced."""
    changed = dict(schema)
    names = changed.pop("propertyNames", None)
    known = list_of(names, "enum") if isinstance(names, dict) else []
    value = changed.get("additionalProperties", True)
    if known and not map_of(changed, "properties") and "patternProperties" not in changed and value is not False:
        changed |= {"properties": {name: value for name in known if isinstance(name, str)}}
        changed["additionalProperties"] = False
    patterns = map_of(changed, "patternProperties")
    if patterns and not _can_be_told_apart([*patterns]):
        del changed["patternProperties"]
        changed["additionalProperties"] = {"anyOf": [*patterns.values()]}
    return changed


def _can_be_told_apart(patterns: list[str]) -> bool:
    if not all(map(_is_followed, patterns)):
        return False
    beginnings = [found[1] if (found := _BEGINNING.match(pattern)) else "" for pattern in patterns]
    pairs = itertools.permutations(beginnings, 2)
    return not any(longer.startswith(shorter) for shorter, longer in pairs)


def _with_conditional_properties(schema: JsonSchema) -> JsonSchema:
    """Properties that are listed only under a condition count as listed."""
    conditional = [schema.get("then"), schema.get("else"), *map_of(schema, "dependentSchemas").values()]
    listed: dict[str, list[Any]] = {}
    for part in conditional:
        for name, value in map_of(part, "properties").items() if isinstance(part, dict) else ():
            listed.setdefault(name, []).append(value)
    if not listed:
        return schema
    optional = {name: values[0] if len(values) == 1 else {"anyOf": values} for name, values in listed.items()}
    return schema | {"properties": map_of(schema, "properties") | (optional | map_of(schema, "properties"))}


def _with_any_of(schema: JsonSchema) -> JsonSchema:
    """`oneOf` as `anyOf`: whether branches overlap cannot be determined."""
    branches = schema.get("oneOf")
    if not isinstance(branches, list):
        return schema
    others = {keyword: value for keyword, value in schema.items() if keyword != "oneOf"}
    if "anyOf" not in others:
        return others | {"anyOf": branches}
    return others | {"allOf": [*list_of(others, "allOf"), {"anyOf": branches}]}


def _with_null(schema: JsonSchema, asked: JsonSchema) -> JsonSchema:
    """OpenAPI 3.0's `nullable`, as a branch of `anyOf`."""
    if asked.get("nullable") is not True or not schema:
        return schema
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    bare = {keyword: value for keyword, value in schema.items() if keyword != "$defs"}
    return {"anyOf": [bare, {"type": "null"}]} | definitions
