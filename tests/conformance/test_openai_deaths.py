"""Streams of the unmodified SDK while the processes behind them are killed: no token is lost, and none comes twice.
The same for a job that is read by the Durable Streams protocol, whose kills these processes can serve as well."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent

from domain.jobs import parse_id
from gpu_worker.engine.fake_tokens import fake_text
from tests.chaos.plant import Plant, start_prepared
from tests.waiting import wait_until

refusals = pytest.importorskip("websockets.exceptions")

pytestmark = pytest.mark.slow

MODEL = "slow"
MODELS = (
    f'[[models]]\nid = "{MODEL}"\npath = "fake"\nbackend = "fake"\nmax_model_len = 1024\n'
    "fake = {step_seconds = 0.02}\n"
)
NUM_TOKENS = 250  # five seconds, in which the kill must come
PROMPT = list(b"user: Hi\nassistant: ")
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    """Each test finds it whole: what the one before has killed is started again."""
    folder = Path(tempfile.mkdtemp(prefix="celeriac-deaths-"))
    settings = {"lease_seconds": 3, "flush_min_seconds": 0.02, "flush_max_seconds": 0.1}
    workers = {"gpu-1": MODEL, "gpu-2": MODEL}
    with Plant(
        folder, models=MODELS, worker_models=workers, num_apis=2, settings=settings, start=start_prepared
    ) as plant:
        plant.start_servers()
        plant.start_parts()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def clients(plant: Plant) -> Iterator[list[openai.OpenAI]]:
    """One for each API process, once all processes are there and ready."""

    def is_whole() -> bool:
        plant.watch()
        return all(part.is_running for part in plant.parts)

    wait_until(is_whole, "what was killed has been started again")
    plant.wait_until_ready()
    with ExitStack() as stack:
        yield [
            stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=60, max_retries=0))
            for url in plant.api_urls
        ]


def said(plant: Plant, external: str) -> str:
    """What the fake engine says to MESSAGES in this job, were nothing ever killed."""
    with plant.connect() as connection:
        row = connection.execute("SELECT seed, attempt FROM jobs WHERE id = %s", [parse_id(external)]).fetchone()
    assert row is not None
    seed, attempt = row
    assert isinstance(seed, int)
    assert isinstance(attempt, int)
    assert attempt > 1, "the kill came too late to matter"
    return fake_text(PROMPT, seed, 0, NUM_TOKENS)


def kill_the_worker_of(plant: Plant, external: str) -> None:
    with plant.connect() as connection:
        row = connection.execute(
            "SELECT w.hostname FROM jobs j JOIN workers w ON w.id = j.lease_owner WHERE j.id = %s",
            [parse_id(external)],
        ).fetchone()
    assert row is not None
    victim = next(worker for worker in plant.workers if str(row[0]).startswith(f"{worker.name}@"))
    victim.kill()


def text_of(events: list[ResponseStreamEvent]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def test_a_chat_stream_goes_on_over_the_death_of_its_worker(plant: Plant, clients: list[openai.OpenAI]) -> None:
    stream = clients[0].chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_completion_tokens=NUM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces: list[str] = []
    for chunk in stream:
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        if len(pieces) == 10:
            kill_the_worker_of(plant, chunk.id)
    assert "".join(pieces) == said(plant, chunk.id)
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == NUM_TOKENS


def test_a_response_is_taken_up_elsewhere_when_worker_and_api_die(plant: Plant, clients: list[openai.OpenAI]) -> None:
    before: list[ResponseStreamEvent] = []
    stream = clients[0].responses.create(
        model=MODEL, input="Hi", max_output_tokens=NUM_TOKENS, stream=True, background=True
    )
    with suppress(openai.APIError, httpx.HTTPError):
        for event in stream:
            before.append(event)
            if len(before) == 12:
                kill_the_worker_of(plant, id_of(before))
                plant.apis[0].kill()
    assert before[-1].type == "response.output_text.delta", "the stream was cut in the middle"
    after = list(clients[1].responses.retrieve(id_of(before), stream=True, starting_after=before[-1].sequence_number))
    events = [*before, *after]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert text_of(events) == said(plant, id_of(before))
    assert events[-1].type == "response.incomplete"  # it reached max_output_tokens
    assert events[-1].response.output_text == text_of(events)
    plant.apis[0].start()
    plant.wait_until_ready()
    again = list(clients[0].responses.retrieve(id_of(before), stream=True))
    assert text_of(again) == text_of(events)
    assert len(again) == len(events)


@pytest.mark.filterwarnings("ignore:connect.. must be used:DeprecationWarning")  # it is how the SDK uses it
def test_a_response_on_a_websocket_is_read_on_when_worker_and_api_die(
    plant: Plant, clients: list[openai.OpenAI]
) -> None:
    """The connection is gone with its API process; the events after its last one come by HTTP, from another."""
    before: list[Any] = []
    with suppress(refusals.ConnectionClosed), clients[0].responses.connect() as connection:
        connection.response.create(model=MODEL, input="Hi", max_output_tokens=NUM_TOKENS)
        for event in connection:
            before.append(event)
            if event.type == "error":
                break
            if len(before) == 12:
                kill_the_worker_of(plant, id_of(before))
                plant.apis[0].kill()
    assert before[-1].type == "response.output_text.delta", "the connection was cut in the middle"
    after = list(clients[1].responses.retrieve(id_of(before), stream=True, starting_after=before[-1].sequence_number))
    events = [*before, *after]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert text_of(events) == said(plant, id_of(before))
    plant.apis[0].start()
    plant.wait_until_ready()


def test_a_durable_stream_is_read_on_when_worker_and_api_die(plant: Plant, clients: list[openai.OpenAI]) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "params": {"max_tokens": NUM_TOKENS}}
    job_id = httpx.post(f"{plant.api_urls[0]}/v1/jobs", json=asked).raise_for_status().json()["id"]
    urls = [f"{url}/v1/jobs/{job_id}/stream" for url in plant.api_urls]
    pieces: list[str] = []
    offsets = ["-1"]
    is_closed = False
    while not is_closed:
        params = {"offset": offsets[-1], "live": "long-poll"}
        try:
            answer = httpx.get(urls[0], params=params, headers={"accept": "text/plain"}, timeout=60)
        except httpx.HTTPError:
            urls.pop(0)
            continue
        pieces.append(answer.raise_for_status().text)
        offsets.append(answer.headers["stream-next-offset"])
        is_closed = answer.headers.get("stream-closed") == "true"
        if answer.text and sum(map(bool, pieces)) == 3:
            kill_the_worker_of(plant, job_id)
            plant.apis[0].kill()
    assert len(urls) == 1, "the rest came from the other API"
    assert "".join(pieces) == said(plant, job_id)
    assert offsets == sorted(offsets), "offsets sort as strings"
    plant.apis[0].start()
    plant.wait_until_ready()


def id_of(events: list[ResponseStreamEvent]) -> str:
    assert events[0].type == "response.created"
    return events[0].response.id


def test_a_conversation_gets_a_turn_once_when_worker_and_api_die(plant: Plant, clients: list[openai.OpenAI]) -> None:
    conversation = clients[0].conversations.create(items=[{"role": "system", "content": "Be kind."}])
    seen: list[ResponseStreamEvent] = []
    stream = clients[0].responses.create(
        model=MODEL, input="Hi", max_output_tokens=NUM_TOKENS, stream=True, conversation=conversation.id
    )
    with suppress(openai.APIError, httpx.HTTPError):
        for event in stream:
            seen.append(event)
            if len(seen) == 12:
                kill_the_worker_of(plant, id_of(seen))
                plant.apis[0].kill()
    *_, last = clients[1].responses.retrieve(id_of(seen), stream=True)
    assert last.type == "response.incomplete"
    for _ in range(2):
        items = list(clients[1].conversations.items.list(conversation.id, order="asc"))
        texts = [item.content[0].text for item in items if item.type == "message"]  # type: ignore[union-attr]
        assert texts == ["Be kind.", "Hi", last.response.output_text]
    assert len(last.response.output_text) >= NUM_TOKENS
    plant.apis[0].start()
    plant.wait_until_ready()
