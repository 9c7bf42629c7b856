"""A null says nothing, wherever a body has room for one; and a hint about a field is of the object that it is in."""

import json
import time
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import chat
from openai.types import responses as sdk
from pydantic import BaseModel

from api.simple import GenerateBody
from api.webhook_schemas import CreateBody
from dialects.bodies import drop_nulls, owner_at, parse_model
from dialects.fields import (
    FOREIGN_TOOLS,
    HINT_TREE,
    HINTS,
    NOT_INCLUDED,
    header_value,
    ignored_fields_context,
    is_foreign_tool,
    take_hints,
)
from dialects.native import EmbeddingJobBody, JobBody
from dialects.openai_chat import ChatCompletionBody
from dialects.openai_completions import CompletionBody
from dialects.openai_embeddings import EmbeddingBody
from dialects.openai_response_requests import LOGPROBS, ResponseBody
from domain.errors import InvalidRequest

CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}, {"type": "mcp"}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "stream_options": {"include_usage": True},
    "stream": True,
}
RESPONSE: dict[str, Any] = {
    "model": "m",
    "input": [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "3"}]},
    ],
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    "reasoning": {"effort": "none"},
}
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatCompletionBody, CHAT),
    (ResponseBody, RESPONSE),
    (CompletionBody, {"model": "m", "prompt": ["a"]}),
    (EmbeddingBody, {"model": "m", "input": ["a"]}),
    (JobBody, {"model": "m", "messages": [{"role": "user", "content": "a"}], "params": {"max_tokens": 3}}),
    (EmbeddingJobBody, {"model": "m", "inputs": ["a"]}),
    (GenerateBody, {"model": "m", "prompt": "a"}),
    (CreateBody, {"name": "a", "url": "https://example.org", "event_types": ["response.completed"]}),
]
OWN: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (JobBody, {"model": "m", "prompt": "a", "params": {"structured_output": {"json_schema": {"default": None}}}}),
    (
        ChatCompletionBody,
        CHAT | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}]},
    ),
    (
        ResponseBody,
        RESPONSE | {"tools": [{"type": "function", "name": "f", "parameters": {"enum": [None], "b": None}}]},
    ),
]


def read(model: type[BaseModel], body: object) -> tuple[BaseModel, list[str]]:
    ignored: list[str] = []
    token = ignored_fields_context.set(ignored)
    try:
        return parse_model(json.dumps(body).encode(), model, HINT_TREE), ignored
    finally:
        ignored_fields_context.reset(token)


def with_nulls(part: Any, names: list[str]) -> Any:
    """Each object of `part` with a null under each of `names` that it has not, but for the user's own objects."""
    if isinstance(part, list):
        return [with_nulls(item, names) for item in part]
    if not isinstance(part, dict):
        return part
    own = ("parameters", "schema", "json_schema") if "parameters" in part or "schema" in part else ()
    return {name: inner if name in own else with_nulls(inner, names) for name, inner in part.items()} | {
        name: None for name in names if name not in part
    }


@pytest.mark.parametrize(("model", "body"), BODIES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_null_says_nothing_at_any_depth(model: type[BaseModel], body: dict[str, Any]) -> None:
    odd = with_nulls(body, ["no_such_field", "caller", "parsed_arguments", "async"])
    assert read(model, odd) == read(model, body), "unknown fields"
    optional = {name for name, field in model.model_fields.items() if not field.is_required()} - body.keys()
    assert read(model, body | dict.fromkeys(optional)) == read(model, body), "known fields"


@pytest.mark.parametrize(("model", "body"), OWN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_null_of_the_users_own_stays(model: type[BaseModel], body: dict[str, Any]) -> None:
    with_a_null_elsewhere, _ = read(model, body | {"no_such_field": None})
    assert "None" in repr(with_a_null_elsewhere.model_dump(exclude_unset=True))
    assert with_a_null_elsewhere == read(model, body)[0]


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_null_is_no_value_where_one_must_be(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(ChatCompletionBody, CHAT | {name: None})
    assert caught.value.param == name


def test_what_is_known_is_told_of_the_kind_of_item_that_it_is() -> None:
    for number, name in enumerate(["statuz", "summery", "rol", "argumens", "outputt"]):
        items = [item | ({name: 1} if place == number else {}) for place, item in enumerate(RESPONSE["input"])]
        with pytest.raises(InvalidRequest, match=f"did you mean {nearest(name)}") as caught:
            read(ResponseBody, RESPONSE | {"input": items})
        assert caught.value.param == f"input.{number}.{name}"


def nearest(name: str) -> str:
    names = {"statuz": "status", "summery": "summary", "rol": "role", "argumens": "arguments", "outputt": "output"}
    return names[name]


#: The SDK's types of what we answer, and where clients send it back.
ANSWERS: list[tuple[type[BaseModel], type[BaseModel], tuple[str | int, ...], str]] = [
    (chat.ParsedChatCompletionMessage[None], ChatCompletionBody, ("messages", 0), "messages.*."),
    (chat.ParsedFunctionToolCall, ChatCompletionBody, ("messages", 0, "tool_calls", 0), "messages.*.tool_calls.*."),
    (
        chat.parsed_function_tool_call.ParsedFunction,
        ChatCompletionBody,
        ("messages", 0, "tool_calls", 0, "function"),
        "messages.*.tool_calls.*.function.",
    ),
    (sdk.ParsedResponseOutputMessage[None], ResponseBody, ("input", "<items>", 0, "<message>"), "input.*."),
    (
        sdk.ParsedResponseOutputText[None],
        ResponseBody,
        ("input", "<items>", 0, "<message>", "content", "<parts>", 0),
        "input.*.content.*.",
    ),
    (
        sdk.ResponseOutputRefusal,
        ResponseBody,
        ("input", "<items>", 0, "<message>", "content", "<parts>", 0),
        "input.*.content.*.",
    ),
    (sdk.ParsedResponseFunctionToolCall, ResponseBody, ("input", "<items>", 0, "<function_call>"), "input.*."),
    (sdk.ResponseFunctionToolCallItem, ResponseBody, ("input", "<items>", 0, "<function_call>"), "input.*."),
    (
        sdk.ResponseFunctionToolCallOutputItem,
        ResponseBody,
        ("input", "<items>", 0, "<function_call_output>"),
        "input.*.",
    ),
    (sdk.ResponseReasoningItem, ResponseBody, ("input", "<items>", 0, "<reasoning>"), "input.*."),
    (sdk.ResponseInputMessageItem, ResponseBody, ("input", "<items>", 0, "<message>"), "input.*."),
]


@pytest.mark.parametrize(
    ("answer", "body", "location", "place"), ANSWERS, ids=lambda value: getattr(value, "__name__", "")
)
def test_every_field_of_the_sdks_answers_can_be_sent_back(
    answer: type[BaseModel], body: type[BaseModel], location: tuple[str | int, ...], place: str
) -> None:
    owner = owner_at(body, location)
    assert owner is not None
    names = {field.alias or name for name, field in answer.model_fields.items()}
    unknown = {name for name in names if name not in owner.model_fields and f"{place}{name}" not in HINTS}
    assert not unknown


def test_every_tool_of_the_sdks_is_a_function_or_foreign() -> None:
    tools = (*get_args(sdk.ToolParam), chat.ChatCompletionCustomToolParam)
    kinds = {
        kind for tool in tools for kind in get_args(get_args(get_type_hints(tool, include_extras=True)["type"])[0])
    }
    assert "web_search_2025_08_26" in kinds
    assert {kind for kind in kinds if not is_foreign_tool({"type": kind})} == {"function"}
    assert not is_foreign_tool({"type": "functoin"})
    assert all(is_foreign_tool({"type": f"{kind}_20250101"}) for kind in FOREIGN_TOOLS)


def test_everything_that_the_sdk_can_ask_to_include_is_known() -> None:
    assert set(get_args(sdk.ResponseIncludable)) == {LOGPROBS, *NOT_INCLUDED}


def test_hints_are_taken_out_and_named() -> None:
    body = CHAT | {"client_metadata": {"a": 1}, "verbosity": "low", "mirostat": 0}
    body["messages"] = [message | {"cache_control": {"type": "ephemeral"}} for message in CHAT["messages"]]
    taken, ignored = read(ChatCompletionBody, body)
    assert taken == read(ChatCompletionBody, CHAT)[0]
    assert sorted(ignored) == sorted(
        ["client_metadata", "verbosity", "mirostat", "tools.1", *(f"messages.{n}.cache_control" for n in range(3))]
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("mirostat", 5), ("truncation", "on"), ("echo", True), ("length_penalty", True), ("return_full_text", 1)],
)
def test_a_value_that_would_change_the_answer_is_refused_with_those_that_would_not(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is .*: only .* is accepted") as caught:
        read(ChatCompletionBody, CHAT | {field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


def test_a_header_names_no_more_than_it_can_hold() -> None:
    assert header_value(["a", "b", "a"]) == "a, b"
    assert header_value([f"messages.{number}.id" for number in range(40)]).endswith("messages.31.id, 8 more")


@pytest.mark.parametrize("item", ["{}", '{"a":null}', '{"role":"user","content":[{},{}],"id":"x"}', "null"])
def test_nulls_and_hints_cost_no_more_than_their_number(item: str) -> None:
    def seconds(num_items: int) -> float:
        body = json.loads(f'{{"model":"m","messages":[{",".join([item] * num_items)}],"a":null}}')
        started = time.process_time()
        drop_nulls(body, ChatCompletionBody)
        take_hints(body, HINT_TREE)
        return time.process_time() - started

    few, many = (min(seconds(num_items) for _ in range(3)) for num_items in (2_000, 16_000))
    assert many < 24 * few + 0.02
