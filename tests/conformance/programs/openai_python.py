"""What people do with openai-python, written for its 1.x and true for what came after. Asserts for itself."""

import json
from typing import Any

import openai
import pytest

from tests.conformance.programs import report

MODEL, BY_HAND = "test-model", "by-hand"  # one whose jobs run, and one that always calls the tool
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
ADD: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
client = openai.OpenAI(max_retries=0)  # the URL and the key come from the environment


def chat_whole() -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, n=2, seed=3)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert all(choice.message.content and choice.message.role == "assistant" for choice in answer.choices)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


def chat_stream() -> None:
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, seed=3, stream=True, stream_options=options
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8, seed=3)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def chat_stream_helper() -> None:
    with client.beta.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=5) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.current_completion_snapshot
    assert "".join(deltas) == final.choices[0].message.content


def chat_stream_closed_early() -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1000, stream=True)
    assert next(iter(stream)).choices[0].delta.role == "assistant"
    stream.close()


def tool_call_whole_and_answered() -> None:
    answer = client.chat.completions.create(model=BY_HAND, messages=MESSAGES, tools=[ADD], max_tokens=30)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"a": 1}
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    history: Any = [*MESSAGES, choice.message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(model=BY_HAND, messages=history, tools=[ADD], max_tokens=30).choices


def tool_call_streamed() -> None:
    stream = client.chat.completions.create(model=BY_HAND, messages=MESSAGES, tools=[ADD], max_tokens=30, stream=True)
    names, arguments, reasons = [], "", []
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            assert call.function is not None
            names.append(call.function.name)
            arguments += call.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert [name for name in names if name] == ["add"]
    assert json.loads(arguments) == {"a": 1}
    assert reasons[-1] == "tool_calls"


def completions() -> None:
    answer = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    stream = client.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream)


def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).object == "model"


def raw_headers() -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=2)
    assert raw.headers["x-request-id"]
    assert raw.headers["x-job-id"].startswith("job_")
    assert raw.parse().choices


def a_bad_value_is_a_bad_request() -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert (raised.value.status_code, raised.value.code, raised.value.param) == (400, "invalid_value", "temperature")
    assert raised.value.request_id


def an_unknown_model_is_not_found() -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="none", messages=MESSAGES)
    assert raised.value.code == "model_not_found"


def a_wrong_key_is_an_authentication_error() -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        client.with_options(api_key="sk_wrong").models.list()
    assert raised.value.code == "invalid_api_key"


CASES = [
    chat_whole,
    chat_stream,
    chat_stream_helper,
    chat_stream_closed_early,
    tool_call_whole_and_answered,
    tool_call_streamed,
    completions,
    models,
    raw_headers,
    a_bad_value_is_a_bad_request,
    an_unknown_model_is_not_found,
    a_wrong_key_is_an_authentication_error,
]

report.run(CASES, version=openai.__version__)
