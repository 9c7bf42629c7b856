"""The form that an output must have: JSON schemas, tools, regular expressions, choices and grammars, within limits.

They are only inspected here, in linear time, before anything expensive is done with them: schemas must be small,
shallow, self-contained and made of known keywords. `text/grammar_compiler.py` finds out whether they compile.
"""

import difflib
import json
import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from domain.jobs import Frozen
from domain.json_schemas import (
    COUNT_KEYWORDS,
    FORMATS,
    TREATMENTS,
    JsonSchema,
    Treatment,
    check_references,
    children_of,
    is_annotation,
    list_of,
    map_of,
    walk,
    without_annotations,
)

MAX_SCHEMA_BYTES = 16_384

MAX_SCHEMA_DEPTH = 16

MAX_VALUE_DEPTH = 64

MAX_PROPERTIES = 512

MAX_ENUM_VALUES = 1_024

MAX_REPEAT = 4_096

MAX_PATTERN_CHARS = 512

_TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")

_STRICT_KEYWORDS = frozenset(
    keyword for keyword, treatment in TREATMENTS.items() if treatment is not Treatment.NOT_ENFORCED
)

# A repetition in a regular expression; \\{, \\x{...}, \\u{...} and \\p{...} are not.
_REPETITION = re.compile(r"(?<!\\)(?<!\\[xuU])\{(\d+)(?:,(\d*))?\}")


def check_schema(schema: JsonSchema) -> None:
    """Check that the whole schema can be enforced. Raises ValueError with the place, the value seen and the remedy."""
    check_structure(bounded(schema))
    check_keywords(schema)


def bounded(schema: JsonSchema) -> JsonSchema:
    """The schema without its annotations. Raises ValueError if it is too large."""
    _check_depth_of_values(schema)
    kept: JsonSchema = without_annotations(schema)
    num_bytes = len(json.dumps(kept, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace"))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise ValueError(
            f"the schema has {num_bytes} bytes without its descriptions; shorten it to at most {MAX_SCHEMA_BYTES}"
        )
    return kept


def check_structure(schema: JsonSchema) -> None:
    """Check that it is a schema within the limits, but not whether its keywords can be enforced. Raises ValueError."""
    _check_depth(schema)
    num_properties = num_enum_values = 0
    for subschema, place in walk(schema):
        _check_types(subschema, place)
        num_properties += len(map_of(subschema, "properties"))
        num_enum_values += len(list_of(subschema, "enum"))
    _check_total("properties", num_properties, MAX_PROPERTIES)
    _check_total("enum values", num_enum_values, MAX_ENUM_VALUES)
    check_references(schema)


def check_keywords(schema: JsonSchema) -> None:
    """Check that each keyword can be enforced. Raises ValueError."""
    for subschema, place in walk(schema):
        _check_keywords(subschema, place)
        _check_format(subschema, place)
        _check_counts(subschema, place)
        _check_least_properties(subschema, place)
        _check_reference(subschema, place)
        for pattern in _patterns(subschema):
            check_regex(pattern, f"the pattern at {place}")


def check_numbers(schema: JsonSchema) -> None:
    """Raises ValueError for numbers that a parser with 64-bit numbers would refuse or change."""
    waiting: list[Any] = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("the schema has a number that is not finite; send one within 64 bits")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"the schema has an integer of {value.bit_length()} bits; send one within 64 bits")
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_regex(regex: str, name: str) -> None:
    """Raises ValueError if the pattern exceeds a limit. One that passes may still be refused by the compiler."""
    if len(regex) > MAX_PATTERN_CHARS:
        raise ValueError(f"{name} has {len(regex)} characters; send at most {MAX_PATTERN_CHARS} characters")
    check_repetitions(regex, name)


def holds_long_repetition(text: str) -> bool:
    return any(map(_is_long, _REPETITION.finditer(text)))


def check_repetitions(text: str, name: str) -> None:
    """Raises ValueError for an {m,n} that is too large."""
    for repetition in _REPETITION.finditer(text):
        if _is_long(repetition):
            raise ValueError(f"{name} has the repetition {repetition[0][:24]}; lower it to at most {MAX_REPEAT}")


def _is_long(repetition: re.Match[str]) -> bool:
    return any(int(number[:9]) > MAX_REPEAT for number in repetition.groups() if number)


def _check_depth(schema: JsonSchema) -> None:
    waiting: list[tuple[Any, str, int]] = [(schema, "#", 1)]
    while waiting:
        found, place, depth = waiting.pop()
        if not isinstance(found, dict):
            continue  # true, false, or what the compiler will refuse
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(
                f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep at {place}; use $defs and $ref"
            )
        waiting += [(child, f"{place}/{path}", depth + 1) for child, path in children_of(found)]


def _check_types(schema: JsonSchema, place: str) -> None:
    asked = schema.get("type")
    for name in asked if isinstance(asked, list) else [] if asked is None else [asked]:
        if name not in _TYPES:
            raise ValueError(f"type at {place} is {str(name)[:64]!r}; use one of {', '.join(_TYPES)}")


def _patterns(schema: JsonSchema) -> list[str]:
    pattern = schema.get("pattern")
    return [*map_of(schema, "patternProperties"), *([pattern] if isinstance(pattern, str) else ())]


def _check_keywords(schema: JsonSchema, place: str) -> None:
    """Refuse keywords that would be ignored, as a misspelt limit would not be enforced."""
    unknown = next((word for word in schema if word not in _STRICT_KEYWORDS and not is_annotation(word)), None)
    if unknown is None:
        return
    close = difflib.get_close_matches(unknown[:64], _STRICT_KEYWORDS, n=1)
    remedy = f"did you mean {close[0]}?" if close and unknown not in TREATMENTS else "remove it"
    raise ValueError(f"{unknown[:64]!r} at {place} is not a supported JSON schema keyword; {remedy}")


def _check_format(schema: JsonSchema, place: str) -> None:
    name = schema.get("format")
    if isinstance(name, str) and name not in FORMATS and schema.get("type") not in ("integer", "number", "boolean"):
        raise ValueError(
            f"format at {place} is {name[:64]!r}, which cannot be enforced; remove it, or use one of "
            f"{', '.join(sorted(FORMATS - {'unknown'}))}"
        )


def _check_counts(schema: JsonSchema, place: str) -> None:
    for keyword in COUNT_KEYWORDS:
        count = schema.get(keyword)
        if isinstance(count, int | float) and count > MAX_REPEAT:
            raise ValueError(f"{keyword} at {place} is {count}; lower it to at most {MAX_REPEAT}")


def _check_least_properties(schema: JsonSchema, place: str) -> None:
    """Unlisted names may occur twice in the output but count only once, so a minimum number cannot be enforced."""
    least, required = schema.get("minProperties"), schema.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > max(1, num_required):
        raise ValueError(
            f"minProperties at {place} is {least}, more than the {num_required} required properties; "
            "list the needed ones in required"
        )


def _check_reference(schema: JsonSchema, place: str) -> None:
    reference = schema.get("$ref")
    if isinstance(reference, str) and not (reference == "#" or reference.startswith("#/")):
        raise ValueError(
            f"$ref at {place} is {reference[:64]!r}; use a reference within the schema, such as #/$defs/..."
        )
    if "$id" in schema and place != "#":
        raise ValueError(f"$id at {place} is inside the schema, but only the schema itself may have one; remove it")


def _check_total(what: str, number: int, bound: int) -> None:
    if number > bound:
        raise ValueError(f"the schema has {number} {what} in all, more than {bound}; remove some")


def _check_depth_of_values(schema: JsonSchema) -> None:
    """Refuse schemas too deep for recursive functions, and those with more values than the allowed number of bytes."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    num_values = 1
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_VALUE_DEPTH:
            raise ValueError(f"the schema's values are nested more than {MAX_VALUE_DEPTH} levels deep; flatten them")
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        num_values += len(children)
        if num_values > MAX_SCHEMA_BYTES:
            raise ValueError(
                f"the schema has more than {MAX_SCHEMA_BYTES} values, which cannot fit into the allowed "
                f"{MAX_SCHEMA_BYTES} bytes; shorten it"
            )
        waiting += [(child, depth + 1) for child in children]


def check_patterns(schema: JsonSchema) -> None:
    """Raises ValueError if a regular expression in the schema exceeds a limit."""
    for subschema, place in walk(schema):
        for pattern in _patterns(subschema):
            check_regex(pattern, f"the pattern at {place}")


MAX_TOOLS = 128

MAX_TOOL_CHARS = 100_000  # of a tool's description

MAX_ARGUMENT_CHARS = 1_000_000  # of a call: as long as a prompt, since calls may write whole files

MAX_CALLS_BYTES = 65_536  # total of the schemas in one grammar of calls

TOOL_NAME = re.compile(r"^[A-Za-z0-9_.-]{1,64}$")

ToolName = Annotated[str, StringConstraints(pattern=TOOL_NAME.pattern)]


class ToolDefinition(Frozen):
    """A function that the model may call. `parameters` is the JSON schema (an object) of its arguments; None means no
    arguments."""

    name: ToolName
    description: str | None = Field(default=None, max_length=MAX_TOOL_CHARS)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolCall(Frozen):
    """A call that a model made. `arguments` is JSON as the model wrote it, which may be invalid."""

    id: str = Field(min_length=1, max_length=128)
    name: ToolName
    arguments: str = Field(max_length=MAX_ARGUMENT_CHARS)


class CallableTool(Frozen):
    """`arguments` is the JSON schema that is compiled to constrain a call's arguments."""

    name: ToolName
    arguments: dict[str, Any]


class ToolCalls(Frozen):
    """Calls that an output may consist of: any number of calls of these tools, or exactly one (`is_single`).

    `format` is the name of a `text.call_formats.CallFormat`. `marker_token_id` is a special token that the model may
    write before its calls; `token_ids` are those of the special tokens that it must write in them.
    """

    format: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")]
    tools: tuple[CallableTool, ...] = Field(min_length=1, max_length=MAX_TOOLS)
    is_single: bool = False
    marker_token_id: int | None = Field(default=None, ge=0)
    token_ids: dict[str, int] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _bounded_schemas(self) -> Self:
        num_bytes = 0
        for tool in self.tools:
            check_numbers(tool.arguments)
            check_patterns(tool.arguments)
            num_bytes += len(json.dumps(tool.arguments, separators=(",", ":"), ensure_ascii=False).encode())
        if num_bytes > MAX_CALLS_BYTES:
            raise ValueError(
                f"the tools' parameters have {num_bytes} bytes without their descriptions, more than the "
                f"{MAX_CALLS_BYTES} for calls that are constrained by a grammar; send fewer tools"
            )
        return self


MAX_LARK_BYTES = 16_384

MAX_OUTPUT_CHOICES = 1_024

OutputChoice = Annotated[str, StringConstraints(min_length=1, max_length=1_024)]


class StructuredOutput(Frozen):
    """Exactly one field is set, and it constrains the whole output. Only `calls` may be combined with another: the
    output is then either calls or what the other field requires.

    `regex` and the schema's patterns use the syntax of the Rust regex crate, without look-around and back-references;
    `regex` matches the whole output. `lark` is llguidance's variant of Lark, with the rule `start`. The JSON of
    `json_schema` is written without whitespace, its properties in the schema's order.
    """

    json_schema: dict[str, Any] | None = None
    regex: str | None = Field(default=None, min_length=1, max_length=MAX_PATTERN_CHARS)
    choices: tuple[OutputChoice, ...] | None = Field(default=None, min_length=1, max_length=MAX_OUTPUT_CHOICES)
    lark: str | None = Field(default=None, min_length=1, max_length=MAX_LARK_BYTES)
    json_object: Literal[True] | None = None
    calls: ToolCalls | None = None

    @property
    def kind(self) -> str:
        """The name of the field that is set; if `calls` is combined with another, the other one."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @field_validator("json_schema")
    @classmethod
    def _bounded_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            check_schema(schema)
            check_numbers(schema)
        return schema

    @field_validator("regex")
    @classmethod
    def _bounded_regex(cls, regex: str | None) -> str | None:
        if regex is not None:
            check_regex(regex, "the regular expression")
        return regex

    @field_validator("lark")
    @classmethod
    def _bounded_lark(cls, lark: str | None) -> str | None:
        if lark is None:
            return None
        num_bytes = len(lark.encode())
        if num_bytes > MAX_LARK_BYTES:
            raise ValueError(f"the grammar has {num_bytes} bytes; send at most {MAX_LARK_BYTES}")
        check_repetitions(lark, "the grammar")
        return lark

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) - (self.calls is not None) > 1 or not given:
            known = ", ".join(name for name in type(self).model_fields if name != "calls")
            raise ValueError(f"{' and '.join(given) or 'nothing'} is set; set exactly one of {known}")
        return self
