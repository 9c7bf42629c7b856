"""A property of every stream: what came up to a cursor and what comes after it are the whole, whatever the job said."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from settings import Settings
from tests.conformance.harness import MESSAGES, frames_of
from tests.integration.api_harness import ApiServer, HandWorker, all_events, make_chunk, numbered, post_job
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), max_size=12)
END = st.sampled_from(["stop", "length"])
anew = hypothesis_settings(
    max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the server is the same for all examples, and each has a job of its own


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    """Nobody reports as a worker, however long this takes."""
    return Settings(database_url=database_url, redis_url=redis_url, no_workers_seconds=3_600)


def say(worker: HandWorker, job_id: str, texts: list[str], end: str) -> None:
    """The whole life of a job that says `texts`, a chunk each."""
    job = worker.claim(job_id)
    for number, text in enumerate(texts, start=1):
        last: dict[str, Any] = {"finish_reason": end} if number == len(texts) else {}
        worker.commit(job, make_chunk(number, text, **last))
    worker.finish(job, *texts)


@anew
@given(texts=TEXTS, end=END)
def test_a_native_stream_is_the_same_from_every_cursor(
    http: httpx.Client, hand_worker: HandWorker, texts: list[str], end: str
) -> None:
    job_id = post_job(http)["id"]
    say(hand_worker, job_id, texts, end)
    whole = numbered(all_events(http, job_id))
    deltas = [event for event in whole if event[0] == "output.delta"]
    assert len(deltas) == len(texts)
    for cursor in range(len(texts) + 1):
        by_query = numbered(all_events(http, job_id, params={"starting_after": cursor}))
        by_header = numbered(all_events(http, job_id, headers={"Last-Event-ID": str(cursor)}))
        assert whole[:cursor] + by_query == whole
        assert by_header == by_query


@anew
@given(texts=TEXTS.filter(len), end=END)
def test_a_chat_says_what_its_job_says_from_every_cursor(
    api: ApiServer, http: httpx.Client, hand_worker: HandWorker, texts: list[str], end: str
) -> None:
    body = {"model": "large", "messages": MESSAGES, "max_tokens": 16, "stream": True}
    with ThreadPoolExecutor(1) as threads, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        job_id = answer.headers["x-job-id"]
        said = threads.submit(say, hand_worker, job_id, texts, end)
        answer.read()
        said.result()
    chunks = [frame["choices"][0] for frame in frames_of(answer)[:-1]]
    content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    reasoning = "".join(chunk["delta"].get("reasoning_content") or "" for chunk in chunks)
    events = [event for event in all_events(http, job_id) if event.name == "output.delta"]
    for cursor in range(len(texts) + 1):
        later = all_events(http, job_id, params={"starting_after": cursor})
        again = [event.data["text"] for event in [*events[:cursor], *later] if "text" in event.data]
        assert "".join(again) == "".join(texts)
    if "<" not in "".join(texts):  # the model's marks of calls and reasoning are taken out of what it says
        assert (content, reasoning) == ("".join(texts), "")
    wait_until(lambda: api.services.slots.num_taken == 0)


@anew
@given(texts=TEXTS, end=END)
def test_a_response_has_the_same_events_from_every_number(
    client: openai.OpenAI, hand_worker: HandWorker, texts: list[str], end: str
) -> None:
    response = client.responses.create(model="large", input="Hi", max_output_tokens=16, background=True)
    say(hand_worker, response.id, texts, end)
    whole = list(client.responses.retrieve(response.id, stream=True))
    assert [event.sequence_number for event in whole] == list(range(len(whole)))
    for cursor in range(len(whole)):
        later = list(client.responses.retrieve(response.id, stream=True, starting_after=cursor))
        assert later == whole[cursor + 1 :]
