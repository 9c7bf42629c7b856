"""What becomes of each JSON schema keyword: it is enforced, says nothing about what is valid, or cannot be enforced.

`tests/unit/test_schema_keywords.py` holds the table to what llguidance really does.
"""

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

JsonSchema = dict[str, Any]


class Treatment(StrEnum):
    ENFORCED = "enforced"
    ANNOTATION = "annotation"  # never sent to the compiler, and not counted against its bounds
    NOT_ENFORCED = "not enforced"  # refused where the schema is strict, left out where it is not


#: Keywords whose value is a schema, a list of schemas (`items` in drafts before 2020-12), or schemas by name.
SCHEMAS = frozenset(
    {"items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"}
    | {"unevaluatedItems", "unevaluatedProperties"}
)
SCHEMA_LISTS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems", "items"})
SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
COUNT_KEYWORDS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")

_ENFORCED = (
    *("properties", "patternProperties", "additionalProperties", "items", "additionalItems", "prefixItems"),
    *("anyOf", "allOf", "oneOf", "$defs", "definitions", *COUNT_KEYWORDS),
    *("$ref", "type", "const", "enum", "required", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
#: JSON Schema 2020-12, sections 8 and 9 of the core and 8 and 9 of the validation vocabulary, where contentEncoding and
#: contentMediaType are annotations, too; `discriminator`, `xml`, `externalDocs` and `example` are OpenAPI's.
_ANNOTATIONS = (
    *("$schema", "$id", "id", "$comment", "$vocabulary", "title", "description", "default", "examples"),
    *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "contentSchema"),
    *("example", "discriminator", "xml", "externalDocs"),
)
_NOT_ENFORCED = (
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
    *("propertyNames", "unevaluatedProperties", "nullable"),
    *("$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"),
)
TREATMENTS = (
    dict.fromkeys(_ENFORCED, Treatment.ENFORCED)
    | dict.fromkeys(_ANNOTATIONS, Treatment.ANNOTATION)
    | dict.fromkeys(_NOT_ENFORCED, Treatment.NOT_ENFORCED)
)
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"}
)

#: What the Rust regex crate and llguidance have not: look-around, atomic groups, word boundaries, back-references, and
#: the escapes and empty classes of other dialects.
_FOREIGN_REGEX = re.compile(r"\(\?(?:[=!>]|<[=!])|\\(?:[^\W_aftnrvxuUpPdDsSwWAz])|\[\^?\]")
_ESCAPED_BACKSLASH = re.compile(r"\\\\")


def is_annotation(keyword: str) -> bool:
    """OpenAPI's `x-...` are notes, all but `x-guidance`: that is the compiler's own, and changes what is enforced."""
    return TREATMENTS.get(keyword) is Treatment.ANNOTATION or (keyword.startswith("x-") and keyword != "x-guidance")


def is_foreign_regex(pattern: str) -> bool:
    """Whether it uses what cannot be followed. One that uses nothing of that may still be none at all."""
    return _FOREIGN_REGEX.search(_ESCAPED_BACKSLASH.sub("", pattern)) is not None


def children_of(schema: JsonSchema) -> Iterator[tuple[Any, str]]:
    """The schemas directly within, each with its path."""
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAPS and isinstance(value, dict):
            yield from ((child, f"{keyword}/{_escaped(name)}") for name, child in value.items())
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            yield from ((child, f"{keyword}/{number}") for number, child in enumerate(value))
        elif keyword in SCHEMAS:
            yield value, keyword


def with_children(schema: JsonSchema, change: Callable[[Any, str], Any]) -> JsonSchema:
    """A copy in which each schema directly within is what `change` makes of it and its path."""
    changed: JsonSchema = {}
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAPS and isinstance(value, dict):
            changed[keyword] = {name: change(child, f"{keyword}/{_escaped(name)}") for name, child in value.items()}
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            changed[keyword] = [change(child, f"{keyword}/{number}") for number, child in enumerate(value)]
        elif keyword in SCHEMAS:
            changed[keyword] = change(value, keyword)
        else:
            changed[keyword] = value
    return changed


def map_of(schema: JsonSchema, keyword: str) -> dict[str, Any]:
    value = schema.get(keyword)
    return value if isinstance(value, dict) else {}


def list_of(schema: JsonSchema, keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def without_annotations(schema: Any) -> Any:
    """A copy of what the compiler has to know. `schema` is no deeper than `schema_bounds.MAX_VALUE_DEPTH`."""
    if not isinstance(schema, dict):
        return schema
    kept = {keyword: value for keyword, value in schema.items() if not is_annotation(keyword)}
    return with_children(kept, lambda child, _: without_annotations(child))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
