"""Chat completions through the unmodified SDK, sync and async, whole and streamed."""

import httpx
import openai
import pytest

from domain.jobs import external_id, parse_id
from tests.conformance.harness import MESSAGES, Served, chat_body, frames_of

MODEL = "test-model"


def test_a_whole_answer_is_what_the_engine_said(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=8, temperature=0, seed=3
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == served.text_of(answer.id, num_tokens=8)
    assert choice.finish_reason == "length"
    assert choice.message.refusal is None
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.service_tier == "default"
    assert answer.system_fingerprint is not None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_stream_says_the_same_in_pieces(served: Served) -> None:
    stream = served.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        text = "".join(choice.delta.content or "" for choice in own)
        assert text == served.text_of(chunks[0].id, index=index, num_tokens=12)
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["length"]
        assert own[-1].finish_reason == "length"


@pytest.mark.anyio
async def test_the_async_sdk_reads_both(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.server.url}/v1", api_key="any", max_retries=0) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4)
        assert whole.choices[0].message.content == served.text_of(whole.id, num_tokens=4)
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=4, stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == served.text_of(
        chunks[0].id, num_tokens=4
    )


def test_the_sdks_stream_helper_puts_it_together(served: Served) -> None:
    with served.client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=5, logprobs=True) as stream:
        for _ in stream:
            pass
        final = stream.current_completion_snapshot
    assert final.choices[0].message.content == served.text_of(final.id, num_tokens=5)
    logprobs = final.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.content or []) == 5


def test_t1_t2_t3_frames_bear_no_id_no_retry_and_no_name(served: Served) -> None:
    response = httpx.post(f"{served.server.url}/v1/chat/completions", json=chat_body(stream=True), timeout=30)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = frames_of(response)
    assert frames[-1] == "[DONE]"
    assert frames[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


def test_a_chat_completion_is_a_job_under_the_same_id(served: Served) -> None:
    raw = served.client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=4)
    completion = raw.parse()
    job_id = raw.headers["x-job-id"]
    assert external_id(parse_id(completion.id)) == job_id
    job = httpx.get(f"{served.server.url}/v1/jobs/{completion.id}", timeout=30).json()
    assert job["id"] == job_id
    assert job["output"]["text"] == completion.choices[0].message.content
