"""Tools beside a format: calls or the schema where the model may choose, calls where it must call, the schema where it
must not; the same on both routes, and with every way in which models call."""

import json
from typing import Any

import pytest
from llguidance import LLTokenizer

from dialects import openai_chat, openai_response_requests
from dialects.bodies import parse_model, with_body_names
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_response_requests import ResponseBody
from domain.catalog import ModelSpec
from domain.errors import InvalidRequest
from domain.requests import GenerationRequest
from settings import ROOT
from text.grammar_process import judge
from text.grammars import make_grammar_tokenizer, make_matcher
from text.models import ModelView, load_model_view
from text.outputs import CallName, ContentPiece, OutputFormat
from text.parsers import parser_of

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["go", "x"]}, "parameters": {"type": "object"}, "arguments": {"type": "object"}},
    "required": ["name"],
}
GO = {"name": "go", "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}, "required": ["at"]}}
STOP = {"name": "stop"}
CALLS = {
    "hermes": '<tool_call>\n{"name": "go", "arguments": {"at":3}}\n</tool_call>',
    "mistral": '[{"name": "go", "arguments": {"at":3}}]',
    "llama3": '{"name": "go", "parameters": {"at":3}}',
}
TWO_CALLS = {
    "hermes": "\n".join([CALLS["hermes"]] * 2),
    "mistral": '[{"name": "go", "arguments": {"at":3}}, {"name": "stop", "arguments": {}}]',
}
ANSWER = '{"name":"go","parameters":{"at":3}}'
ROUTES = ["chat", "responses"]
FORMATS = list(CALLS)


@pytest.fixture(scope="module")
def view() -> ModelView:
    return load_model_view(ModelSpec(id="mini", path=str(ROOT / "models" / "celeriac-mini"), max_model_len=1024))


@pytest.fixture(scope="module")
def tokenizer(view: ModelView) -> LLTokenizer:
    assert view.vocabulary is not None
    return make_grammar_tokenizer(view.vocabulary.tokenizer.to_str(), view.vocab_size, view.vocabulary.eos_token_ids)


def request_of(
    view: ModelView, route: str, *, format: str = "hermes", choice: Any = "auto",
    schema: dict[str, Any] | None = SCHEMA, strict: bool | None = None, tools: Any = (GO, STOP), **more: Any,
) -> GenerationRequest:  # fmt: skip
    view.output_format = OutputFormat(format)
    body: dict[str, Any] = {"model": "mini", "tool_choice": choice} | more
    if route == "chat":
        shape = {"name": "s", "schema": schema} | ({} if strict is None else {"strict": strict})
        body |= {"messages": [{"role": "user", "content": "x"}]}
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        body |= {"response_format": {"type": "json_schema", "json_schema": shape}} if schema is not None else {}
        parsed = parse_model(json.dumps(body).encode(), ChatCompletionBody)
        return openai_chat.to_generation_request(parsed, view)
    shape = {"type": "json_schema", "name": "s", "schema": schema} | ({} if strict is None else {"strict": strict})
    body |= {"input": "x", "tools": [{"type": "function"} | tool for tool in tools]}
    body |= {"text": {"format": shape}} if schema is not None else {}
    return openai_response_requests.to_generation_request(parse_model(json.dumps(body).encode(), ResponseBody), view)


def named(route: str, name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}} if route == "chat" else {"type": "function", "name": name}


def takes(view: ModelView, tokenizer: LLTokenizer, request: GenerationRequest, text: str) -> bool:
    assert request.params.structured_output is not None
    matcher = make_matcher(tokenizer, request.params.structured_output)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = view._encoder.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())


def parts_of(request: GenerationRequest, format: str, text: str) -> tuple[list[str], str]:
    """The names of the calls, and the content."""
    parser = parser_of(request, OutputFormat(format))
    pieces = [piece for character in text for piece in parser.push(character)] + parser.finish(is_cut=False)
    calls = [piece.name for piece in pieces if isinstance(piece, CallName)]
    return calls, "".join(piece.text for piece in pieces if isinstance(piece, ContentPiece))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_may_choose_calls_or_answers(
    view: ModelView, tokenizer: LLTokenizer, route: str, format: str
) -> None:
    request = request_of(view, route, format=format)
    for text, parts in ((CALLS[format], (["go"], "")), (ANSWER, ([], ANSWER))):
        assert takes(view, tokenizer, request, text)
        assert parts_of(request, format, text) == parts
    assert not takes(view, tokenizer, request, CALLS[format].replace("3", '"3"'))
    assert not takes(view, tokenizer, request, '{"name":"other"}')
    if format in TWO_CALLS:
        assert takes(view, tokenizer, request, TWO_CALLS[format])
        single = request_of(view, route, format=format, parallel_tool_calls=False)
        assert takes(view, tokenizer, single, CALLS[format])
        assert not takes(view, tokenizer, single, TWO_CALLS[format])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_must_call_does_not_answer(
    view: ModelView, tokenizer: LLTokenizer, route: str, format: str
) -> None:
    for choice in ("required", named(route, "go")):
        request = request_of(view, route, format=format, choice=choice)
        assert takes(view, tokenizer, request, CALLS[format])
        assert not takes(view, tokenizer, request, ANSWER)
        assert parts_of(request, format, CALLS[format]) == (["go"], "")
    other = request_of(view, route, format=format, choice=named(route, "stop"))
    assert not takes(view, tokenizer, other, CALLS[format])


@pytest.mark.parametrize("route", ROUTES)
def test_a_model_that_must_not_call_answers(view: ModelView, tokenizer: LLTokenizer, route: str) -> None:
    request = request_of(view, route, choice="none")
    assert takes(view, tokenizer, request, ANSWER)
    assert not takes(view, tokenizer, request, CALLS["hermes"])


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ({"regex": "[a-z]+"}, "yes"),
        ({"choices": ["yes", "<no>"]}, "<no>"),
        ({"lark": 'start: "fox" (" and " start)?'}, "fox and fox"),
        ({"json_object": True}, '{"a":1}'),
        ({"json_schema": {"enum": [1, 2]}}, "2"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_every_kind_of_structured_output_may_stand_beside_tools(
    view: ModelView, tokenizer: LLTokenizer, route: str, output: dict[str, Any], answer: str
) -> None:
    request = request_of(view, route, schema=None, structured_output=output)
    assert takes(view, tokenizer, request, answer)
    assert parts_of(request, "hermes", answer) == ([], answer)
    assert takes(view, tokenizer, request, CALLS["hermes"])
    stored = GenerationRequest.model_validate_json(request.model_dump_json())
    assert stored.params == request.params


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_format_a_model_that_may_choose_follows_no_grammar(view: ModelView, route: str) -> None:
    assert request_of(view, route, schema=None).params.structured_output is None


@pytest.mark.parametrize("route", ROUTES)
def test_a_refusal_names_the_field_of_the_request(view: ModelView, tokenizer: LLTokenizer, route: str) -> None:
    schema_place = "response_format.json_schema.schema" if route == "chat" else "text.format.schema"
    tool_place = "tools.1.function.parameters" if route == "chat" else "tools.1.parameters"
    bad = {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}
    for changes, place in (
        ({"schema": {"uniqueItems": True}, "strict": True}, schema_place),
        ({"schema": bad}, schema_place),
        ({"tools": (GO, STOP | {"parameters": bad})}, tool_place),
        (
            {"tools": (GO, STOP | {"parameters": {"uniqueItems": True}, "strict": True}), "choice": "required"},
            tool_place,
        ),
    ):
        with pytest.raises(InvalidRequest) as refused:
            request_of(view, route, **changes)
        assert refused.value.param == place
        assert refused.value.message.startswith(place)


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_compiler_refuses_is_told_in_the_words_of_the_request(
    view: ModelView, tokenizer: LLTokenizer, route: str
) -> None:
    never = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": (GO, STOP | {"parameters": never})}, "calls.tools.1"),
        ({"tools": (GO, STOP | {"parameters": never}), "choice": named(route, "stop")}, "calls.tools.0"),
        ({"schema": never}, "json_schema"),
    ]
    for changes, place in cases:
        request = request_of(view, route, **changes)
        assert request.params.structured_output is not None
        verdict = judge(tokenizer, request.params.structured_output)
        assert (verdict["place"], "no value can match it" in str(verdict["reason"])) == (place, True)
        refusal = InvalidRequest("", param=f"params.structured_output.{place}")
        expected = "tools.1.function.parameters" if route == "chat" else "tools.1.parameters"
        if place == "json_schema":
            expected = "response_format.json_schema.schema" if route == "chat" else "text.format.schema"
        assert with_body_names(refusal, spelling(route, changes)).param == expected


def spelling(route: str, changes: dict[str, Any]) -> dict[str, str]:
    tools = changes.get("tools", (GO, STOP))
    body: dict[str, Any] = {"model": "mini", "tool_choice": changes.get("choice", "auto")}
    if route == "chat":
        body |= {"messages": [{"role": "user", "content": "x"}]}
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}
        return openai_chat.spelling_of(parse_model(json.dumps(body).encode(), ChatCompletionBody))
    body |= {"input": "x", "tools": [{"type": "function"} | tool for tool in tools]}
    body["text"] = {"format": {"type": "json_schema", "name": "s", "schema": {}}}
    return openai_response_requests.spelling_of(parse_model(json.dumps(body).encode(), ResponseBody))
