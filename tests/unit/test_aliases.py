"""Names that other servers use mean the fields that they stand for, and docs/api.md has all of them."""

import json
from typing import Any

import pytest

from api.simple import SimpleBody
from dialects import openai_chat, openai_completions, openai_response_requests
from dialects.aliases import Alias
from dialects.bodies import parse_model
from dialects.openai import OpenAIModel
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_completions import CompletionBody
from dialects.openai_response_requests import ResponseBody
from domain.errors import InvalidRequest
from domain.requests import GenerationRequest
from settings import ROOT
from tests.unit.test_template_kwargs import PLAIN, view_of

BODIES: dict[str, type[OpenAIModel]] = {
    "chat completions": ChatCompletionBody,
    "completions": CompletionBody,
    "responses": ResponseBody,
    "simple routes": SimpleBody,
}

HELLO = [{"role": "user", "content": "Hi"}]

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "find")]

FLAT_TOOLS = [{"type": "function", "name": name} for name in ("add", "find")]

GBNF = 'root ::= "yes" | no\nno ::= "n" [o]+'


def chat(**fields: Any) -> GenerationRequest:
    body = parse_model(json.dumps({"model": "m", "messages": HELLO} | fields).encode(), ChatCompletionBody)
    return openai_chat.to_generation_request(body, view_of("<tool_call>{{ tools }}" + PLAIN))


def completion(**fields: Any) -> GenerationRequest:
    body = parse_model(json.dumps({"model": "m", "prompt": "Hi"} | fields).encode(), CompletionBody)
    return openai_completions.to_generation_requests(body)[0]


def response(**fields: Any) -> GenerationRequest:
    body = parse_model(json.dumps({"model": "m", "input": "Hi"} | fields).encode(), ResponseBody)
    return openai_response_requests.to_generation_request(body, view_of("<tool_call>{{ tools }}" + PLAIN))


def rows() -> list[str]:
    """The table of docs/api.md."""
    places: dict[tuple[str, Alias], list[str]] = {}
    for place, body in BODIES.items():
        for name, alias in body.ALIASES.items():
            if name not in body.model_fields:
                places.setdefault((name, alias), []).append(place)
    return [
        f"| `{name}` | {'all' if len(found) == len(BODIES) else ', '.join(found)} | `{alias.ours}` | {alias.note} |"
        for (name, alias), found in places.items()
    ]


def test_every_alias_is_documented() -> None:
    section = (ROOT / "docs" / "api.md").read_text().split("## Names that other servers use\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows()


def test_every_alias_stands_for_a_field_of_its_body() -> None:
    for body in BODIES.values():
        for name, alias in body.ALIASES.items():
            assert name in body.model_fields or alias.ours.partition(".")[0] in body.model_fields, (name, body)


@pytest.mark.parametrize("ask", [chat, completion, response])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"min_new_tokens": 2}, {"min_tokens": 2}),
        ({"max_new_tokens": 7}, {"max_tokens": 7}),
        ({"n_predict": -1}, {"max_tokens": None}),
        ({"max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"stop_sequences": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"repeat_penalty": None, "guided_json": None}, {"repetition_penalty": 1.0, "structured_output": None}),
    ],
)
def test_an_alias_means_its_field(ask: Any, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    params = ask(**fields).params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize("ask", [chat, completion, response])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_json": {"type": "object"}}, {"json_schema": {"type": "object"}}),
        ({"guided_json": '{"type": "object"}'}, {"json_schema": {"type": "object"}}),
        ({"json_schema": {"type": "object"}}, {"json_schema": {"type": "object"}}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["yes", "no"]}, {"choices": ("yes", "no")}),
        ({"structured_outputs": {"choice": ["yes"], "regex": None}}, {"choices": ("yes",)}),
        ({"structured_outputs": {"json": {"type": "string"}}}, {"json_schema": {"type": "string"}}),
        ({"structured_outputs": {"json_object": True, "disable_fallback": True}}, {"json_object": True}),
        ({"grammar": 'start: "a"'}, {"lark": 'start: "a"'}),
    ],
)
def test_a_form_of_output_may_have_the_name_of_another_server(
    ask: Any, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    output = ask(**fields).params.structured_output
    assert output.model_dump(exclude_none=True) == expected


@pytest.mark.parametrize("name", ["grammar", "guided_grammar", "ebnf"])
def test_a_grammar_may_be_in_gbnf(name: str) -> None:
    output = chat(**{name: GBNF}).params.structured_output
    assert output is not None
    assert 'start: "yes"' in (output.lark or "")


@pytest.mark.parametrize(
    ("fields", "reason", "param"),
    [
        ({"max_tokens": 3, "max_new_tokens": 3}, "max_new_tokens and max_tokens mean the same", "max_new_tokens"),
        ({"guided_regex": "a", "regex": "a"}, "regex and guided_regex mean the same", "regex"),
        ({"repeat_penalty": "high"}, "repeat_penalty is", "repeat_penalty"),
        ({"guided_json": "{"}, "guided_json: it is a string that is not JSON", "guided_json"),
        (
            {"guided_json": '{"type": "object", "type": "array"}'},
            "the key 'type' appears more than once",
            "guided_json",
        ),
        ({"json_schema": '{"anyOf": [{"a": 1, "a": 1}]}'}, "the key 'a' appears more than once", "json_schema"),
        ({"guided_json": '{"minimum": NaN}'}, "guided_json: it is a string that contains NaN", "guided_json"),
        ({"structured_outputs": {"json": '{"a": 1, "a": 2}'}}, "the key 'a' appears more than once", None),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs: it has 'structural_tag'", None),
        ({"grammar": "root ::= x"}, "grammar: it is not a whole grammar: Rule 'x' not found", "grammar"),
        ({"grammar": "root ::= " + "(" * 4_000 + '"a"' + ")" * 4_000}, "nested too deeply", "grammar"),
        ({"grammar": "x" * 9_000}, "send at most 8192", "grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "set exactly one", None),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "both set", "response_format"),
    ],
)
@pytest.mark.parametrize("ask", [chat, completion])
def test_a_refusal_has_the_name_that_the_client_used(
    ask: Any, fields: dict[str, Any], reason: str, param: str | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        ask(**fields)
    assert reason in refused.value.message
    assert param is None or refused.value.param == param


@pytest.mark.parametrize("ask", [chat, completion])
def test_a_schema_may_be_beside_the_type(ask: Any) -> None:
    for kind in ("json_object", "json_schema"):
        output = ask(response_format={"type": kind, "schema": {"type": "object"}}).params.structured_output
        assert output.json_schema is not None
    with pytest.raises(InvalidRequest, match=r"json_schema are both set"):
        ask(response_format={"type": "json_schema", "schema": {}, "json_schema": {"name": "a"}})
    with pytest.raises(InvalidRequest, match=r"response_format\.schema is set but type is 'text'"):
        ask(response_format={"type": "text", "schema": {}})


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_the_model_is_shown_only_the_tools_that_it_is_allowed(mode: str) -> None:
    nested = {"mode": mode, "tools": [{"type": "function", "function": {"name": "find"}}]}
    flat = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "find"}]}
    asked = [
        chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": nested}),
        response(tools=FLAT_TOOLS, tool_choice=flat),
    ]
    for request in asked:
        output = request.params.structured_output
        assert [tool.name for tool in request.tools] == ["find"]
        assert (output is not None) == (mode == "required")
        assert output is None or output.calls is None or [tool.name for tool in output.calls.tools] == ["find"]


def test_a_tool_that_is_not_there_cannot_be_allowed() -> None:
    nested = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look"}}]}
    with pytest.raises(InvalidRequest, match="allows 'look', which is not one of the tools"):
        chat(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": nested})


def test_the_last_message_may_be_continued() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Well"}]
    request = chat(messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert request.continue_final_message
    view = view_of(PLAIN)
    assert view.decode(view.encode(request)).endswith("a:Well")
    for clash in ({"continue_final_message": True, "add_generation_prompt": True}, {"add_generation_prompt": False}):
        with pytest.raises(InvalidRequest, match="either a new message or continues the last one"):
            chat(messages=begun, **clash)


def test_sixteen_answers_may_be_requested() -> None:
    assert chat(n=16).params.n == 16
    with pytest.raises(InvalidRequest, match="n is 17"):
        chat(n=17)
