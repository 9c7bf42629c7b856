"""Bodies in: what is refused names the field, the value seen and the remedy, and never repeats what is private."""

import contextlib
import json
import time
from collections.abc import Iterator

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from api.simple import GenerateBody
from dialects.bodies import MAX_DEPTH, parse_model
from dialects.native import EmbeddingJobBody, JobBody
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_completions import CompletionBody
from dialects.openai_embeddings import EmbeddingBody
from dialects.openai_response_requests import ResponseBody
from domain.errors import CeleriacError, InvalidRequest
from domain.requests import GenerationRequest

EXCESSIVE = [
    ('"max_tool_calls":1000000000000000000000000000000', "max_tool_calls", "less than or equal to 2147483647"),
    ('"max_tool_calls":-1', "max_tool_calls", "greater than or equal to 0"),
    (
        '"tools":[{"type":"function","name":"f","parameters":{"const":1e400}}]',
        "tools.0.parameters.const",
        "is Infinity: it must be finite",
    ),
    (
        '"text":{"format":{"type":"json_schema","name":"n","schema":{"enum":[-9223372036854775809]}}}',
        "text.format.schema.enum.0",
        "is -9223372036854775809: it must be",
    ),
    ('"guided_json":"{\\"const\\":18446744073709551616}"', "guided_json", "send one within 64 bits"),
    ('"guided_json":"%s"' % ("1" * 65_537), "guided_json", "a string of 65537 characters"),
    ('"structured_outputs":{"json":"%s"}' % ("1" * 65_537), "structured_outputs", "a string of 65537 characters"),
]

SECRET = "my diary entry"

REFUSED = {
    "empty body": (b"", "empty"),
    "blank body": (b" \n", "empty"),
    "no JSON": (b"hello", "not JSON"),
    "half an object": (b'{"model":"m"', "not JSON"),
    "a list": (b"[]", "must be an object"),
    "not UTF-8": (b'{"model":"\xff"}', "not UTF-8"),
    "UTF-16": ('{"model":"m"}'.encode("utf-16"), "not UTF-8"),
    "missing field": (b"{}", "model is missing; add it"),
    "wrong type": (b'{"model":1,"prompt":"a"}', "model is 1: it must be a valid string"),
    "empty prompt": (b'{"model":"m","prompt":""}', "prompt is a string of 0 characters: it must have at least 1"),
    "both inputs": (b'{"model":"m","prompt":"a","messages":[{"role":"user","content":"b"}]}', "exactly one"),
    "no input": (b'{"model":"m"}', "exactly one"),
    "unknown field": (b'{"model":"m","prompt":"a","promt":"b"}', "promt is not a known field; did you mean prompt?"),
    "unknown inner field": (
        b'{"model":"m","prompt":"a","params":{"temprature":1}}',
        "params.temprature is not a known field; did you mean temperature?",
    ),
    "NaN": (b'{"model":"m","prompt":"a","params":{"temperature":NaN}}', "NaN, which is not JSON"),
    "minus infinity": (b'{"model":"m","prompt":"a","params":{"temperature":-Infinity}}', "-Infinity, which"),
    "infinity by exponent": (b'{"model":"m","prompt":"a","params":{"temperature":1e999}}', "finite number"),
    "number as text": (b'{"model":"m","prompt":"a","params":{"temperature":"0.5"}}', 'is "0.5": it must be'),
    "truth as number": (b'{"model":"m","prompt":"a","params":{"max_tokens":true}}', "is true: it must be"),
    "beyond a bound": (
        b'{"model":"m","prompt":"a","params":{"temperature":3.5}}',
        "params.temperature is 3.5: it must be less than or equal to 2",
    ),
    "huge integer": (b'{"model":"m","prompt":"a","params":{"seed":123456789012345678901234567890}}', "less than"),
    "thousands of digits": (b'{"model":"m","prompt":"a","params":{"seed":%s}}' % (b"9" * 5000), "thousands of digits"),
    "lone surrogate": (b'{"model":"m","prompt":"\\ud800"}', "not JSON"),
    "duplicate key": (b'{"model":"m","prompt":"a","model":"n"}', "'model' appears more than once"),
    "deep object": (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32"),
    "very deep list": (b"[" * 500_000, "nested more than 32"),
    "max below min": (b'{"model":"m","prompt":"a","params":{"min_tokens":5,"max_tokens":3}}', "lower it"),
    "too many choices": (b'{"model":"m","prompt":"a","params":{"n":1000000000}}', "less than or equal to 16"),
}


@pytest.mark.parametrize(("field", "param", "reason"), EXCESSIVE)
def test_numbers_that_cannot_be_stored_are_refused_wherever_they_are(field: str, param: str, reason: str) -> None:
    with pytest.raises(CeleriacError) as caught:
        parse_model(f'{{"model":"m","input":"a",{field}}}'.encode(), ResponseBody)
    assert caught.value.param == param
    assert reason in caught.value.message


def test_numbers_of_64_bits_are_taken() -> None:
    tool = '{"type":"function","name":"f","parameters":{"enum":[-9223372036854775808,18446744073709551615,1e308]}}'
    parsed = parse_model(f'{{"model":"m","input":"a","tools":[{tool}]}}'.encode(), ResponseBody)
    orjson.dumps(parsed.model_dump())


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_body_is_refused_with_field_value_and_remedy(name: str) -> None:
    body, reason = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        parse_model(body, GenerationRequest)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m","prompt":"%s","params":{"temperature":9}}',
        '{"model":"m","messages":[{"role":"user","content":["%s"]}]}',
        '{"model":"m","messages":"%s"}',
        '{"model":"m","prompt":["%s"]}',
        '{"model":"m","prompt":"a","params":{"stop":"%s"}}',
        '{"model":"m","prompt":"%s',
    ],
)
def test_private_text_is_never_repeated(body: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_model((body % SECRET).encode(), GenerationRequest)
    assert SECRET not in caught.value.message


def test_brackets_inside_text_are_no_nesting() -> None:
    text = "[" * 100 + '\\"' + "{" * 100
    body = f'{{"model":"m","prompt":"{text}"}}'.encode()
    assert parse_model(body, GenerationRequest).prompt == text.replace("\\", "")


def test_the_allowed_depth_is_allowed() -> None:
    body = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b" " * 40
    with pytest.raises(InvalidRequest, match="must be an object"):
        parse_model(body, GenerationRequest)


def test_a_nul_character_is_text() -> None:
    assert parse_model(b'{"model":"m","prompt":"a\\u0000b"}', GenerationRequest).prompt == "a\0b"


@pytest.mark.parametrize("body", [b"[" * 1_000_000, b'{"a":[' * 150_000, b"[[]," * 250_000, b'"' * 1_000_000])
def test_a_hostile_megabyte_is_refused_quickly(body: bytes) -> None:
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        parse_model(body, GenerationRequest)
    assert time.process_time() - started < 0.5


@given(st.binary(max_size=200))
def test_any_bytes_are_either_a_request_or_a_client_error(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_model(body, GenerationRequest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.fixed_dictionaries(
        {"model": st.just("m")},
        optional={"prompt": json_values, "messages": json_values, "params": json_values, "extra": json_values},
    )
)
def test_any_json_is_either_a_request_or_a_client_error(value: dict[str, object]) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_model(json.dumps(value).encode(), GenerationRequest).model_dump_json().encode()


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            b'{"model":"m","messages":[%s{}]}' % (b"{}," * 300_000),
            "messages",
            "messages has 300001 items; send at most 2048",
        ),
        (b'{"model":"m","prompt":"a","tools":[%s{}]}' % (b"{}," * 300_000), "tools", "tools has 300001 items"),
        (
            b'{"model":"m","prompt_token_ids":[%s-1]}' % (b"-1," * 300_000),
            "prompt_token_ids.0",
            "prompt_token_ids.0 is -1: it must be greater",
        ),
        (
            b'{"model":"m","prompt":"a","params":{"structured_output":{"json_schema":{"anyOf":[%s{}]}}}}'
            % (b"{}," * 300_000),
            "params.structured_output.json_schema.anyOf",
            "has 300006 lists and objects",
        ),
        (
            b'{"model":"m","prompt":"a","params":{"structured_output":{"json_schema":{"enum":[%s1]}}}}'
            % (b"1," * 300_000),
            "params.structured_output.json_schema",
            "more than 16384 values",
        ),
        (
            b'{"model":"m","prompt":"a",%s"z":1}' % b"".join(b'"a%d":1,' % n for n in range(80_000)),
            "a0",
            "a0 is not a known field",
        ),
        (
            b'{"model":"m","prompt":"a","params":{"logit_bias":{%s"z":1}}}'
            % b"".join(b'"a%d":1,' % n for n in range(60_000)),
            "params.logit_bias",
            "has 60001 items; send at most 1024",
        ),
        (
            b'{"model":"m","prompt":"a","metadata":{%s"7":1}}' % b"".join(b'"%d":1,' % n for n in range(60_000)),
            "7",
            "the key '7' appears more than once in one object; send it once",
        ),
        (b'{"model":"m","a":[%s1]}' % (b"[[]]," * 100_000), "a", "a has 200002 lists and objects"),
    ],
)
def test_what_is_too_long_is_refused_by_its_length_and_by_name(body: bytes, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_model(body, JobBody)
    assert words in caught.value.message
    assert caught.value.param == param


def test_a_few_unknown_fields_are_left_to_be_looked_at_one_by_one() -> None:
    body = b'{"model":"m","prompt":"a",%s"z":1}' % b"".join(b'"a%d":1,' % n for n in range(10))
    with pytest.raises(InvalidRequest, match=r"a0 is not a known field.*\(and 10 more\)"):
        parse_model(body, GenerationRequest)


def test_only_the_first_bad_item_of_any_list_is_looked_at() -> None:
    for model in every_body():
        for schema in lists_in(model.__pydantic_core_schema__):
            assert schema.get("fail_fast"), f"a list of {model.__name__}: derive it from FirstErrorModel"


def every_body() -> list[type[BaseModel]]:
    return [JobBody, EmbeddingJobBody, ChatCompletionBody, ResponseBody, CompletionBody, EmbeddingBody, GenerateBody]


def lists_in(schema: object) -> Iterator[dict[str, object]]:
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple", "set"):
            yield schema
        for name, part in schema.items():
            if name not in ("metadata", "serialization"):
                yield from lists_in(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from lists_in(part)
