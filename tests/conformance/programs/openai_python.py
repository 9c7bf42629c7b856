"""What people do with openai-python, written for its 1.x and true for what came after. Asserts for itself."""

import json
import time
from typing import Any

import openai
import pytest

from tests.conformance.programs import report
from tests.webhook_receiver import receiving

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


def response_whole() -> None:
    answer = client.responses.create(model=MODEL, input="Hi", max_output_tokens=6)
    assert answer.output_text
    assert (answer.status, answer.usage and answer.usage.output_tokens) == ("incomplete", 6)
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert client.responses.retrieve(answer.id).output_text == answer.output_text


def response_stream() -> None:
    with client.responses.stream(model=MODEL, input="Hi", max_output_tokens=6) as stream:
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text


def response_in_the_background_and_resumed() -> None:
    answer = client.responses.create(model=MODEL, input="Hi", max_output_tokens=40, background=True)
    assert answer.status in ("queued", "in_progress")
    whole: list[Any] = list(client.responses.retrieve(answer.id, stream=True))
    resumed: list[Any] = list(client.responses.retrieve(answer.id, stream=True, starting_after=7))
    assert [event.sequence_number for event in resumed] == list(range(8, len(whole)))
    assert resumed == whole[8:]
    assert client.responses.retrieve(answer.id).output_text == whole[-1].response.output_text


def embeddings() -> None:
    """Asked for as base64, which is what the SDK does by itself, and as numbers."""
    answer = client.embeddings.create(model=MODEL, input=["One", "Two"], dimensions=4)
    assert [entry.index for entry in answer.data] == [0, 1]
    plain = client.embeddings.create(model=MODEL, input="One", dimensions=4, encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding)
    assert answer.usage.total_tokens > plain.usage.total_tokens


def files_and_a_batch() -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    content = "\n".join(json.dumps({"custom_id": f"line-{number}"} | line) for number in range(3)).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert client.files.content(file.id).content == content
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 3
    assert batch.output_file_id is not None
    answers = [json.loads(one) for one in client.files.content(batch.output_file_id).text.splitlines()]
    assert {one["custom_id"] for one in answers} == {"line-0", "line-1", "line-2"}
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 4 for one in answers)
    assert batch.id in [one.id for one in client.batches.list(limit=1)]


def webhook() -> None:
    """Its endpoint is made by hand, as 1.x has no call for it; what arrives is unwrapped by the SDK."""
    with receiving() as receiver:
        asked = {"name": "program", "url": receiver.url(), "event_types": ["response.incomplete"]}
        endpoint: Any = client.post("/webhook_endpoints", cast_to=object, body=asked)
        answer = client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
        while not receiver.received:
            time.sleep(0.01)
    [received] = receiver.received
    event: Any = client.webhooks.unwrap(received.body, received.headers, secret=endpoint["signing_secret"])
    assert (event.type, event.data.id) == ("response.incomplete", answer.id)
    client.delete(f"/webhook_endpoints/{endpoint['id']}", cast_to=object)


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
    response_whole,
    response_stream,
    response_in_the_background_and_resumed,
    embeddings,
    files_and_a_batch,
    webhook,
    raw_headers,
    a_bad_value_is_a_bad_request,
    an_unknown_model_is_not_found,
    a_wrong_key_is_an_authentication_error,
]

report.run(CASES, version=openai.__version__)
