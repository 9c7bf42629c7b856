"""What a JSON schema may be before anything is spent on it: small, shallow, self-contained, made of known keywords.

Whether it can be compiled is found out elsewhere (`tasks/grammars.py`); here it is only looked at, in linear time.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

MAX_SCHEMA_BYTES = 16_384
MAX_SCHEMA_DEPTH = 16
MAX_VALUE_DEPTH = 64
MAX_PROPERTIES = 512
MAX_ENUM_VALUES = 1_024
MAX_REPEAT = 4_096
MAX_PATTERN_CHARS = 512

_SCHEMA_KEYWORDS = ("items", "additionalItems", "additionalProperties")
_SCHEMA_LIST_KEYWORDS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
_SCHEMA_MAP_KEYWORDS = ("properties", "patternProperties", "$defs", "definitions")
_COUNT_KEYWORDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_OTHER_KEYWORDS = (
    *("$ref", "type", "const", "enum", "required", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
#: They say nothing about what is valid (JSON Schema 2020-12, sections 8 and 9; `discriminator` is OpenAPI's).
_ANNOTATIONS = (
    *("$schema", "$id", "$comment", "title", "description", "default", "example", "examples", "discriminator"),
    *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType"),
)
_KNOWN = frozenset(
    {
        *(*_SCHEMA_KEYWORDS, *_SCHEMA_LIST_KEYWORDS, *_SCHEMA_MAP_KEYWORDS),
        *(*_COUNT_KEYWORDS, *_OTHER_KEYWORDS, *_ANNOTATIONS),
    }
)
# A repetition of a regular expression; \{, \x{...}, \u{...} and \p{...} are none.
_REPETITION = re.compile(r"(?<!\\)(?<!\\[xuU])\{(\d+)(?:,(\d*))?\}")

JsonSchema = dict[str, Any]


def check_schema(schema: JsonSchema) -> None:
    """Raises ValueError with the place, the value seen and the remedy."""
    _check_values(schema)
    num_bytes = len(json.dumps(schema, separators=(",", ":"), ensure_ascii=False).encode())
    if num_bytes > MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema has {num_bytes} bytes; at most {MAX_SCHEMA_BYTES} are taken: shorten it")
    num_properties = num_enum_values = 0
    for subschema, place in _subschemas(schema):
        _check_keywords(subschema, place)
        _check_counts(subschema, place)
        _check_least_properties(subschema, place)
        _check_reference(subschema, place)
        for pattern in _patterns(subschema):
            check_regex(pattern, f"the pattern at {place}")
        num_properties += len(_map_of(subschema, "properties"))
        num_enum_values += len(subschema["enum"]) if isinstance(subschema.get("enum"), list) else 0
    _check_total("properties", num_properties, MAX_PROPERTIES)
    _check_total("enum values", num_enum_values, MAX_ENUM_VALUES)


def check_regex(regex: str, name: str) -> None:
    """Raises ValueError. A regular expression that passes may still be refused when it is compiled."""
    if len(regex) > MAX_PATTERN_CHARS:
        raise ValueError(f"{name} has {len(regex)} characters; at most {MAX_PATTERN_CHARS} are taken: shorten it")
    check_repetitions(regex, name)


def check_repetitions(text: str, name: str) -> None:
    """Raises ValueError for an {m,n} that is too large."""
    for repetition in _REPETITION.finditer(text):
        if any(int(number[:9]) > MAX_REPEAT for number in repetition.groups() if number):
            raise ValueError(f"{name} repeats {repetition[0][:24]} times; at most {MAX_REPEAT} are taken: lower it")


def _subschemas(schema: JsonSchema) -> Iterator[tuple[JsonSchema, str]]:
    """The schema and all schemas in it, each with its place as a JSON pointer. Raises ValueError for a deep one."""
    waiting: list[tuple[Any, str, int]] = [(schema, "#", 1)]
    while waiting:
        found, place, depth = waiting.pop()
        if not isinstance(found, dict):
            continue  # true, false, or what the compiler will refuse
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(
                f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep at {place}; use $defs and $ref"
            )
        yield found, place
        waiting += [(child, f"{place}/{path}", depth + 1) for child, path in _children(found)]


def _children(schema: JsonSchema) -> Iterator[tuple[Any, str]]:
    for keyword in _SCHEMA_KEYWORDS:
        yield schema.get(keyword), keyword
    for keyword in _SCHEMA_LIST_KEYWORDS:
        children = schema.get(keyword)
        for number, child in enumerate(children if isinstance(children, list) else ()):
            yield child, f"{keyword}/{number}"
    for keyword in _SCHEMA_MAP_KEYWORDS:
        for name, child in _map_of(schema, keyword).items():
            yield child, f"{keyword}/{name[:64]}"


def _map_of(schema: JsonSchema, keyword: str) -> dict[str, Any]:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}


def _patterns(schema: JsonSchema) -> list[str]:
    pattern = schema.get("pattern")
    return [*_map_of(schema, "patternProperties"), *([pattern] if isinstance(pattern, str) else ())]


def _check_keywords(schema: JsonSchema, place: str) -> None:
    """A keyword that would be ignored is refused: a misspelt bound is no bound."""
    unknown = next((word for word in schema if word not in _KNOWN and not _is_extension(word)), None)
    if unknown is None:
        return
    close = difflib.get_close_matches(unknown[:64], _KNOWN, n=1)
    remedy = f"did you mean {close[0]}?" if close else "remove it"
    raise ValueError(f"{unknown[:64]!r} at {place} is not a supported JSON schema keyword; {remedy}")


def _is_extension(keyword: str) -> bool:
    """OpenAPI's `x-...` are notes; `x-guidance` is the compiler's own, and would change what is enforced."""
    return keyword.startswith("x-") and keyword != "x-guidance"


def _check_counts(schema: JsonSchema, place: str) -> None:
    for keyword in _COUNT_KEYWORDS:
        count = schema.get(keyword)
        if isinstance(count, int | float) and count > MAX_REPEAT:
            raise ValueError(f"{keyword} at {place} is {count}; at most {MAX_REPEAT} are taken: lower it")


def _check_least_properties(schema: JsonSchema, place: str) -> None:
    """Names that the schema does not list may come twice in the output, and would count once."""
    least, required = schema.get("minProperties"), schema.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > max(1, num_required):
        raise ValueError(
            f"minProperties at {place} is {least}, more than the {num_required} required properties; "
            "name those that must be there in required"
        )


def _check_reference(schema: JsonSchema, place: str) -> None:
    reference = schema.get("$ref")
    if isinstance(reference, str) and not (reference == "#" or reference.startswith("#/")):
        raise ValueError(
            f"$ref at {place} is {reference[:64]!r}; only references within the schema (#/$defs/...) are followed"
        )
    if "$id" in schema and place != "#":
        raise ValueError(f"$id at {place} is within the schema; only the whole schema may have one: remove it")


def _check_total(what: str, number: int, bound: int) -> None:
    if number > bound:
        raise ValueError(f"the schema has {number} {what} in all; at most {bound} are taken: remove some")


def _check_values(schema: JsonSchema) -> None:
    """Numbers that a 64-bit reader would refuse or change, nesting that a recursive one could not follow, and more
    values than there may be bytes, of which no more than that are looked at."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    num_values = 1
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_VALUE_DEPTH:
            raise ValueError(f"the schema's values are nested more than {MAX_VALUE_DEPTH} levels deep; flatten them")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("the schema holds a number that is not finite; send one within 64 bits")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"the schema holds an integer of {value.bit_length()} bits; send one within 64 bits")
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        num_values += len(children)
        if num_values > MAX_SCHEMA_BYTES:
            raise ValueError(
                f"the schema has more than {MAX_SCHEMA_BYTES} values; at most so many bytes are taken: shorten it"
            )
        waiting += [(child, depth + 1) for child in children]
