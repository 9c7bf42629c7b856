"""Bodies of Anthropic's Messages: what they ask of a job, what is taken and named, and what is refused."""

import json
from typing import Any

import pytest

from dialects.anthropic_fields import ANTHROPIC_HINT_TREE
from dialects.anthropic_requests import MessagesBody, PromptBody, to_generation_request, to_prompt
from dialects.bodies import parse_model
from dialects.fields import ignored_fields_context
from domain.catalog import Catalog, ModelSpec
from domain.errors import InvalidRequest
from domain.requests import GenerationRequest
from text.models import ModelViews

FAKE = ModelViews(Catalog([ModelSpec(id="fake", path="fake", backend="fake", max_model_len=1024)])).get("fake")
BODY: dict[str, Any] = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
ADD: dict[str, Any] = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
EPHEMERAL = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def read(**fields: Any) -> GenerationRequest:
    body = parse_model(json.dumps(BODY | fields).encode(), MessagesBody, ANTHROPIC_HINT_TREE)
    return to_generation_request(body, FAKE)


def read_and_named(**fields: Any) -> tuple[GenerationRequest, list[str]]:
    ignored: list[str] = []
    token = ignored_fields_context.set(ignored)
    try:
        return read(**fields), ignored
    finally:
        ignored_fields_context.reset(token)


def spoken(*messages: dict[str, Any], **fields: Any) -> list[tuple[Any, ...]]:
    request = read(messages=list(messages), **fields)
    return [(message.role, message.content) for message in request.messages or ()]


def test_strings_and_blocks_ask_for_the_same() -> None:
    blocks = [{"type": "text", "text": "Hi"}]
    as_blocks = read(system=[{"type": "text", "text": "Be brief."}], messages=[{"role": "user", "content": blocks}])
    assert as_blocks == read(system="Be brief.")
    assert [message.role for message in as_blocks.messages or ()] == ["system", "user"]


def test_every_parameter_comes_under_its_name_here() -> None:
    request = read(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["END", "\n\n"])
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (9, 0.5, 0.9, 7)
    assert params.stop == ("END", "\n\n")


def test_neighbours_of_one_role_are_one_message() -> None:
    assistant = {"role": "assistant", "content": "Yes?"}
    user = {"role": "user", "content": "Hi"}
    again = {"role": "user", "content": [{"type": "text", "text": "You"}, {"type": "text", "text": "there"}]}
    assert spoken(user, assistant, assistant, user, again) == [
        ("user", "Hi"),
        ("assistant", "Yes?\nYes?"),
        ("user", "Hi\nYou\nthere"),
    ]


def test_a_turn_of_tools_is_a_call_and_its_results() -> None:
    used = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "2"}]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no such tool", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    request = read(
        tools=[ADD],
        messages=[
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": [thought, {"type": "text", "text": "So:"}, used]},
            {"role": "user", "content": results},
        ],
    )
    _, assistant, *rest = request.messages or ()
    assert (assistant.content, assistant.reasoning_content) == ("So:", "Hm.")
    [call] = assistant.tool_calls
    assert (call.id, call.name, call.arguments) == ("toolu_1", "add", '{"a": 1}')
    assert [(one.role, one.content, one.tool_call_id) for one in rest] == [
        ("tool", "2", "toolu_1"),
        ("tool", "Error: no such tool", "toolu_2"),
        ("user", "Go on.", None),
    ]


def test_the_assistants_last_message_is_the_beginning_of_the_answer() -> None:
    request = read(messages=[*BODY["messages"], {"role": "assistant", "content": "The answer is ("}])
    assert request.continue_final_message
    assert FAKE.encode(request) == list(b"user: Hi\nassistant: The answer is (")
    assert not read().continue_final_message


@pytest.mark.parametrize(
    ("choice", "calls", "parallel"),
    [
        ({"type": "auto"}, None, True),
        ({"type": "any", "disable_parallel_tool_use": True}, ["add", "sub"], False),
        ({"type": "tool", "name": "sub"}, ["sub"], True),
    ],
)
def test_a_choice_of_tools_holds_the_output_to_them(
    choice: dict[str, Any], calls: list[str] | None, parallel: bool
) -> None:
    request = read(tools=[ADD, ADD | {"name": "sub", "type": "custom"}], tool_choice=choice)
    output = request.params.structured_output
    assert [tool.name for tool in request.tools] == ["add", "sub"]
    assert (None if output is None or output.calls is None else [tool.name for tool in output.calls.tools]) == calls
    assert request.parallel_tool_calls is parallel


def test_tools_that_may_not_be_used_are_not_shown() -> None:
    assert read(tools=[ADD], tool_choice={"type": "none"}).tools == ()


def test_a_format_is_enforced() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    request = read(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "high"})
    assert request.params.structured_output is not None
    assert request.params.structured_output.json_schema == schema


def test_what_claude_code_sends_is_taken_and_named() -> None:
    foreign = [
        {"type": "web_search_20260209", "name": "web_search", "max_uses": 8},
        {"type": "mcp_toolset", "mcp_server_name": "docs"},
    ]
    request, ignored = read_and_named(
        system=[{"type": "text", "text": "You are Claude Code."} | EPHEMERAL, {"type": "text", "text": "Long."}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", "citations": None} | EPHEMERAL]}],
        tools=[ADD | EPHEMERAL | {"eager_input_streaming": True}, *foreign],
        metadata={"user_id": "user_1_account__session_2"},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "medium"},
    )
    assert [tool.name for tool in request.tools] == ["add"]
    assert ignored == [
        *("context_management", "tools.1", "tools.2", "system.0.cache_control", "tools.0.cache_control"),
        *("tools.0.eager_input_streaming", "messages.0.content.0.cache_control", "thinking", "output_config.effort"),
    ]


def test_a_message_goes_back_as_the_sdk_dumps_it() -> None:
    answered = {
        "id": "msg_1",
        "container": None,
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "redacted_thinking", "data": "secret"},
            {"type": "text", "text": "Hello", "citations": None},
            {"type": "tool_use", "id": "t", "name": "add", "input": {}, "caller": {"type": "direct"}},
        ],
        "model": "fake",
        "role": "assistant",
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "type": "message",
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    turns = [*BODY["messages"], answered, {"role": "user", "content": "Go on"}]
    assert spoken(*turns) == [("user", "Hi"), ("assistant", "Hello"), ("user", "Go on")]


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.content.0.content.0.type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"system": [IMAGE]}, "system.0.type"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"name": "a", "type": "no_such_thing", "input_schema": {}}]}, "tools.0.type"),
        ({"tools": [{"name": "a b", "input_schema": {"type": "object"}}]}, "tools.0.name"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"tools": [ADD | {"strict": True, "input_schema": {"type": "object", "not": {}}}]}, "tools.0.input_schema"),
        ({"container": "container_1"}, "container"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format.schema"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    if fields.get("tools", [{}])[0].get("strict"):
        fields = fields | {"tool_choice": {"type": "any"}}
    with pytest.raises(InvalidRequest) as refusal:
        read(**fields)
    assert refusal.value.param == param
    assert param.partition(".")[0] in refusal.value.message


def test_the_prompt_that_is_counted_is_the_one_that_is_sent() -> None:
    prompt = {"model": "fake", "system": "Be brief.", "messages": BODY["messages"], "tools": [ADD]}
    counted = to_prompt(parse_model(json.dumps(prompt).encode(), PromptBody, ANTHROPIC_HINT_TREE), FAKE)
    assert FAKE.encode(counted) == FAKE.encode(read(system="Be brief.", tools=[ADD]))
