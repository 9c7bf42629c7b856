"""Tools and reasoning through the unmodified SDK: what the model writes by its own convention becomes tool calls."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from domain.jobs import external_id, parse_id
from storage import job_queries
from storage.tables import DEFAULT_TENANT_ID
from tests.conformance.harness import MESSAGES
from tests.integration.api_harness import ApiServer, HandWorker, make_chunk
from tests.waiting import wait_until

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CALL = 'So:\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
PIECES = ["So:", "\n<tool", '_call>\n{"name": "ad', 'd", "argu', 'ments": {"a": 1', ', "b": 2}}', "\n</tool_call>"]


def answer_next(worker: HandWorker, *texts: str) -> str:
    """Run the one job that waits so that it says `texts`; its id."""

    def waiting() -> Any:
        with worker.sessions() as session:
            jobs = job_queries.list_jobs(session, DEFAULT_TENANT_ID, limit=1)
        return jobs[0] if jobs else None

    job_id = external_id(wait_until(waiting).id)
    job = worker.claim(job_id)
    for number, text in enumerate(texts, start=1):
        last: dict[str, Any] = {"finish_reason": "stop"} if number == len(texts) else {}
        worker.commit(job, make_chunk(number, text, **last))
    worker.finish(job, *texts)
    return job_id


def test_a_call_comes_whole(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, CALL)
        answer = client.chat.completions.create(model="large", messages=MESSAGES, tools=[ADD], max_tokens=30)
        job.result()
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "So:"
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == {"a": 1, "b": 2}


def test_a_call_comes_in_pieces_with_the_same_id(
    client: openai.OpenAI, api: ApiServer, hand_worker: HandWorker
) -> None:
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, *PIECES)
        options: Any = {"model": "large", "messages": MESSAGES, "tools": [ADD], "max_tokens": 30}
        with client.chat.completions.stream(**options, extra_headers={"Idempotency-Key": "k"}) as stream:
            events = list(stream)
            final = stream.get_final_completion()
        job.result()
        again = client.chat.completions.create(**options, extra_headers={"Idempotency-Key": "k"})
    deltas = [event.chunk.choices[0].delta for event in events if event.type == "chunk" and event.chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "So:"
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert (calls[0].id is not None, calls[0].type) == (True, "function")
    assert all(call.id is None for call in calls[1:])
    assert len(calls) > 2, "arguments come as they are written"
    assert final.choices[0].finish_reason == "tool_calls"
    [call], [same] = final.choices[0].message.tool_calls or [], again.choices[0].message.tool_calls or []
    assert call.id == same.id
    assert call.function.arguments == same.function.arguments


def test_the_conversation_goes_on_with_the_tools_answer(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, CALL)
        options: Any = {"model": "large", "tools": [ADD], "max_tokens": 100}
        first = client.chat.completions.create(messages=MESSAGES, **options)
        job.result()
        message = first.choices[0].message
        [call] = message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "3"}]}
        following = threads.submit(answer_newest, hand_worker, first.id, "It is 3.")
        second = client.chat.completions.create(messages=[*MESSAGES, message, result], **options)
        following.result()
    assert second.choices[0].message.content == "It is 3."
    assert second.choices[0].finish_reason == "stop"


def answer_newest(worker: HandWorker, after: str, *texts: str) -> None:
    def has_come() -> bool:
        with worker.sessions() as session:
            return bool(job_queries.list_jobs(session, DEFAULT_TENANT_ID, after=parse_id(after), order="asc"))

    wait_until(has_come)
    answer_next(worker, *texts)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required"}, "tools"),
    ({"tools": [ADD, ADD]}, "tools"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice.function.name"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}], "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "functoin", "function": {"name": "x"}}]}, "tools.0.type"),
    ({"tools": [{"type": "web_search"}, {"type": "function", "function": {"name": "a b"}}]}, "tools.1.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"messages": [{"role": "tool", "content": "3"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
    ),
    ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages.0.role"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "hard"}, "reasoning_effort"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {"include_obfuscation": False}, "stream": False}, "stream_options"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"n": 99}, "n"),
    ({"temperature": 3}, "temperature"),
    ({"max_tokens": 1000}, "max_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_t12_what_is_not_served_is_refused_by_name(api: ApiServer, fields: dict[str, Any], param: str) -> None:
    body = {"model": "fake", "messages": MESSAGES} | fields
    answer = httpx.post(f"{api.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["message"]
