"""A Celeriac in front of a Celeriac: jobs whose server breaks off, refuses and goes away, and whose worker is killed.

One installation serves both models, so that each front job is an ordinary client of the model behind it. All decode
greedily: what comes in front must be, token by token, what comes behind.
"""

import asyncio
import json
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from domain.jobs import parse_id
from settings import ROOT
from tests.chaos.checker import judge, read_stored
from tests.chaos.clients import Clients, History
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import SETTINGS, System, until
from tests.remote_server import FaultyProxy
from tests.waiting import slowness, wait_until

pytestmark = pytest.mark.slow

BEHIND, FRONT, TALK, TALK_ONCE = "celeriac-mini", "front", "talk", "talk-once"
NUM_JOBS, NUM_TOKENS = 3, 200
NUM_EVENTS = 2  # that a stream passes on before it is held
FINISH_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Chain:
    """The front, the proxy that it takes for its server, and what is behind."""

    system: System
    proxy: FaultyProxy

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.system.plant.api_urls[0], timeout=60)


@pytest.fixture(scope="module")
def running_chain() -> Iterator[Chain]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-front-"))
    shutil.copytree(ROOT / "models" / BEHIND, folder / BEHIND)
    apis: list[str] = []
    proxy = FaultyProxy(lambda: apis[0])
    with proxy.http as http:
        models = f"""
            [[models]]
            id = "{BEHIND}"
            path = "{BEHIND}"
            device = "cpu"
            [[models]]
            id = "{FRONT}"
            path = "{BEHIND}"
            backend = "remote"
            [models.remote]
            url = "{http.url}/v1"
            model = "{BEHIND}"
            [[models]]
            id = "{TALK}"
            path = "{BEHIND}"
            backend = "remote"
            [models.remote]
            url = "{http.url}/v1"
            model = "{BEHIND}"
            mode = "chat"
            [[models]]
            id = "{TALK_ONCE}"
            path = "{BEHIND}"
            backend = "remote"
            [models.remote]
            url = "{http.url}/v1"
            model = "{BEHIND}"
            mode = "chat"
            resume = "fail"
        """
        workers = {"behind": BEHIND, "front": FRONT, "talk": f"{TALK},{TALK_ONCE}"}
        settings = SETTINGS | {"flush_max_seconds": 0.1}
        plant = Plant(folder, models=models, worker_models=workers, settings=settings, start=start_prepared)
        plant.api_urls = apis
        with System(plant) as system:
            yield Chain(system, proxy)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def chain(running_chain: Chain) -> Iterator[Chain]:
    running_chain.system.plant.wait_until_ready()
    running_chain.system.forget_all_jobs()
    yield running_chain
    proxy = running_chain.proxy
    proxy.hold_after, proxy.is_away = None, False
    proxy.refusals.clear()
    proxy.cuts.clear()


def body(number: int, model: str) -> dict[str, Any]:
    params = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "seed": 1}
    return {"model": model, "prompt": f"Once upon a time there were {number} little boats", "params": params}


async def follow_all(chain: Chain, model: str, *, is_struck: bool) -> list[History]:
    """If struck, the front's worker is killed once every stream has begun."""
    plant = chain.system.plant
    clients = Clients(plant.api_urls, seed=1)
    histories = [clients.plan(body(number, model)) for number in range(NUM_JOBS)]
    try:
        async with asyncio.timeout(FINISH_SECONDS * slowness()), asyncio.TaskGroup() as group:
            for history in histories:
                assert await clients.submit(history)
                group.create_task(clients.follow(history))
            if is_struck:
                await until(lambda: all(history.last_number() for history in histories))
                plant.workers[1].send(signal.SIGKILL)
                chain.proxy.hold_after = None
    finally:
        await clients.close()
    return histories


def brought(chain: Chain, model: str, *, is_struck: bool = False) -> list[tuple[str, list[int]]]:
    """Text and tokens of each job, once its stream was compared with what is stored."""
    histories = asyncio.run(follow_all(chain, model, is_struck=is_struck))
    with chain.system.plant.connect() as connection:
        # Those behind are no jobs of these clients.
        connection.execute(f"DELETE FROM jobs WHERE model <> '{model}'")
        verdict = judge(histories, read_stored(connection))
        rows = connection.execute(
            "SELECT job_id, chunk->>'token_ids' FROM job_chunks ORDER BY job_id, sequence_number"
        ).fetchall()
    assert verdict.violations == []
    assert verdict.figures["jobs_by_status"] == {"completed": NUM_JOBS}
    assert all((history.end or {})["attempt"] >= 1 + is_struck for history in histories)
    chain.system.forget_all_jobs()
    token_ids_by_id: dict[object, list[int]] = {}
    for job_id, token_ids in rows:
        token_ids_by_id.setdefault(job_id, []).extend(json.loads(str(token_ids)))
    ends = [(history.end or {}, parse_id(history.job_id or "")) for history in histories]
    return [(end["output"]["text"], token_ids_by_id[id_]) for end, id_ in ends]


def test_greedy_text_is_that_of_the_model_behind_whatever_befalls(chain: Chain) -> None:
    proxy = chain.proxy
    behind = brought(chain, BEHIND)
    assert [len(token_ids) for _, token_ids in behind] == [NUM_TOKENS] * NUM_JOBS
    proxy.refusals += [503, 429, 502]
    proxy.cuts += [1, NUM_EVENTS, 1]
    proxy.hold_after = NUM_EVENTS
    num_posts = proxy.num_posts
    assert brought(chain, FRONT, is_struck=True) == behind
    assert not proxy.refusals
    assert not proxy.cuts
    assert proxy.num_posts >= num_posts + 3 + 3 + NUM_JOBS


def chat(model: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me a long story about a little boat."}]
    return {"model": model, "messages": messages, "params": {"max_tokens": 60, "temperature": 0}}


def test_an_interrupted_conversation_begins_anew_and_its_stream_says_so(chain: Chain) -> None:
    """Once because its worker is killed, and once because its server breaks off."""
    proxy = chain.proxy
    with chain.http as http:

        def finished(job_id: str) -> dict[str, Any]:
            wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["status"] == "completed", "it is completed")
            found: dict[str, Any] = http.get(f"/v1/jobs/{job_id}").json()
            return found

        def submitted(model: str) -> str:
            return str(http.post("/v1/jobs", json=chat(model)).raise_for_status().json()["id"])

        expected = finished(submitted(BEHIND))["output"]["text"]
        assert len(expected) > 50
        proxy.refusals += [503, 429]
        proxy.hold_after = NUM_EVENTS
        killed = submitted(TALK)
        wait_until(lambda: http.get(f"/v1/jobs/{killed}").json()["first_token_at"], "it has output")
        chain.system.plant.workers[2].send(signal.SIGKILL)
        proxy.hold_after = None
        jobs = {killed: finished(killed)}
        proxy.cuts += [NUM_EVENTS]
        cut = submitted(TALK)
        jobs[cut] = finished(cut)
        for job_id, job in jobs.items():
            assert job["output"]["text"] == expected
            assert job["attempt"] > 1
            events = http.get(f"/v1/jobs/{job_id}/events", headers={"last-event-id": "1"}).text
            assert events.count("event: job.reset") == 1


@pytest.mark.parametrize(
    ("path", "prompt", "limit", "piece", "end"),
    [
        ("/v1/chat/completions", "messages", "max_tokens", '"delta":{"content":"', 'data: {"error":'),
        ("/v1/responses", "input", "max_output_tokens", '"delta":"', "event: response.failed"),
        ("/v1/messages", "messages", "max_tokens", '"text_delta","text":"', "event: error"),
    ],
)
def test_an_interrupted_conversation_that_may_not_begin_anew_fails_with_what_it_had(
    chain: Chain, path: str, prompt: str, limit: str, piece: str, end: str
) -> None:
    """Its stream has the text that came and ends as failures end there; the native API has both, too."""
    chain.proxy.cuts += [NUM_EVENTS]
    num_posts = chain.proxy.num_posts
    asked = {"model": TALK_ONCE, "stream": True, "temperature": 0, limit: 60, prompt: chat(TALK_ONCE)["messages"]}
    with chain.http as http:
        stream = http.post(path, json=asked).raise_for_status().text
        (job,) = http.get("/v1/jobs", params={"model": TALK_ONCE}).json()["data"]
        job = http.get(f"/v1/jobs/{job['id']}").json()
    assert job["status"] == "failed"
    assert job["error"]["code"] == "engine_error"
    assert "was interrupted, and its server cannot continue it" in job["error"]["message"]
    assert job["error"]["message"] in stream.partition(end)[2]
    assert job["output"]["text"]
    assert piece + job["output"]["text"].split()[0] in stream.partition(end)[0]
    assert chain.proxy.num_posts == num_posts + 1, "it is asked once"


def test_a_cancelled_job_leaves_its_server(chain: Chain) -> None:
    chain.proxy.hold_after = NUM_EVENTS
    with chain.http as http:
        job_id = http.post("/v1/jobs", json=body(1, FRONT)).json()["id"]
        wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["first_token_at"], "it has output")
        wait_until(lambda: chain.proxy.num_streams == 1, "only its own request is open")
        http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
        wait_until(lambda: http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled", "it is cancelled")
        chain.proxy.hold_after = None
        wait_until(lambda: chain.proxy.num_streams == 0, "the request is closed")


def test_jobs_wait_for_a_server_that_is_away_and_say_so(chain: Chain) -> None:
    """One has output, and goes back to the queue with it; the other comes meanwhile."""
    proxy = chain.proxy
    proxy.hold_after = NUM_EVENTS
    with chain.http as http:

        def status_of(job_id: str) -> str:
            return str(http.get(f"/v1/jobs/{job_id}").json()["status"])

        first = http.post("/v1/jobs", json=body(1, FRONT)).json()["id"]
        wait_until(lambda: http.get(f"/v1/jobs/{first}").json()["first_token_at"], "it has output")
        proxy.is_away = True
        proxy.hold_after = None
        wait_until(lambda: "loading" in states_of(http), "the worker is waiting for its server")
        second = http.post("/v1/jobs", json=body(2, FRONT)).json()["id"]
        wait_until(lambda: reason_of(http, second) == "model_load", "it says what it waits for")
        wait_until(lambda: status_of(first) == "queued", "it is back in the queue")
        proxy.is_away = False
        for job_id in (first, second):
            wait_until(lambda: status_of(job_id) == "completed", "it is completed")  # noqa: B023
    with_outcome = "model = '{}' AND EXISTS (SELECT FROM job_attempts a WHERE a.job_id = jobs.id AND a.outcome = '{}')"
    assert chain.system.count(with_outcome.format(FRONT, "released")) > 0
    assert chain.system.count(with_outcome.format(FRONT, "stalled")) == 0


def reason_of(http: httpx.Client, job_id: str) -> str | None:
    queue = http.get(f"/v1/jobs/{job_id}").json()["queue"]
    return None if queue is None else queue["waiting_for"]


def states_of(http: httpx.Client) -> list[str]:
    models = http.get("/v1/admin/models").json()["data"]
    return [worker["state"] for model in models if model["id"] == FRONT for worker in model["workers"]]
