"""The unmodified `anthropic` SDK: messages whole and streamed, tools, thoughts, stop sequences, counts and errors."""

import json
from typing import Any

import anthropic
import httpx
import pytest

from tests.conformance.anthropic_stack import ASKED, HI, Stack, stack

__all__ = ["stack"]

ADD: Any = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
CALL = 'So:\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
PIECES = ["So:", "\n<tool", '_call>\n{"name": "ad', 'd", "argu', 'ments": {"a": 1', ', "b": 2}}', "\n</tool_call>"]
THOUGHTS = ["<think>\nHm", ", two.\n</think>", "\n\nIt is", " two."]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of each event of a body. Asserts that each has the name that its data says."""
    events = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = (line for line in block.split("\n"))
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_a_message_comes_whole_and_is_a_job(stack: Stack) -> None:
    message = stack.ask(
        "Hello ", "there", system="Be brief.", metadata={"user_id": "me"}, extra_body={"temperature": 0.5}
    )
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "large")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello there"}]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens == len("system: Be brief.\nuser: Hi\nassistant: ")
    assert (message.usage.output_tokens, message.usage.cache_read_input_tokens) == (len("Hello there"), 0)
    assert message._request_id is not None
    assert message._request_id.startswith("req_")
    job = stack.http.get(f"/v1/jobs/{message.id}").json()
    assert job["id"] == message.id.replace("msg_", "job_")
    assert (job["status"], job["metadata"]) == ("completed", {"user_id": "me"})


def test_a_stream_has_the_events_of_the_reference_in_their_order(stack: Stack) -> None:
    with stack.saying("Hello ", "there"):
        response = stack.http.post("/v1/messages?beta=true", json=ASKED | {"stream": True})
    events = [event for event in events_of(response)]
    pings = [event for event in events if event["type"] == "ping"]
    assert pings
    assert all(event == {"type": "ping"} for event in pings)
    told = [event for event in events if event["type"] != "ping"]
    head = told[0]["message"]
    assert (head["content"], head["stop_reason"], head["stop_sequence"]) == ([], None, None)
    assert head["usage"]["input_tokens"] == len("user: Hi\nassistant: ")
    assert told[1:] == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello "}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "there"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None},
            "usage": {
                "input_tokens": len("user: Hi\nassistant: "),
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 11,
                "output_tokens_details": {"thinking_tokens": 0},
            },
        },
        {"type": "message_stop"},
    ]
    assert response.headers["x-job-id"] == head["id"].replace("msg_", "job_")
    assert response.headers["request-id"] == response.headers["x-request-id"]


def test_the_stream_helper_puts_a_call_together_and_a_repeated_request_finds_the_same(stack: Stack) -> None:
    key = {"Idempotency-Key": "the-same"}
    with stack.saying(*PIECES), stack.client.messages.stream(**ASKED, tools=[ADD], extra_headers=key) as stream:
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    whole = stack.client.messages.create(**ASKED, tools=[ADD], extra_headers=key)
    assert len(partial) > 1, "the input comes as it is written"
    assert [block.type for block in streamed.content] == ["text", "tool_use"]
    assert streamed.to_dict() == whole.to_dict()
    assert streamed.stop_reason == "tool_use"


def test_a_conversation_goes_on_with_all_that_the_sdk_gave_back(stack: Stack) -> None:
    first = stack.ask(CALL, tools=[ADD], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    call = first.content[1]
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("add", {"a": 1, "b": 2})
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "3"}]}
    for content in (first.content, [block.model_dump() for block in first.content]):
        turns: Any = [*HI, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
        assert stack.ask("It is 3.", messages=turns, tools=[ADD]).stop_reason == "end_turn"
        counted = stack.client.messages.count_tokens(model="large", messages=turns, tools=[ADD])
        assert counted.input_tokens > len("assistant: So:")


def test_thoughts_are_told_to_whom_asks_for_them_and_taken_back(stack: Stack) -> None:
    asked: Any = ASKED | {"model": "thinker", "max_tokens": 100}
    enabled: Any = {"type": "enabled", "budget_tokens": 1024}
    with stack.saying(*THOUGHTS), stack.client.messages.stream(**asked, thinking=enabled) as stream:
        thoughts = [event.thinking for event in stream if event.type == "thinking"]
        streamed = stream.get_final_message()
    assert "".join(thoughts) == "Hm, two."
    whole = stack.ask(*THOUGHTS, **asked, thinking={"type": "adaptive"})
    for message in (streamed, whole):
        thinking, text = (block.to_dict() for block in message.content)
        assert thinking.pop("signature")
        assert thinking == {"type": "thinking", "thinking": "Hm, two."}
        assert text == {"type": "text", "text": "It is two."}
    turns: Any = [*HI, {"role": "assistant", "content": [block.model_dump() for block in whole.content]}, *HI]
    omitted = stack.ask(*THOUGHTS, **asked | {"messages": turns}, thinking=enabled | {"display": "omitted"})
    assert [block.to_dict().get("thinking") for block in omitted.content] == ["", None]
    for untold in (stack.ask(*THOUGHTS, **asked), stack.ask(*THOUGHTS, **asked, thinking={"type": "disabled"})):
        assert [block.to_dict() for block in untold.content] == [{"type": "text", "text": "It is two."}]


def test_every_end_has_its_reason(stack: Stack) -> None:
    stopped = stack.ask("One, ", last={"stop_string": "two"}, stop_sequences=["three", "two"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")
    cut = stack.ask("x" * 30, last={"finish_reason": "length"})
    assert cut.stop_reason == "max_tokens"
    full = stack.ask("xx", last={"finish_reason": "length"}, model="fake", max_tokens=32_000, timeout=60)
    assert full.stop_reason == "model_context_window_exceeded"
    half = stack.ask(CALL[:50], last={"finish_reason": "length"}, tools=[ADD], max_tokens=50)
    assert half.stop_reason == "max_tokens"
    assert half.content[-1].type == "tool_use"


def test_the_answer_goes_on_where_the_last_message_ends(stack: Stack) -> None:
    turns: Any = [*HI, {"role": "assistant", "content": "The answer is ("}]
    message = stack.ask("B)", messages=turns)
    assert message.usage.input_tokens == len("user: Hi\nassistant: The answer is (")
    assert stack.client.messages.count_tokens(model="large", messages=turns).input_tokens == message.usage.input_tokens


def test_a_failure_in_mid_stream_is_an_error_event_that_the_sdk_raises(stack: Stack) -> None:
    key = {"Idempotency-Key": "cancelled"}
    with stack.client.messages.create(**ASKED, stream=True, extra_headers=key) as stream:
        cancelled = stack.http.post(f"/v1/jobs/{stream.response.headers['x-job-id']}/cancel")
        assert cancelled.status_code == 200
        with pytest.raises(anthropic.APIStatusError) as refusal:
            list(stream)
    body: Any = refusal.value.body
    assert body["type"] == "error"
    assert body["error"]["details"]["error_code"] == "job_cancelled"
    assert body["request_id"] == stream.response.headers["request-id"]


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"model": "no-such"}, anthropic.NotFoundError, "no-such"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}], "model": "fake"}, anthropic.BadRequestError, "64"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "a"}}]}]},
            anthropic.BadRequestError,
            "messages.0.content.0.type",
        ),
    ],
)
def test_a_refusal_is_the_sdks_exception(
    stack: Stack, asked: dict[str, Any], error: type[anthropic.APIStatusError], message: str
) -> None:
    with pytest.raises(error) as refusal:
        stack.client.messages.create(**(ASKED | asked))
    body: Any = refusal.value.body
    assert set(body) == {"type", "error", "request_id"}
    assert body["error"]["type"] == ("not_found_error" if error is anthropic.NotFoundError else "invalid_request_error")
    assert message in body["error"]["message"]
    assert refusal.value.request_id == body["request_id"]


def test_every_layer_refuses_in_the_same_shape(stack: Stack) -> None:
    settings = stack.server.services.settings
    large = json.dumps(ASKED | {"system": "x" * settings.max_body_bytes})
    json_type = {"content-type": "application/json"}
    refusals = [
        (stack.http.post("/v1/messages", content=large, headers=json_type), 413, "request_too_large"),
        (stack.http.post("/v1/messages", content=b"{", headers=json_type), 400, "invalid_request_error"),
        (stack.http.post("/v1/messages", content=b"{}"), 415, "invalid_request_error"),
        (stack.http.delete("/v1/messages"), 405, "invalid_request_error"),
        (stack.http.get("/v1/messages/no/such/path"), 404, "not_found_error"),
        (stack.http.get("/v1/models/no-such", headers={"anthropic-version": "2023-06-01"}), 404, "not_found_error"),
    ]
    for response, status, kind in refusals:
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
        assert response.json()["request_id"] == response.headers["request-id"]
    assert stack.http.get("/v1/models/no-such").json()["error"]["code"] == "model_not_found"


def test_a_model_that_nobody_serves_is_overload(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    services = stack.server.services
    monkeypatch.setattr(services, "settings", services.settings.model_copy(update={"no_workers_seconds": 0}))
    with pytest.raises(anthropic.OverloadedError) as overload:
        stack.client.messages.create(**ASKED)
    assert overload.value.type == "overloaded_error"
    assert 1 <= int(overload.value.response.headers["retry-after"]) <= 60


def test_models_are_listed_in_the_words_of_who_asks(stack: Stack) -> None:
    models = list(stack.client.models.list())
    assert {model.id for model in models} >= {"fake", "large", "thinker"}
    assert stack.client.models.retrieve("fake").max_input_tokens == 64
    assert stack.http.get("/v1/models").json()["object"] == "list"


def test_what_has_no_effect_is_named(stack: Stack) -> None:
    hints: Any = {
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "system": [{"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "adaptive"},
        "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14"],
        "metadata": {"user_id": "user_1_account__session_2"},
    }
    with stack.saying("Hello"):
        raw = stack.client.beta.messages.with_raw_response.create(**(ASKED | hints))
    assert raw.headers["x-ignored-fields"] == "context_management, system.0.cache_control, thinking"
    assert raw.parse().content[0].type == "text"


def test_a_retry_of_what_was_not_delivered_attaches(stack: Stack) -> None:
    headers = {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "600", "X-On-Disconnect": "continue"}
    asked = ASKED | {"system": "a request of its own"}
    before, stack.is_asking = stack.newest_job_id(), True
    with (
        stack.client.messages.create(**asked, stream=True) as first,
        stack.http.stream("POST", "/v1/messages", json=asked | {"stream": True}, headers=headers) as retried,
    ):
        job_id = stack.answer_next("the whole ", "text", after=before)
        retried.read()
    assert retried.headers["x-retry-attached"] == "true"
    assert retried.headers["x-job-id"] == first.response.headers["x-job-id"] == job_id
    told = [event for event in events_of(retried) if event["type"] == "content_block_delta"]
    assert "".join(event["delta"]["text"] for event in told) == "the whole text"
