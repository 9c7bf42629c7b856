"""JSON schemas: which keywords are enforced, traversal, and the resolution of references.

`tests/unit/test_schema_keywords.py` compares the table of keywords with what llguidance really does.

`$ref` may point anywhere in a schema; some generators write `#/properties/from`. Rewriting the schema would break such
a pointer, so each target first becomes a definition of its own (`gather`).
"""

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any
from urllib.parse import unquote

JsonSchema = dict[str, Any]


class Treatment(StrEnum):
    ENFORCED = "enforced"
    ANNOTATION = "annotation"  # never sent to the compiler and not counted against its limits
    NOT_ENFORCED = "not enforced"  # refused in a strict schema, removed from any other


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
#: contentMediaType are annotations as well; `discriminator`, `xml`, `externalDocs` and `example` are OpenAPI's.
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

#: What the Rust regex crate and llguidance do not support: look-around, atomic groups, word boundaries,
#: back-references, and the escapes and empty classes of other dialects.
_FOREIGN_REGEX = re.compile(r"\(\?(?:[=!>]|<[=!])|\\(?:[^\W_aftnrvxuUpPdDsSwWAz])|\[\^?\]")

_ESCAPED_BACKSLASH = re.compile(r"\\\\")


def is_annotation(keyword: str) -> bool:
    """Whether the keyword only describes. OpenAPI's `x-...` keywords do, except `x-guidance`, an option of llguidance
    that changes what is enforced."""
    return TREATMENTS.get(keyword) is Treatment.ANNOTATION or (keyword.startswith("x-") and keyword != "x-guidance")


def is_foreign_regex(pattern: str) -> bool:
    """Whether the pattern has syntax that cannot be enforced. False does not mean that it is valid."""
    return _FOREIGN_REGEX.search(_ESCAPED_BACKSLASH.sub("", pattern)) is not None


def children_of(schema: JsonSchema) -> Iterator[tuple[Any, str]]:
    """The direct subschemas, each with its path."""
    for keyword, value in schema.items():
        if keyword in SCHEMA_MAPS and isinstance(value, dict):
            yield from ((child, f"{keyword}/{_escaped(name)}") for name, child in value.items())
        elif keyword in SCHEMA_LISTS and isinstance(value, list):
            yield from ((child, f"{keyword}/{number}") for number, child in enumerate(value))
        elif keyword in SCHEMAS:
            yield value, keyword


def with_children(schema: JsonSchema, change: Callable[[Any, str], Any]) -> JsonSchema:
    """A copy with each direct subschema replaced by `change(subschema, path)`."""
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
    """A copy with only what the compiler needs. `schema` must be no deeper than `structured_output.MAX_VALUE_DEPTH`."""
    if not isinstance(schema, dict):
        return schema
    kept = {keyword: value for keyword, value in schema.items() if not is_annotation(keyword)}
    return with_children(kept, lambda child, _: without_annotations(child))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


DEFINITIONS = "#/$defs/"

MAX_PLACE_CHARS = 200


def check_references(schema: JsonSchema) -> None:
    """Raises ValueError for a reference whose target does not exist, or that leads directly back to itself."""
    checked: set[str] = set()
    for subschema, place in walk(schema):
        reference = local_reference(subschema)
        if reference is None:
            continue
        if not _leads_somewhere(schema, reference):
            raise ValueError(f"$ref at {place} is {reference[:64]!r}, which does not exist; correct it")
        if reference not in checked:
            _check_progress(schema, reference, checked)


def _schemas_in(schema: Any) -> Iterator[JsonSchema]:
    return (found for found, _ in walk(schema))


def walk(schema: Any) -> Iterator[tuple[JsonSchema, str]]:
    """The schema and all schemas in it, each with its place as a JSON pointer."""
    waiting: list[tuple[Any, str]] = [(schema, "#")]
    while waiting:
        found, place = waiting.pop()
        if isinstance(found, dict):
            yield found, place
            waiting += [(child, f"{place}/{path}"[:MAX_PLACE_CHARS]) for child, path in children_of(found)]


def local_reference(schema: JsonSchema) -> str | None:
    """The JSON pointer in `$ref`; None if there is none or it points outside the schema."""
    reference = schema.get("$ref")
    is_local = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
    return reference if is_local else None


def gather(schema: JsonSchema) -> JsonSchema:
    """An equivalent schema whose local references are all `#/$defs/N`, without unused definitions. `schema` must have
    passed `check_references`."""
    targets: set[tuple[str, ...]] = set()
    waiting: list[Any] = [schema]
    while waiting:  # a target may lie outside any known subschema and contain references itself
        for found in _schemas_in(waiting.pop()):
            reference = local_reference(found)
            if reference is not None and (steps := _steps(reference)) not in targets:
                targets.add(steps)
                waiting.append(_resolve(schema, steps))
    numbers = {steps: number for number, steps in enumerate(sorted(targets))}

    def rebuilt(found: Any, steps: tuple[str, ...], *, is_definition: bool) -> Any:
        if not isinstance(found, dict):
            return found
        if steps in numbers and not is_definition:
            return {"$ref": f"{DEFINITIONS}{numbers[steps]}"}
        bare = {keyword: value for keyword, value in found.items() if keyword not in ("$defs", "definitions")}
        reference = local_reference(found)
        if reference is not None:
            bare["$ref"] = f"{DEFINITIONS}{numbers[_steps(reference)]}"
        return with_children(bare, lambda child, path: rebuilt(child, steps + _steps(f"#/{path}"), is_definition=False))

    whole: JsonSchema = rebuilt(schema, (), is_definition=False)
    definitions = {
        str(number): rebuilt(_resolve(schema, steps), steps, is_definition=True) for steps, number in numbers.items()
    }
    return whole | ({"$defs": definitions} if definitions else {})


def _check_progress(schema: JsonSchema, reference: str, checked: set[str]) -> None:
    """Follow only `$ref` and `allOf`: a value that satisfies a schema must satisfy these at the same place."""
    path: dict[str, Iterator[str]] = {reference: _at_the_same_place(schema, reference)}
    while path:
        pointer, following = next(reversed(path.items()))
        followed = next(following, None)
        if followed is None:
            del path[pointer]
            checked.add(pointer)
        elif followed in path:
            raise ValueError(
                f"$ref to {followed[:64]!r} leads directly back to itself; put the reference into properties, items or "
                "a branch of anyOf"
            )
        elif followed not in checked:
            path[followed] = _at_the_same_place(schema, followed)


def _at_the_same_place(schema: JsonSchema, reference: str) -> Iterator[str]:
    """References that apply to the same value as `reference`; none if its target does not exist, which is reported
    elsewhere."""
    waiting: list[Any] = [_resolve(schema, _steps(reference))] if _leads_somewhere(schema, reference) else []
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            following = local_reference(found)
            if following is not None:
                yield following
            waiting += list_of(found, "allOf")


def _leads_somewhere(schema: JsonSchema, reference: str) -> bool:
    try:
        return isinstance(_resolve(schema, _steps(reference)), dict | bool)
    except LookupError:
        return False


def _steps(reference: str) -> tuple[str, ...]:
    """The steps of a JSON pointer (RFC 6901) in the form of a URI fragment."""
    return tuple(unquote(step).replace("~1", "/").replace("~0", "~") for step in reference.split("/")[1:])


def _resolve(schema: JsonSchema, steps: tuple[str, ...]) -> Any:
    found: Any = schema
    for step in steps:
        if isinstance(found, list):
            if not step.isdecimal() or int(step) >= len(found):
                raise LookupError(step)
            found = found[int(step)]
        elif isinstance(found, dict):
            found = found[step]
        else:
            raise LookupError(step)
    return found
