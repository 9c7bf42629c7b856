"""What a structured output may ask for: one kind, small, self-contained; each refusal names place, value and remedy."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dialects.bodies import parse_model
from domain.errors import InvalidRequest
from domain.job_options import JobOptions
from domain.requests import GenerationRequest, SamplingParams
from domain.structured_output import StructuredOutput
from tasks.submit import request_hash


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth - 1):
        schema = {"type": "array", "items": schema}
    return schema


def properties(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{name}": True for name in range(number)}}


ACCEPTED: list[dict[str, Any]] = [
    {"json_schema": {}},
    {"json_schema": {"type": "object", "properties": {"properties": {"enum": ["pattern", None]}}}},
    {"json_schema": {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}},
    {"json_schema": {"title": "t", "description": "d", "default": 1, "examples": [{"not": 1}], "x-order": 1}},
    {"json_schema": {"description": "x" * 20_000, "properties": {"a": {"title": "x" * 20_000}}}},
    {"json_schema": {"const": {"not": 1, "$ref": "http://elsewhere"}}},
    {"json_schema": nested(16)},
    {"json_schema": properties(512)},
    {"json_schema": {"enum": list(range(1_024))}},
    {"json_schema": {"type": "string", "maxLength": 4_096}},
    {"json_schema": {"type": "string", "pattern": r"\{9999\}"}},
    {"regex": "a{4096}"},
    {"regex": "a" * 512},
    {"regex": r"\x{10FFF}|\u{20000}"},
    {"choices": ["a" * 1_024] * 1_024},
    {"lark": 'start: "a"'},
    {"json_object": True},
]

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", "exactly one"),
    ({"regex": "a", "lark": "start: /a/"}, "", "regex and lark"),
    ({"yaml": "a"}, "yaml", "the fields are: json_schema"),
    ({"json_object": False}, "json_object", "True"),
    ({"json_schema": True}, "json_schema", "true"),
    ({"json_schema": {"const": "x" * 16_384}}, "json_schema", "at most 16384"),
    ({"json_schema": {"const": "é" * 8_192}}, "json_schema", "16396 bytes"),
    ({"json_schema": {"properties": {"description": {"const": "x" * 16_384}}}}, "json_schema", "at most 16384"),
    ({"json_schema": {"$ref": "#"}}, "json_schema", "directly back to itself"),
    ({"json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}}, "json_schema", "back"),
    ({"json_schema": {"$ref": "#/$defs/none"}}, "json_schema", "$ref at # is '#/$defs/none'"),
    ({"json_schema": {"items": {"type": "any"}}}, "json_schema", "type at #/items is 'any'"),
    ({"json_schema": {"items": {"format": "colour"}}}, "json_schema", "format at #/items is 'colour'"),
    ({"json_schema": nested(17)}, "json_schema", "more than 16 levels"),
    ({"json_schema": properties(513)}, "json_schema", "513 properties"),
    ({"json_schema": {"enum": list(range(1_025))}}, "json_schema", "1025 enum values"),
    ({"json_schema": {"anyOf": [{"enum": list(range(600))}] * 2}}, "json_schema", "1200 enum values"),
    ({"json_schema": {"$ref": "https://example.com/x"}}, "json_schema", "https://example.com/x"),
    ({"json_schema": {"$ref": "other.json#/a"}}, "json_schema", "other.json"),
    ({"json_schema": {"$defs": {"a": {"$id": "http://x/"}}}}, "json_schema", "#/$defs/a"),
    ({"json_schema": {"type": "array", "maxItems": 4_097}}, "json_schema", "maxItems at # is 4097"),
    ({"json_schema": {"properties": {"a": {"maxLength": 1e9}}}}, "json_schema", "#/properties/a"),
    ({"json_schema": {"pattern": "a" * 513}}, "json_schema", "513 characters"),
    ({"json_schema": {"patternProperties": {"a{1,5000}": True}}}, "json_schema", "{1,5000}"),
    ({"json_schema": {"type": "object", "minProperties": 2}}, "json_schema", "minProperties at # is 2"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema", "uniqueItems"),
    ({"json_schema": {"not": {}}}, "json_schema", "'not' at #"),
    ({"json_schema": {"if": {}, "then": {}}}, "json_schema", "'if' at #"),
    ({"json_schema": {"minLenght": 3}}, "json_schema", "did you mean minLength"),
    ({"json_schema": {"x-guidance": {"lenient": True}}}, "json_schema", "x-guidance"),
    ({"json_schema": {"prefixItems": [{"items": [{"contains": 1}]}]}}, "json_schema", "#/prefixItems/0/items/0"),
    ({"json_schema": {"const": 2**63}}, "json_schema", "64 bits"),
    ({"regex": ""}, "regex", "at least 1 character"),
    ({"regex": "a" * 513}, "regex", "at most 512 characters"),
    ({"regex": "a{4097}"}, "regex", "{4097}"),
    ({"regex": "(ab){2,99999999999999999999}"}, "regex", "lower it"),
    ({"choices": []}, "choices", "at least 1 item"),
    ({"choices": ["a"] * 1_025}, "choices", "send at most 1024"),
    ({"choices": ["a", ""]}, "choices.1", "at least 1 character"),
    ({"choices": ["a" * 1_025]}, "choices.0", "at most 1024 characters"),
    ({"lark": "start: " + "a" * 16_384}, "lark", "at most 16384"),
    ({"lark": "é" * 9_000}, "lark", "18000 bytes"),
    ({"lark": "start: /a{5000}/"}, "lark", "{5000}"),
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=lambda fields: str(fields)[:40])
def test_what_is_within_bounds_is_taken_and_survives_storage(fields: dict[str, Any]) -> None:
    params = SamplingParams.model_validate({"structured_output": fields})
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params
    assert params.structured_output is not None
    assert params.structured_output.kind == next(iter(fields))


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_out_of_bounds_is_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    body = json.dumps({"model": "m", "prompt": "p", "params": {"structured_output": fields}}).encode()
    with pytest.raises(InvalidRequest) as refused:
        parse_model(body, GenerationRequest)
    assert refused.value.param == ".".join(["params.structured_output", *([param] if param else [])])
    assert message in refused.value.message


def test_a_number_beyond_every_float_is_refused() -> None:
    body = b'{"model": "m", "prompt": "p", "params": {"structured_output": {"json_schema": {"maximum": 1e400}}}}'
    with pytest.raises(InvalidRequest, match="not finite"):
        parse_model(body, GenerationRequest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3),
    max_leaves=8,
)
keywords = st.sampled_from(["type", "properties", "items", "anyOf", "enum", "$ref", "pattern", "maxItems", "$defs"])


@given(schema=st.dictionaries(keywords, json_values, max_size=4))
def test_a_senseless_schema_is_looked_at_without_a_crash(schema: dict[str, Any]) -> None:
    with contextlib.suppress(ValidationError):
        StructuredOutput(json_schema=schema)


def test_a_schema_is_part_of_what_makes_two_requests_one() -> None:
    def hash_of(**fields: Any) -> bytes:
        output = StructuredOutput.model_validate(fields)
        params = SamplingParams(structured_output=output)
        return request_hash(GenerationRequest(model="m", prompt="p", params=params), JobOptions())

    in_order: dict[str, Any] = {"properties": {"a": {}, "b": {}}}
    reversed_: dict[str, Any] = {"properties": {"b": {}, "a": {}}}
    hashes = [hash_of(json_schema=in_order), hash_of(json_schema=reversed_), hash_of(regex="a"), hash_of(choices=["a"])]
    for properties in (in_order, reversed_):
        calls = {"format": "llama3", "tools": [{"name": "f", "arguments": properties}]}
        hashes.append(hash_of(calls=calls))
    assert len(set(hashes)) == 6
    assert hash_of(json_schema=in_order) == hashes[0]
