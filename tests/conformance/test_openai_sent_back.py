"""What clients send beside what is needed: our own answers as SDKs dump them, hints, and values that mean off."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from domain.jobs import parse_id
from tests.conformance.harness import MESSAGES, Served, chat_body
from tests.conformance.test_openai_tools import CALL, answer_newest, answer_next
from tests.integration.api_harness import ApiServer, HandWorker
from tests.integration.runner_harness import MODEL
from tests.waiting import wait_until

CLIENT_HINTS: Any = {"client_metadata": {"a": "b"}, "verbosity": "low"}
FUNCTION: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}}


class Add(BaseModel):
    """Adds."""

    a: int
    b: int


# Our own answers, sent back


@pytest.mark.parametrize("is_dumped", [False, True], ids=["object", "dump"])
def test_a_parsed_call_goes_back_as_the_sdk_has_it(
    client: openai.OpenAI, hand_worker: HandWorker, is_dumped: bool
) -> None:
    options: Any = {"model": "large", "tools": [openai.pydantic_function_tool(Add, name="add")], "max_tokens": 100}
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, CALL)
        first = client.chat.completions.parse(messages=MESSAGES, **options)
        job.result()
        message = first.choices[0].message
        [call] = message.tool_calls or []
        assert call.function.parsed_arguments == Add(a=1, b=2)
        following = threads.submit(answer_newest, hand_worker, first.id, "It is 3.")
        sent: Any = message.model_dump() if is_dumped else message
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "3"}
        second = client.chat.completions.parse(messages=[*MESSAGES, sent, result], **options)
        following.result()
    assert second.choices[0].message.content == "It is 3."


@pytest.mark.parametrize("is_dumped", [False, True], ids=["object", "dump"])
def test_the_output_of_a_response_goes_back_as_the_sdk_has_it(
    client: openai.OpenAI, hand_worker: HandWorker, is_dumped: bool
) -> None:
    options: Any = {"model": "large", "tools": [FUNCTION], "max_output_tokens": 100}
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, CALL)
        first = client.responses.parse(input="Hi", **options)
        job.result()
        [_, call] = first.output
        assert call.type == "function_call"
        following = threads.submit(answer_newest, hand_worker, first.id, "It is 3.")
        sent: Any = [item.model_dump() if is_dumped else item for item in first.output]
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
        second = client.responses.create(input=[{"role": "user", "content": "Hi"}, *sent, output], **options)
        following.result()
    assert second.output_text == "It is 3."


def test_items_of_a_response_go_back_by_their_ids(client: openai.OpenAI, hand_worker: HandWorker) -> None:
    """Vercel's AI SDK sends what was stored like this, the last one without its optional type."""
    options: Any = {"model": "large", "tools": [FUNCTION], "max_output_tokens": 100, "background": True}
    first = client.responses.create(input="Hi", **options)
    answer_next(hand_worker, CALL)
    message, call = client.responses.retrieve(first.id).output
    [hi] = client.responses.input_items.list(first.id).data
    references: Any = [{"type": "item_reference", "id": item.id} for item in (hi, message)]
    output: Any = {"type": "function_call_output", "call_id": call.to_dict()["call_id"], "output": "3"}
    last: Any = {"id": call.id}
    second = client.responses.create(input=[*references, last, output], **options)
    itself: Any = [hi.to_dict(), message.to_dict(), call.to_dict(), output]
    third = client.responses.create(input=itself, **options)
    prompts = [hand_worker.claim(response.id).prompt_token_ids for response in (second, third)]
    assert prompts[0] == prompts[1]
    client.responses.delete(first.id)
    listed = client.responses.input_items.list(second.id, order="asc").data
    assert [item.id for item in listed[:3]] == [hi.id, message.id, call.id], "the items were kept, not the references"
    passing = client.responses.create(model="large", input="Hi", max_output_tokens=5, stream=True, store=False)
    unstored = next(iter(passing)).response.id  # type: ignore[union-attr]
    passing.close()
    for id_ in (message.id, unstored.replace("resp_", "msg_") + "_0", second.id.replace("resp_", "msg_") + "_0", "x"):
        gone: Any = [{"type": "item_reference", "id": id_}]
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.create(model="large", input=gone)
        assert missing.value.param == "input.0.id"
    too_many: Any = [{"id": listed[0].id}] * 2, [{"id": f"msg_{number}_0"} for number in range(129)]
    for many in too_many:
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="large", input=many)


def test_what_a_parsed_text_has_beside_itself_goes_back(served: Served) -> None:
    part = {"type": "output_text", "text": "{}", "annotations": [], "logprobs": [], "parsed": {"a": 1}}
    item = {"type": "message", "role": "assistant", "content": [part], "id": "msg_1", "status": "completed"}
    answer = post(served, "/v1/responses", {"model": MODEL, "input": [item], "max_output_tokens": 2})
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "input.0.content.0.parsed")


# Hints

HINTED: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/chat/completions", chat_body(**CLIENT_HINTS), "client_metadata, verbosity"),
    ("/v1/chat/completions", chat_body(stream=True, **CLIENT_HINTS), "client_metadata, verbosity"),
    ("/v1/chat/completions", chat_body(n=99, **CLIENT_HINTS), "client_metadata, verbosity"),
    (
        "/v1/chat/completions",
        chat_body(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}),
        "stream_options.continuous_usage_stats",
    ),
    (
        "/v1/chat/completions",
        chat_body(tools=[{"type": "mcp", "server_label": "x"}, {"type": "function", "function": {"name": "f"}}]),
        "tools.0",
    ),
    ("/v1/chat/completions", chat_body(reasoning_effort="low"), "reasoning_effort"),
    ("/v1/completions", {"model": MODEL, "prompt": "Hi", "store": True, "cache_prompt": True}, "store, cache_prompt"),
    (
        "/v1/responses",
        {
            "model": MODEL,
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "cache_control": {}}]}],
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "none", "summary": "auto"},
            "tools": [{"type": "namespace", "name": "x", "tools": []}, FUNCTION],
            "truncation": "auto",
            "text": {"verbosity": "low"},
            "max_output_tokens": 3,
        },
        "truncation, include.0, reasoning.summary, tools.0, text.verbosity, input.0.content.0.cache_control, "
        "reasoning.effort",
    ),
    ("/v1/responses/input_tokens", {"model": MODEL, "input": "Hi", "client_metadata": {}}, "client_metadata"),
    ("/v1/embeddings", {"model": MODEL, "input": "Hi", "safety_identifier": "me"}, "safety_identifier"),
]


def test_a_hint_is_taken_and_named_whatever_the_answer_is(served: Served) -> None:
    for route, body, names in HINTED:
        answer = post(served, route, body)
        assert answer.headers["x-ignored-fields"] == names
        assert answer.status_code == (400 if body.get("n") == 99 else 200), answer.text


def test_who_sends_no_hints_is_told_of_none(served: Served) -> None:
    answers = [
        post(served, "/v1/chat/completions", body) for body in (chat_body(), chat_body(foo=None), chat_body(x=1))
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert all("x-ignored-fields" not in answer.headers for answer in answers)


def test_a_large_body_has_its_hints_named_too(served: Served) -> None:
    messages = [{"role": "user", "content": "a" * 1000, "id": "x"}] * 100
    answer = post(served, "/v1/chat/completions", chat_body(messages=messages))
    assert answer.headers["x-ignored-fields"].endswith("messages.31.id, 68 more")


def test_what_can_be_asked_of_a_response_may_be_asked_when_it_is_read(served: Served) -> None:
    response = served.client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
    again = served.client.responses.retrieve(
        response.id, include=["reasoning.encrypted_content", "message.output_text.logprobs"]
    )
    assert again.output_text == response.output_text
    items = served.client.responses.input_items.list(response.id, include=["message.output_text.logprobs"])
    assert len(items.data) == 1
    events = served.client.responses.retrieve(response.id, stream=True, include_obfuscation=True)
    assert [event.type for event in events][-1] == "response.incomplete"


# Values that stand for off

GREEDY: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 0}, {"top_p": 0.0, "temperature": 1.5, "seed": 7}]
OFF: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"top_k": -1}),
    ("/v1/chat/completions", {"max_tokens": -1, "max_completion_tokens": 4}),
    ("/v1/chat/completions", {"max_completion_tokens": None, "max_tokens": -1, "min_p": 0, "repetition_penalty": 1}),
    ("/v1/chat/completions", {"n_predict": -1, "stop": [], "presence_penalty": 0, "logit_bias": {}, "n": None}),
    ("/v1/chat/completions", {"top_logprobs": 0, "logprobs": False, "tools": [], "functions": [], "audio": {}}),
    ("/v1/completions", {"max_tokens": -1, "top_k": -1, "best_of": None, "suffix": "", "stop": [], "logprobs": None}),
    ("/v1/responses", {"max_output_tokens": -1, "top_k": -1, "max_tool_calls": 3, "reasoning": {}, "text": {}}),
    ("/generate", {"max_tokens": -1, "top_k": -1, "top_p": 0}),
]


@pytest.mark.parametrize("context_length", [128])
def test_a_value_that_stands_for_off_is_one(served: Served, context_length: int) -> None:
    source: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": MESSAGES},
        "/v1/responses": {"input": "Hi"},
    }
    for route, fields in OFF:
        answer = post(served, route, {"model": MODEL, "stop": ["a"]} | source.get(route, {"prompt": "Hi"}) | fields)
        assert answer.status_code == 200, (fields, answer.text)
        job = served.rig.job(parse_id(answer.headers["x-job-id"]))
        room = context_length - job.num_prompt_tokens
        assert job.max_tokens == (4 if 4 in fields.values() else room), fields


def test_no_share_of_the_draw_leaves_the_most_likely_token(http: httpx.Client) -> None:
    for fields in GREEDY:
        params: dict[str, Any] = {"max_tokens": 3, **fields}
        answer = http.post("/v1/jobs", json={"model": "fake", "prompt": "Hi", "params": params})
        assert answer.status_code == 202, answer.text
        kept = http.get(f"/v1/jobs/{answer.json()['id']}?include=input").json()["input"]["params"]
        assert kept | {"temperature": 0, "top_p": 1} == kept


# Responses


def test_a_running_response_that_is_cancelled_answers_cancelled(served: Served) -> None:
    responses = served.client.responses
    response = responses.create(model=MODEL, input="Hi", background=True, max_output_tokens=4000)
    wait_until(lambda: responses.retrieve(response.id).status == "in_progress")
    assert responses.cancel(response.id).status == "cancelled"


def test_a_response_that_is_waited_for_is_in_progress_from_the_first(served: Served) -> None:
    for is_background, first in ((False, ["in_progress"]), (True, ["queued", "in_progress"])):
        stream = served.client.responses.create(
            model=MODEL, input="Hi", stream=True, background=is_background, max_output_tokens=3
        )
        events = list(stream)
        assert events[0].type == "response.created"
        assert events[0].response.status == first[0]
        assert [event.type for event in events[1 : 1 + len(first)]] == [f"response.{status}" for status in first]
        again = served.client.responses.retrieve(events[0].response.id, stream=True)
        assert list(again) == events


def test_an_unknown_response_to_go_on_from_has_openais_code(client: openai.OpenAI) -> None:
    for id_ in ("resp_nope", "resp_" + "0" * 26):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="fake", input="x", previous_response_id=id_)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_response_shows_the_penalties_it_was_made_with(served: Served) -> None:
    asked: Any = {"presence_penalty": 0.5, "frequency_penalty": -0.25, "max_tool_calls": 2}
    for fields, shown in ((asked, asked), ({}, dict.fromkeys(asked, 0) | {"max_tool_calls": None})):
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 2} | fields
        answer = post(served, "/v1/responses", body).json()
        assert answer | shown == answer


REFUSED: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("/v1/responses", {"input": "word " * 30}, "input", "input has", "messages"),
    (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 5000},
        "max_output_tokens",
        "lower max_output",
        " max_tokens",
    ),
    (
        "/v1/responses",
        {"input": "Hi", "max_output_tokens": 2_000_000},
        "max_output_tokens",
        "max_output_tokens is",
        "_tok ",
    ),
    ("/v1/responses", {"input": "Hi", "top_p": 7}, "top_p", "top_p is 7", "params"),
    (
        "/v1/responses",
        {"input": "Hi", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "max_tokens"}},
        "tool_choice.name",
        "'max_tokens'",
        "max_output_tokens",
    ),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_completion_tokens": 5000},
        "max_completion_tokens",
        "lower max_c",
        " max_tokens",
    ),
    ("/v1/embeddings", {"input": ["a", ""]}, "input.1", "input.1 ", "inputs"),
]


def test_a_refusal_names_the_fields_of_its_body(http: httpx.Client) -> None:
    for route, fields, param, words, not_words in REFUSED:
        answer = http.post(route, json={"model": "fake"} | fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert words in error["message"]
        assert not_words not in error["message"]


# Other small things


def test_a_list_of_models_was_created_when_its_file_was(served: Served) -> None:
    model = served.client.models.list().data[0]
    assert model.created == int(served.rig.settings.models_file.stat().st_mtime)
    assert served.client.models.retrieve(model.id).created == model.created


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/responses/", "/v1/chat/completions/", "/v1/jobs/"])
def test_a_slash_at_the_end_is_named(http: httpx.Client, path: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"there is no route {path!r}; remove the trailing slash"


def test_counting_the_tokens_of_a_chat_names_where_it_is_done(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions/input_tokens", json={"model": "fake", "messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "not_implemented")
    assert "/v1/responses/input_tokens" in answer.json()["error"]["message"]


def test_a_refusal_that_was_said_is_part_of_the_conversation(api: ApiServer, hand_worker: HandWorker) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": None, "refusal": "I will not."}]
    with api.client() as http, ThreadPoolExecutor(1) as threads:
        job = threads.submit(answer_next, hand_worker, "Ok.")
        answer = http.post("/v1/chat/completions", json={"model": "large", "messages": messages, "store": True})
        job.result()
        kept = http.get(f"/v1/chat/completions/{answer.json()['id']}/messages").json()["data"]
    assert kept[-1]["content"] == "I will not."


def post(served: Served, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(
        f"{served.server.url}{route}",
        content=json.dumps(body),
        timeout=60,
        headers={"content-type": "application/json"},
    )
