"""Function parameter schemas as pydantic, FastAPI, MCP servers, zod and browser agents write them."""

from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AnyUrl, BaseModel, ConfigDict, Field, Json, TypeAdapter

Schema = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """The model may write `good` arguments, but not `bad` ones. `invalid_as_asked` are good ones that the schema does
    not allow if JSON Schema is taken literally."""

    name: str
    schema: Schema
    good: list[Any]
    bad: list[Any]
    invalid_as_asked: list[Any] = field(default_factory=list)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Node(BaseModel):
    value: int
    children: list["Node"] = []


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


#: Type -> values that may be written for it, and values that may not.
PYDANTIC_TYPES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "set of str": (set[str], [[], ["a", "b"]], [[1], {}]),
    "frozenset of int": (frozenset[int], [[1]], [["a"]]),
    "dict of literals": (dict[Literal["a", "b"], int], [{}, {"a": 1}, {"a": 1, "b": 2}], [{"c": 1}, {"a": "x"}]),
    "dict of an enum": (dict[Colour, int], [{"red": 1}], [{"red": "x"}]),
    "dict of int": (dict[str, int], [{"any": 1}], [{"any": "x"}]),
    "dict by pattern": (dict[Annotated[str, Field(pattern="^x")], int], [{"x1": 1}], [{"x1": "a"}]),
    "decimal": (Decimal, [1.5, "1.5"], [None, [], {"a": 1}]),
    "datetime": (datetime, ["2024-01-02T03:04:05Z"], ["yesterday", 1]),
    "date": (date, ["2024-01-02"], ["2024-13-02"]),
    "time": (time, ["03:04:05Z"], ["noon"]),
    "timedelta": (timedelta, ["P1D"], ["a day"]),
    "uuid": (UUID, ["12345678-1234-1234-1234-123456789abc"], ["1234"]),
    "bytes": (bytes, ["abc"], [1]),
    "path": (Path, ["/a/b"], [1]),
    "url": (AnyUrl, ["https://example.com/"], [1]),
    "ip address": (IPv4Address, ["10.0.0.1"], ["ten"]),
    "json": (Json[dict[str, int]], ["{}"], [1]),
    "enum": (Colour, ["red"], ["green"]),
    "int enum": (Level, [1, 2], [3]),
    "tuple": (tuple[int, str], [[1, "a"]], [["a", 1], [1]]),
    "tuple of any length": (tuple[int, ...], [[], [1, 2]], [["a"]]),
    "union of numbers": (int | float, [1, 1.5], ["a"]),
    "union of int and str": (int | str | None, [1, "a", None], [True, []]),
    "discriminated union": (
        Annotated[Cat | Dog, Field(discriminator="kind")],
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "name": "x"}],
        [{"kind": "cat", "name": "x"}, {"kind": "cat", "lives": 9, "name": "x"}, {"kind": "bird"}],
    ),
    "recursive": (
        Node,
        [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": []}]}],
        [{"value": 1, "other": 2}, {"value": 1, "children": [{"value": 2, "x": 1}]}],
    ),
    "forbidding": (Closed, [{"a": 1}], [{"a": 1, "b": 2}]),
    "allowing": (Open, [{"a": 1}, {"a": 1, "b": 2}], [{"b": 2}]),
    "anything": (Any, [1, "a", {"a": [1]}], []),
    "bounded": (Annotated[int, Field(ge=-(2**63), le=2**63 - 1)], [0, -1], ["a"]),
    "positive": (Annotated[float, Field(gt=0, lt=1e30)], [1.5], ["a", -1]),
    "multiple": (Annotated[Decimal, Field(multiple_of=0.01)], [1.25], []),
    "look-around": (Annotated[str, Field(json_schema_extra={"pattern": "^(?!x).*$"})], ["a"], [1]),
    "optional list": (list[Cat] | None, [None, [{"kind": "cat", "lives": 1}]], [[{"kind": "cat"}]]),
}


def _of_pydantic() -> list[Case]:
    cases = []
    for name, (kind, good, bad) in PYDANTIC_TYPES.items():
        schema = TypeAdapter(kind).json_schema()
        definitions = schema.pop("$defs", {})
        whole: Schema = {"type": "object", "properties": {"v": schema}, "required": ["v"], "title": "F"}
        whole |= {"$defs": definitions} if definitions else {}
        everywhere: list[Any] = [{}, {"v": good[0], "w": 1}]
        cases.append(
            Case(
                f"pydantic {name}",
                whole,
                [{"v": value} for value in good],
                [{"v": value} for value in bad] + everywhere,
            )
        )
    return cases


def _value(name: str, schema: Schema, good: list[Any], bad: list[Any], invalid: list[Any] | None = None) -> Case:
    whole = {"type": "object", "properties": {"v": schema}, "required": ["v"]}
    return Case(
        name, whole, [{"v": v} for v in good], [{"v": v} for v in bad] + [{"v": good[0], "x": 1}],
        [{"v": v} for v in invalid or []],
    )  # fmt: skip


OPENAPI = [
    _value("nullable string", {"type": "string", "nullable": True}, ["a", None], [1], [None]),
    _value("nullable enum", {"type": "string", "enum": ["a", "b"], "nullable": True}, ["a", None], ["c"], [None]),
    _value(
        "nullable object",
        {"type": "object", "properties": {"a": {"type": "integer"}}, "nullable": True},
        [{"a": 1}, None],
        [{"a": 1, "b": 1}],
        [None],
    ),
    *(
        _value(f"format {name}", {"type": "string", "format": name}, ["x"], [1])
        for name in (
            "binary",
            "byte",
            "password",
            "uri-reference",
            "iri",
            "idn-email",
            "json-pointer",
            "regex",
            "phone",
        )
    ),
    _value("int64", {"type": "integer", "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}, [1, -1], ["1"]),
    _value("uint64", {"type": "integer", "format": "uint64", "minimum": 0, "maximum": 2**64 - 1}, [1], [-1]),
    _value("double", {"type": "number", "format": "double", "minimum": -1.7976931348623157e308}, [1.5], ["1"]),
    _value("exclusive by flag", {"type": "integer", "minimum": 0, "exclusiveMinimum": True}, [1], [0], [1]),
    _value("unlimited length", {"type": "string", "maxLength": 1_000_000}, ["abc"], [1]),
    _value("one of many", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1, 1.5], ["a"], [1]),
    _value("contents", {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}, ["a"], [1]),
    Case(
        "inheritance",
        {
            "allOf": [
                {"$ref": "#/components/schemas/Pet"},
                {"type": "object", "properties": {"bark": {"type": "boolean"}}, "required": ["bark"]},
            ],
            "components": {
                "schemas": {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}}
            },
        },
        [{"name": "a", "bark": True}],
        [{"name": "a"}, {"name": "a", "bark": True, "c": 1}],
    ),
]
OTHERS = [
    Case(
        "zod with shared parts",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {
                "from": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
                "to": {"$ref": "#/properties/from"},
            },
            "required": ["from", "to"],
        },
        [{"from": {"x": 1}, "to": {"x": 2}}],
        [{"from": {"x": 1}, "to": {"x": 2, "y": 1}}, {"from": {"x": 1}, "to": {}}],
    ),
    Case(
        "zod record",
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "r": {"type": "object", "propertyNames": {"minLength": 1}, "additionalProperties": {"type": "number"}},
                "n": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
            },
            "required": ["r"],
            "additionalProperties": False,
        },
        [{"r": {"a": 1}}, {"r": {}, "n": 5}],
        [{"r": {"a": "x"}}, {"r": {}, "z": 1}],
    ),
    Case(
        "zod tuple",
        {
            "type": "object",
            "properties": {
                "t": {"type": "array", "minItems": 2, "maxItems": 2, "items": [{"type": "string"}, {"type": "number"}]}
            },
            "required": ["t"],
        },
        [],
        [{"t": [1, "a"]}, {"t": ["a", 1], "u": 1}],
    ),
    Case(
        "MCP server",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {
                "path": {"type": "string", "format": "path"},
                "edits": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {"type": "object", "properties": {"old": {"type": "string"}, "new": {"type": "string"}},
                              "required": ["old", "new"]},
                },
                "dryRun": {"type": "boolean", "default": False},
            },
            "required": ["path", "edits"],
            "dependentRequired": {"dryRun": ["path"]},
            "not": {"required": ["force"]},
        },
        [{"path": "/a", "edits": [{"old": "a", "new": "b"}], "dryRun": True}],
        [{"path": "/a", "edits": [{"old": "a", "new": "b", "why": "c"}]}, {"path": "/a", "edits": [], "force": True}],
    ),
    Case(
        "a condition",
        {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b"]}},
            "required": ["kind"],
            "if": {"properties": {"kind": {"const": "a"}}},
            "then": {"properties": {"size": {"type": "integer"}}},
        },
        [{"kind": "a", "size": 1}, {"kind": "b"}],
        [{"kind": "a", "colour": 1}],
    ),
    Case(
        "long descriptions",
        {
            "type": "object",
            "properties": {
                f"action_{n}": {"type": "integer", "title": "t" * 200, "description": "d" * 800, "examples": [n] * 20}
                for n in range(20)
            },
        },
        [{}, {"action_1": 1}],
        [{"action_1": 1, "description": "d"}],
    ),
]  # fmt: skip
BY_GENERATOR = [*_of_pydantic(), *OPENAPI, *OTHERS]
