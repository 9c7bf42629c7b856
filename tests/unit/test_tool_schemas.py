"""Parameters of functions as generators of schemas write them: each is taken, and a call has what it lists, no more.

What is judged by is another implementation of JSON Schema, and the generators' own schemas.
"""

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLTokenizer

from dialects.tools import (
    answer_of,
    callable_tool,
)
from domain.catalog import ModelSpec
from domain.errors import InvalidRequest
from domain.json_schemas import FORMATS, TREATMENTS, Treatment
from domain.structured_output import MAX_CALLS_BYTES, StructuredOutput, ToolCalls, ToolDefinition
from settings import ROOT
from tests.tool_schema_corpus import BY_GENERATOR, Case
from text.grammar_process import judge
from text.grammars import make_grammar_tokenizer, make_matcher
from text.models import load_model_view
from text.tokenizers import Encoder

PLACE = "tools.0.function.parameters"
VIEW = load_model_view(ModelSpec(id="mini", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024))


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    assert VIEW.vocabulary is not None
    return make_grammar_tokenizer(VIEW.vocabulary.tokenizer.to_str(), VIEW.vocab_size, VIEW.vocabulary.eos_token_ids)


def calls_of(schema: dict[str, Any] | None, *, strict: bool | None = None) -> StructuredOutput:
    tool = callable_tool(ToolDefinition(name="f", parameters=schema, strict=strict), place=PLACE)
    return StructuredOutput(calls=ToolCalls(format="llama3", tools=(tool,), is_single=True))


def takes(tokenizer: LLTokenizer, output: StructuredOutput, text: str) -> bool:
    matcher = make_matcher(tokenizer, output)
    assert not matcher.is_error(), matcher.get_error()
    encoder: Encoder = VIEW._encoder
    token_ids = encoder.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


def call_with(arguments: Any) -> str:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, separators=(",", ":"))
    return f'{{"name": "f", "parameters": {written}}}'


@pytest.mark.parametrize("case", BY_GENERATOR, ids=lambda case: case.name)
def test_what_generators_write_is_taken_and_closed(tokenizer: LLTokenizer, case: Case) -> None:
    output = calls_of(case.schema)
    assert judge(tokenizer, output)["reason"] is None
    for arguments in case.good:
        assert takes(tokenizer, output, call_with(arguments)), arguments
    for arguments in case.bad:
        assert not takes(tokenizer, output, call_with(arguments)), arguments


@pytest.mark.parametrize("case", BY_GENERATOR, ids=lambda case: case.name)
def test_what_is_taken_of_a_call_is_valid_as_another_implementation_judges(case: Case) -> None:
    validator = jsonschema.Draft202012Validator(case.schema)
    for arguments in case.good:
        if arguments not in case.invalid_as_asked:
            validator.validate(arguments)


@pytest.mark.parametrize("schema", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}], ids=str)
@pytest.mark.parametrize("strict", [None, False, True])
def test_a_function_without_parameters_is_called_without_arguments(
    tokenizer: LLTokenizer, schema: dict[str, Any] | None, strict: bool | None
) -> None:
    output = calls_of(schema, strict=strict)
    assert takes(tokenizer, output, call_with({}))
    assert not takes(tokenizer, output, call_with({"a": 1}))


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}}


@pytest.mark.parametrize(
    "place",
    [
        {"properties": {"p": POINT}},
        {"properties": {"p": {"type": "array", "items": POINT}}},
        {"properties": {"p": {"anyOf": [POINT, {"type": "null"}]}}},
        {"properties": {"p": {"$ref": "#/$defs/point"}}, "$defs": {"point": POINT}},
        {"properties": {"p": {"allOf": [{"$ref": "#/$defs/point"}]}}, "$defs": {"point": POINT}},
        {"properties": {"p": {"type": "object", "additionalProperties": POINT}}},
        {"properties": {"p": {"type": "array", "prefixItems": [POINT]}}},
        {"properties": {"p": {"type": ["object", "null"], "properties": {"x": {"type": "integer"}}}}},
    ],
    ids=str,
)
def test_objects_are_closed_wherever_they_stand(tokenizer: LLTokenizer, place: dict[str, Any]) -> None:
    output = calls_of({"type": "object"} | place)
    kept = [{"p": shape} for shape in ({"x": 1}, [{"x": 1}], {"k": {"x": 1}})]
    assert any(takes(tokenizer, output, call_with(arguments)) for arguments in kept)
    for shape in ({"x": 1, "y": 2}, [{"x": 1, "y": 2}], {"k": {"x": 1, "y": 2}}, {"y": 2}, [{"y": 2}]):
        assert not takes(tokenizer, output, call_with({"p": shape})), shape
    assert not takes(tokenizer, output, call_with({"q": 1}))


def test_what_is_spread_over_all_of_and_branches_is_closed_as_a_whole(tokenizer: LLTokenizer) -> None:
    whole = calls_of(
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"$ref": "#/$defs/b"},
            ],
            "$defs": {"b": {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}},
        }
    )
    assert takes(tokenizer, whole, call_with({"a": 1, "b": 2}))
    assert not takes(tokenizer, whole, call_with({"a": 1}))
    assert not takes(tokenizer, whole, call_with({"a": 1, "b": 2, "c": 3}))
    branches = calls_of(
        {
            "type": "object",
            "properties": {"kind": {"enum": ["circle", "square"]}},
            "required": ["kind"],
            "oneOf": [
                {"properties": {"kind": {"const": "circle"}, "radius": {"type": "integer"}}, "required": ["radius"]},
                {"properties": {"kind": {"const": "square"}, "side": {"type": "integer"}}, "required": ["side"]},
            ],
        }
    )
    assert takes(tokenizer, branches, call_with({"kind": "circle", "radius": 1}))
    assert takes(tokenizer, branches, call_with({"kind": "square", "side": 1}))
    assert not takes(tokenizer, branches, call_with({"kind": "square", "side": 1, "radius": 1}))


def test_what_is_open_by_its_own_word_stays_open_unless_it_is_strict(tokenizer: LLTokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    assert takes(tokenizer, calls_of(schema), call_with({"a": 1, "b": 2}))
    assert not takes(tokenizer, calls_of(schema, strict=True), call_with({"a": 1, "b": 2}))


def test_free_values_cannot_be_nested_without_an_end(tokenizer: LLTokenizer) -> None:
    for free in ({}, True, {"type": "object"}, {"type": "array"}, {"type": "object", "additionalProperties": True}):
        output = calls_of({"type": "object", "properties": {"v": free}})
        deep: Any = 1
        for _ in range(20):
            deep = [deep] if free == {"type": "array"} else {"type": deep}
        assert not takes(tokenizer, output, call_with({"v": deep}))
        assert takes(tokenizer, output, call_with({"v": [[1]] if free == {"type": "array"} else {"a": {"b": 1}}}))


def test_the_table_of_keywords_is_what_the_compiler_does(tokenizer: LLTokenizer) -> None:
    """Whatever is said to be enforced compiles; whatever is not is refused where it is strict, and else left out."""
    values: dict[str, Any] = {
        "properties": {"a": {"type": "integer"}}, "patternProperties": {"^a": {"type": "integer"}},
        "additionalProperties": False, "items": {"type": "integer"}, "additionalItems": False,
        "prefixItems": [{"type": "integer"}], "anyOf": [{"type": "integer"}], "allOf": [{"type": "integer"}],
        "oneOf": [{"type": "integer"}], "$defs": {"a": {}}, "definitions": {"a": {}}, "$ref": "#/$defs/a",
        "type": "string", "const": 1, "enum": [1], "required": ["a"], "pattern": "^a$", "format": "date",
        "minLength": 1, "maxLength": 2, "minItems": 1, "maxItems": 2, "minProperties": 1, "maxProperties": 2,
        "minimum": 1, "maximum": 2, "exclusiveMinimum": 1, "exclusiveMaximum": 3, "multipleOf": 2,
    }  # fmt: skip
    assert set(values) == {word for word, treatment in TREATMENTS.items() if treatment is Treatment.ENFORCED}
    for keyword, value in values.items():
        schema = {keyword: value, "$defs": {"a": {"type": "integer"}}} if keyword != "$defs" else {keyword: value}
        assert judge(tokenizer, StructuredOutput(json_schema=schema))["reason"] is None, keyword
    for keyword, treatment in TREATMENTS.items():
        if treatment is Treatment.NOT_ENFORCED:
            with pytest.raises(InvalidRequest, match="is not a supported JSON schema keyword") as refused:
                answer_of({keyword: {"type": "string"}}, is_strict=True, place=PLACE)
            assert refused.value.param == PLACE
            assert answer_of({keyword: {"type": "string"}}, is_strict=False, place=PLACE).json_schema == {}
    for name in FORMATS:
        schema = {"type": "string", "format": name}
        assert judge(tokenizer, StructuredOutput(json_schema=schema))["reason"] is None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "$ref at #/properties/a"),
        ({"$ref": "#"}, "directly back to itself"),
        ({"type": "array"}, "a function's arguments are an object"),
        ({"type": "object", "properties": {"a": {"type": "int"}}}, "type at #/properties/a is 'int'"),
        ({"type": "object", "properties": {"a": {"const": "x" * 20_000}}}, "at most 16384"),
    ],
    ids=str,
)
def test_a_broken_schema_is_refused_in_the_words_of_the_request(schema: dict[str, Any], reason: str) -> None:
    for strict in (None, True):
        with pytest.raises(InvalidRequest) as refused:
            calls_of(schema, strict=strict)
        assert refused.value.param == PLACE
        assert reason in refused.value.message
        assert refused.value.message.startswith(PLACE)


def test_references_that_combine_in_too_many_ways_are_refused() -> None:
    levels = {
        f"l{number}": {
            "type": "object",
            "properties": {f"p{number}": {"type": "integer"}},
            "anyOf": [
                {"$ref": f"#/$defs/l{number + 1}"},
                {"properties": {f"q{number}": True}, "anyOf": [{"$ref": f"#/$defs/l{number + 1}"}]},
            ],
        }
        for number in range(40)
    }
    schema = {"type": "object", "$ref": "#/$defs/l0", "$defs": levels | {"l40": {"type": "object"}}}
    with pytest.raises(InvalidRequest, match="too many ways"):
        calls_of({"properties": {"a": schema["$ref"] and {"$ref": "#/$defs/l0"}}, "$defs": schema["$defs"]})


def test_numbers_that_no_reader_takes_are_left_out_or_refused(tokenizer: LLTokenizer) -> None:
    bounds = {"type": "integer", "minimum": -(2**70), "maximum": float("inf"), "multipleOf": 2**70, "default": 2**70}
    assert takes(tokenizer, calls_of({"type": "object", "properties": {"a": bounds}}), call_with({"a": 7}))
    constant = callable_tool(ToolDefinition(name="f", parameters={"properties": {"a": {"const": 2**70}}}), place=PLACE)
    with pytest.raises(ValueError, match="71 bits"):
        ToolCalls(format="hermes", tools=(constant,))


def test_all_tools_together_are_bounded() -> None:
    tool = callable_tool(ToolDefinition(name="f", parameters={"const": "x" * 16_000}), place=PLACE)
    with pytest.raises(ValueError, match=str(MAX_CALLS_BYTES)):
        ToolCalls(format="hermes", tools=(tool,) * 5)
