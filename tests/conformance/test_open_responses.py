"""What the Open Responses specification (openresponses.org, ResponseResource and its parts) requires of every response.

The cases are those that its acceptance suite sends over HTTP; the checks are our own.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai

from tests.conformance.harness import Served
from tests.conformance.test_openai_responses import frames_of
from tests.conformance.test_openai_tools import CALL, answer_next
from tests.integration.api_harness import ApiServer, HandWorker
from tests.integration.runner_harness import MODEL

REQUIRED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
    *("safety_identifier", "prompt_cache_key"),
}
NUMBERS = ("top_p", "presence_penalty", "frequency_penalty", "temperature", "top_logprobs", "created_at")
REQUIRED_BY_TYPE = {
    "message": {"type", "id", "status", "role", "content"},
    "function_call": {"type", "id", "call_id", "name", "arguments", "status"},
    "reasoning": {"type", "id", "summary"},
}
REQUIRED_OF_USAGE = {
    *("input_tokens", "output_tokens", "total_tokens", "input_tokens_details", "output_tokens_details"),
}
TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
CASES: dict[str, list[dict[str, Any]]] = {
    "basic text": [{"type": "message", "role": "user", "content": "Say hello."}],
    "system prompt": [
        {"type": "message", "role": "system", "content": "You are a pirate."},
        {"type": "message", "role": "user", "content": "Say hello."},
    ],
    "several turns": [
        {"type": "message", "role": "user", "content": "My name is Alice."},
        {"type": "message", "role": "assistant", "content": "Hello Alice!"},
        {"type": "message", "role": "user", "content": "What is my name?"},
    ],
    "phases of an assistant": [
        {"type": "message", "role": "assistant", "phase": "commentary", "content": "I should look it up."},
        {"type": "message", "role": "assistant", "phase": "final_answer", "content": "It is four."},
        {"type": "message", "role": "user", "content": "Repeat it."},
    ],
}


def check(response: dict[str, Any]) -> None:
    assert not REQUIRED - response.keys()
    assert all(isinstance(response[name], int | float) for name in NUMBERS)
    for item in response["output"]:
        assert not REQUIRED_BY_TYPE[item["type"]] - item.keys()
    for part in (part for item in response["output"] if item["type"] == "message" for part in item["content"]):
        assert not {"type", "text", "annotations"} - part.keys()
    for tool in response["tools"]:
        assert not {"type", "name", "description", "parameters", "strict"} - tool.keys()
    if response["usage"] is not None:
        assert not REQUIRED_OF_USAGE - response["usage"].keys()
    if response["status"] == "completed":
        assert response["completed_at"] is not None
        assert response["output"]


def test_every_response_has_what_the_specification_requires(served: Served) -> None:
    with served.server.client() as http:
        for name, items in CASES.items():
            asked = {"model": MODEL, "input": items, "max_output_tokens": 4}
            for fields in ({}, {"store": False}, {"tools": [TOOL]}, {"background": True}):
                answer = http.post("/v1/responses", json=asked | fields)
                assert answer.status_code == 200, (name, answer.text)
                check(answer.json())
                if "store" not in fields:
                    check(http.get(f"/v1/responses/{answer.json()['id']}").json())
            events = frames_of(http.post("/v1/responses", json=asked | {"stream": True}).text)
            assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.incomplete")
            shown = [event["response"] for event in events if "response" in event]
            assert [response["status"] for response in shown] == ["in_progress", "in_progress", "incomplete"]
            for response in shown:
                check(response)


def test_a_called_function_is_an_item_of_its_own(api: ApiServer, hand_worker: HandWorker) -> None:
    body = {"model": "large", "input": CASES["basic text"], "tools": [TOOL], "max_output_tokens": 100}
    with api.client() as http, ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, CALL)
        response: dict[str, Any] = http.post("/v1/responses", json=body).json()
        job.result()
    check(response)
    assert [item["type"] for item in response["output"]] == ["message", "function_call"]


def test_a_response_that_was_cancelled_or_refused_keeps_to_it_too(client: openai.OpenAI, http: httpx.Client) -> None:
    waiting = client.responses.create(model="fake", input="Hi", background=True)
    cancelled = http.post(f"/v1/responses/{waiting.id}/cancel").json()
    check(cancelled)
    assert cancelled["status"] == "cancelled"
    unknown = http.post("/v1/responses", json={"model": "fake", "input": "Hi", "previous_response_id": "resp_missing"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (400, "previous_response_not_found")
