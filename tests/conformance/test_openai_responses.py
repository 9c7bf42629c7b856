"""Responses through the unmodified SDK: whole, streamed, in the background, resumed, gone on from."""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseOutputMessage

from domain.jobs import parse_id
from gpu_worker.engine.fake_tokens import WORDS, fake_text
from tests.conformance.harness import MESSAGES, Served
from tests.integration.api_harness import ApiServer

MODEL = "test-model"
UNTIL_END = {"stop": WORDS[:16], "min_tokens": 9}  # one word in sixteen ends the text
PROMPT_TOKEN_IDS = list(b"user: Hi\nassistant: ")


def said(served: Served, response_id: str, num_tokens: int) -> str:
    return fake_text(PROMPT_TOKEN_IDS, served.rig.job(parse_id(response_id)).seed, 0, num_tokens)


def text_of(response: Response) -> str:
    [message] = response.output
    assert isinstance(message, ResponseOutputMessage)
    return response.output_text


def test_a_whole_response_is_what_the_engine_said(served: Served) -> None:
    response = served.client.responses.create(
        model=MODEL, input="Hi", max_output_tokens=8, temperature=0, metadata={"a": "b"}
    )
    assert text_of(response) == said(served, response.id, 8)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 8
    assert response.metadata == {"a": "b"}
    assert response.max_output_tokens == 8
    assert response.temperature == 0
    again = served.client.responses.retrieve(response.id)
    assert again == response
    assert again._request_id


def test_messages_as_input_are_the_same_prompt(served: Served) -> None:
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    response = served.client.responses.create(model=MODEL, input=items, max_output_tokens=6)
    assert text_of(response) == said(served, response.id, 6)


def test_the_strict_stream_helper_is_content(served: Served) -> None:
    with served.client.responses.stream(model=MODEL, input="Hi", extra_body=UNTIL_END) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.status == "completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert served.client.responses.retrieve(final.id).output_text == final.output_text


def test_background_is_polled_and_then_streamed_from_anywhere(served: Served) -> None:
    response = served.client.responses.create(model=MODEL, input="Hi", background=True, extra_body=UNTIL_END)
    assert response.status in ("queued", "in_progress")
    assert response.background is True
    events = list(served.client.responses.retrieve(response.id, stream=True))
    assert events[-1].type == "response.completed"
    assert served.client.responses.retrieve(response.id).status == "completed"
    for place in range(len(events)):
        resumed = list(served.client.responses.retrieve(response.id, stream=True, starting_after=place))
        assert resumed == events[place + 1 :]
    with served.client.responses.stream(response_id=response.id, starting_after=3) as stream:
        assert [event.sequence_number for event in stream] == list(range(4, len(events)))


def test_a_conversation_goes_on_from_a_response(served: Served) -> None:
    first = served.client.responses.create(model=MODEL, input="Hi", max_output_tokens=5, instructions="Be short.")
    second = served.client.responses.create(
        model=MODEL, input="More", previous_response_id=first.id, max_output_tokens=5
    )
    assert second.usage is not None
    prompt = f"user: Hi\nassistant: {first.output_text}\nuser: More\nassistant: "
    assert second.usage.input_tokens == len(prompt.encode())
    assert second.previous_response_id == first.id
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.responses.create(model=MODEL, input="x", previous_response_id="resp_" + "0" * 26)
    assert caught.value.param == "previous_response_id"


def test_cancel_keeps_the_text_and_may_be_repeated(api: ApiServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="Hi", background=True)
    assert response.status == "queued"
    assert client.responses.cancel(response.id).status == "cancelled"
    assert client.responses.cancel(response.id).status == "cancelled"
    events = list(client.responses.retrieve(response.id, stream=True))
    assert [event.type for event in events] == ["response.created", "response.queued", "response.failed"]


def test_only_the_background_can_be_cancelled(served: Served) -> None:
    response = served.client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background"):
        served.client.responses.cancel(response.id)


def test_input_items_are_paged(served: Served) -> None:
    items: Any = [{"role": "user", "content": f"number {number}"} for number in range(5)]
    response = served.client.responses.create(model=MODEL, input=items, max_output_tokens=2)
    listed = list(served.client.responses.input_items.list(response.id, limit=2, order="asc"))
    assert [item.to_dict()["content"] for item in listed] == [
        [{"type": "input_text", "text": f"number {number}"}] for number in range(5)
    ]
    newest = served.client.responses.input_items.list(response.id, limit=2)
    assert [item.id for item in newest.data] == [listed[4].id, listed[3].id]
    assert newest.has_more


def test_input_tokens_are_those_of_the_prompt(served: Served) -> None:
    counted = served.client.responses.input_tokens.count(model=MODEL, input="Hi")
    assert counted.input_tokens == len(PROMPT_TOKEN_IDS)


def test_deleted_and_not_stored_are_not_found(served: Served) -> None:
    kept = served.client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
    served.client.responses.delete(kept.id)
    passing = served.client.responses.create(model=MODEL, input="Hi", max_output_tokens=2, store=False)
    chat = served.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2)
    for gone in (kept.id, passing.id, chat.id):
        with pytest.raises(openai.NotFoundError):
            served.client.responses.retrieve(gone)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True, "store": False}, "store"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "string"}}}}, "text.format.name"),
        ({"text": {"format": {"type": "text", "schema": {"type": "string"}}}}, "text.format"),
        ({"input": [{"role": "user", "content": "Hi", "status": "odd"}]}, "input.0.status"),
        ({"input": [{"type": "reasoning", "summary": ["Hm."]}]}, "input.0.summary.0"),
        ({"tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tools"),
        ({"tools": [{"type": "wub_search"}]}, "tools.0.type"),
        ({"truncation": "sometimes"}, "truncation"),
        ({"include": ["reasoning.encrypted_content", "no.such"]}, "include.1"),
        ({"stream_options": {}}, "stream_options"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "a b", "arguments": ""}]}, "input.0.name"),
        ({"reasoning": {"effort": "hard"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "x"}}, "reasoning.mode"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "no-such-model"}, "model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(api: ApiServer, fields: dict[str, Any], param: str) -> None:
    body = {"model": "fake", "input": "Hi"} | fields
    answer = httpx.post(f"{api.url}/v1/responses", json=body, timeout=30)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("context_length", [128])
def test_t5_frames_are_named_numbered_and_without_ids(served: Served) -> None:
    body = {"model": MODEL, "input": "Hi", "stream": True}
    answer = httpx.post(f"{served.server.url}/v1/responses", json=body, timeout=30)
    frames = frames_of(answer.text)
    assert [data["type"] for data in frames] == [name for name in names_of(answer.text)]
    assert [data["sequence_number"] for data in frames] == list(range(len(frames)))
    assert "[DONE]" not in answer.text
    assert "\nid:" not in answer.text


def frames_of(body: str) -> Sequence[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]


def names_of(body: str) -> Sequence[str]:
    return [line.removeprefix("event: ") for line in body.splitlines() if line.startswith("event: ")]
