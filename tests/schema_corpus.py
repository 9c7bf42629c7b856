"""Two hundred JSON schemas in the style of the JSON Schema test suite: each keyword by itself, and nested."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

TYPES: list[Schema] = [
    *({"type": name} for name in ("string", "integer", "number", "boolean", "null", "array", "object")),
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean"]},
    {"type": ["array", "null"], "maxItems": 2},
    {},
]
VALUES: list[Schema] = [
    *({"const": value} for value in (1, -0.5, "a", "", None, True, [], {}, [1, "b"], {"k": {"l": 2}})),
    {"const": 'quote " slash \\ / line \n tab \t'},
    {"const": "caf\u00e9 \u2603 \U0001f600"},
    {"enum": [1, 2, 3]},
    {"enum": ["red", "amber", "green"]},
    {"enum": [None, False, "x", 7, [1], {"a": 1}]},
    {"enum": ["a"]},
    {"enum": ["a", "aa", "aaa", "ab"]},
    {"type": "string", "enum": ["a", 1, "b"]},
    {"enum": [f"value {number}" for number in range(40)]},
]
INTEGER_BOUNDS = [(0, 9), (0, 0), (-5, 5), (-1, None), (None, 100), (17, 42), (99, 1001), (-1000, -999), (1, 1000000)]
NUMBER_BOUNDS = [(0, 1), (-0.5, 0.5), (0.25, 0.75), (-10, None), (None, 3.5), (99.9, 100.1), (-2, -1)]
STRINGS: list[Schema] = [
    *({"minLength": low, "maxLength": high} for low, high in ((0, 0), (0, 1), (1, 1), (2, 5), (10, 12), (0, 30))),
    {"minLength": 3},
    {"maxLength": 4},
    *(
        {"pattern": pattern}
        for pattern in (
            *("^a$", "^[a-z]{3}$", "^[0-9]{2,4}$", "^(ab|cd)+$", r"^\d{4}-\d{2}$", "^x?y*z+$", "^$", "^[A-Z][a-z]+$"),
            *(r"^\w+@\w+\.com$", "^(a|b|c){2}$", r"^[^\"]{1,3}$", "^caf\u00e9$", r"^\.\*\?$", "b", "^a", "a$"),
        )
    ),
    *(
        {"format": name}
        for name in ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
    ),
]
ARRAYS: list[Schema] = [
    *({"items": {"type": "integer"}, "minItems": low, "maxItems": high} for low, high in ((0, 0), (1, 1), (2, 4))),
    {"items": {"enum": ["a", "b"]}, "maxItems": 5},
    {"items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
    {"items": {"type": "array", "items": {"type": "null"}, "maxItems": 2}, "maxItems": 3},
    {"prefixItems": [{"type": "integer"}, {"enum": ["x"]}], "items": False, "minItems": 2},
    {"prefixItems": [{"const": 1}, {"const": 2}], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"prefixItems": [{"type": "boolean"}], "items": False},
    {"items": False},
    {"items": {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False}, "maxItems": 2},
]
OBJECTS: list[Schema] = [
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b"], "additionalProperties": False},
    {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["b", "a"], "additionalProperties": False},
    {"properties": {}, "additionalProperties": False},
    {
        "properties": {"a": {"const": 1}},
        "additionalProperties": {"type": "boolean"},
        "required": ["a"],
        "maxProperties": 2,
    },
    {"additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 1},
    {"patternProperties": {"^x[0-9]$": {"type": "boolean"}}, "additionalProperties": False, "maxProperties": 3},
    {
        "properties": {'q"uote': {"const": 1}, "caf\u00e9": {"const": 2}},
        "required": ['q"uote'],
        "additionalProperties": False,
    },
    {"properties": {"a b": {"type": "null"}, "": {"const": 0}}, "required": [""], "additionalProperties": False},
    {"properties": {f"p{n}": {"const": n} for n in range(12)}, "required": ["p3"], "additionalProperties": False},
]
COMBINED: list[Schema] = [
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    {"anyOf": [{"const": "a"}, {"const": "ab"}, {"enum": [1, 2]}]},
    {
        "anyOf": [
            {"type": "object", "properties": {"t": {"const": n}}, "required": ["t"], "additionalProperties": False}
            for n in ("x", "y")
        ]
    },
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
    {"oneOf": [{"type": "integer"}, {"type": "null"}, {"type": "string", "enum": ["three"]}]},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 8}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"], "maxProperties": 2},
        ]
    },
    {"type": "integer", "anyOf": [{"minimum": 100, "maximum": 120}, {"minimum": -3, "maximum": -1}]},
    {"anyOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"const": 3}, {"type": "null"}]}]},
]
NODE = {
    "type": "object",
    "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["v"],
    "additionalProperties": False,
}
REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/a", "$defs": {"a": {"enum": [1, 2]}}},
    {"$ref": "#/definitions/a", "definitions": {"a": {"type": "null"}}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "boolean"}}},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"in": {"$ref": "#"}}, "required": ["in"],
                                  "additionalProperties": False}]},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/s"}, "b": {"$ref": "#/$defs/s"}}, "required": ["a", "b"],
     "additionalProperties": False, "$defs": {"s": {"type": "string", "maxLength": 3}}},
]  # fmt: skip
NOTES: Schema = {"title": "t", "description": "d", "default": 0, "examples": [1], "$comment": "c", "x-note": {"not": 1}}


def bounded(kind: str, low: float | None, high: float | None, names: tuple[str, str]) -> Schema:
    bounds = {name: value for name, value in zip(names, (low, high), strict=True) if value is not None}
    return {"type": kind, **bounds}


def numbers() -> Iterator[Schema]:
    for low, high in INTEGER_BOUNDS:
        yield bounded("integer", low, high, ("minimum", "maximum"))
        if low is None or high is None or high - low > 1:
            yield bounded("integer", low, high, ("exclusiveMinimum", "exclusiveMaximum"))
    for bottom, top in NUMBER_BOUNDS:
        yield bounded("number", bottom, top, ("minimum", "maximum"))
        yield bounded("number", bottom, top, ("exclusiveMinimum", "exclusiveMaximum"))
    for divisor in (1, 2, 3, 7, 10, 25):
        yield {"type": "integer", "multipleOf": divisor}
    yield {"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 40}


def flat() -> list[Schema]:
    """Schemas with one keyword each."""
    return [
        *TYPES,
        *VALUES,
        *numbers(),
        *({"type": "string", **schema} for schema in STRINGS),
        *({"type": "array", **schema} for schema in ARRAYS),
        *({"type": "object", **schema} for schema in OBJECTS),
        *COMBINED,
        *REFERENCES,
        NOTES | {"type": "boolean"},
    ]


def nested() -> Iterator[Schema]:
    """Flat schemas as a property of an object, as an optional property beside another, and in a list of two."""
    small = [schema for schema in flat() if not {"$ref", "$defs"} & schema.keys() and "'#'" not in str(schema)]
    for number, schema in enumerate(small[11::2]):
        if number % 3 == 0:
            yield {"type": "object", "properties": {"it": schema}, "required": ["it"], "additionalProperties": False}
        elif number % 3 == 1:
            properties = {"first": {"type": "boolean"}, "it": schema}
            yield {"type": "object", "properties": properties, "required": ["first"], "additionalProperties": False}
        else:
            yield {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}


CORPUS: list[Schema] = [*flat(), *nested()][:200]
