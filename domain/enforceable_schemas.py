"""A schema without what cannot be enforced: for whoever did not ask for strictness.

JSON Schema 2020-12 (core, 6.5 and validation, 7.2.1) makes annotations of unknown keywords and formats. What can be
said in another way is: `nullable` as a type, `propertyNames` as properties, `oneOf` as `anyOf`.
"""

import itertools
import re
from typing import Any

from domain.schema_bounds import MAX_PATTERN_CHARS, MAX_REPEAT, holds_long_repetition
from domain.schema_keywords import (
    COUNT_KEYWORDS,
    FORMATS,
    TREATMENTS,
    JsonSchema,
    Treatment,
    is_foreign_regex,
    list_of,
    map_of,
    with_children,
)
from domain.schema_references import local_reference

#: Beyond it neighbouring integers are the same double (RFC 8259, section 6), and a bound could not be kept exactly.
MAX_BOUND = 2**53
MIN_BOUND = 1e-15  # but for 0
MAX_DIVISOR, MIN_DIVISOR = 10_000, 1e-9  # of multipleOf: a divisor has as many states as its size
_BEGINNING = re.compile(r"\^([A-Za-z0-9_-]+)(?![*?{+|])")  # characters that every name must begin with
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def enforceable(schema: Any) -> Any:
    """`schema` is as `schema_references.gather` makes it, and `check_structure` passed."""
    if not isinstance(schema, dict):
        return schema
    said_otherwise = _with_conditional_properties(_with_numeric_bounds(_with_prefix_items(schema)))
    said_otherwise = _with_names_as_properties(said_otherwise)
    kept = {
        keyword: value
        for keyword, value in said_otherwise.items()
        if TREATMENTS.get(keyword) is Treatment.ENFORCED and _is_enforceable(keyword, value, said_otherwise)
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
    """Tuples as drafts before 2020-12 write them."""
    if not isinstance(schema.get("items"), list):
        return schema
    others = {keyword: value for keyword, value in schema.items() if keyword not in ("items", "additionalItems")}
    rest = {"items": schema["additionalItems"]} if "additionalItems" in schema else {}
    return others | {"prefixItems": schema["items"]} | rest


def _with_numeric_bounds(schema: JsonSchema) -> JsonSchema:
    """`exclusiveMinimum: true` beside `minimum`, as in draft 4 and OpenAPI 3.0."""
    changed = dict(schema)
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if changed.get(exclusive) is True and inclusive in changed:
            changed[exclusive] = changed.pop(inclusive)
    return changed


def _with_names_as_properties(schema: JsonSchema) -> JsonSchema:
    """`propertyNames` of known names, and `patternProperties` that cannot be told apart or followed."""
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
    """Properties that are listed under a condition only are still listed."""
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
    """At least one branch for exactly one: whether branches overlap cannot be told."""
    branches = schema.get("oneOf")
    if not isinstance(branches, list):
        return schema
    others = {keyword: value for keyword, value in schema.items() if keyword != "oneOf"}
    if "anyOf" not in others:
        return others | {"anyOf": branches}
    return others | {"allOf": [*list_of(others, "allOf"), {"anyOf": branches}]}


def _with_null(schema: JsonSchema, asked: JsonSchema) -> JsonSchema:
    """OpenAPI 3.0's `nullable`."""
    if asked.get("nullable") is not True or not schema:
        return schema
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    bare = {keyword: value for keyword, value in schema.items() if keyword != "$defs"}
    return {"anyOf": [bare, {"type": "null"}]} | definitions
