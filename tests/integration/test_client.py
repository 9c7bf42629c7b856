"""The client library on a running system: what it returns, and that kills neither lose nor repeat anything."""

import asyncio
import itertools
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from celeriac.cli import main
from celeriac.client import ApiError, ApiUnreachable, AsyncClient, Client, ClientError, JobNotCompleted, QueueUpdate
from tests.chaos.plant import Plant, start_prepared
from tests.integration.test_main_job import System

pytestmark = pytest.mark.slow

MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "fake"
backend = "fake"
max_model_len = 4096
max_num_seqs = 4

[models.fake]
step_seconds = 0.01
"""
SETTINGS = {"lease_seconds": 3, "lease_grace_seconds": 0.5, "janitor_interval_seconds": 0.5}
NUM_TOKENS = 40
NUM_LONG_TOKENS = 200


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-client-"))
    plant = Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, settings=SETTINGS, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def url(system: System) -> str:
    system.plant.wait_until_ready()
    return system.plant.api_urls[0]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_a_job_is_submitted_read_and_waited_for(client: Client) -> None:
    job = client.submit("Once upon a time", max_tokens=NUM_TOKENS, ignore_eos=True, metadata={"user": "7"})
    assert (job.status, job.model, job.text, job.metadata) == ("queued", MODEL, "", {"user": "7"})
    done = client.result(job.id, timeout=60)
    assert (done.id, done.status, done.usage["completion_tokens"]) == (job.id, "completed", NUM_TOKENS)
    assert done.text
    assert client.get(job.id).text == done.text
    assert [each.id for each in client.jobs(limit=1)] == [job.id]
    client.delete(job.id)
    with pytest.raises(ApiError, match="job_not_found"):
        client.get(job.id)


def test_the_same_key_is_the_same_job(client: Client) -> None:
    jobs = [client.submit("Once", max_tokens=4, idempotency_key="test-client-same") for _ in range(2)]
    assert jobs[0].id == jobs[1].id


def test_a_refusal_names_the_field(client: Client) -> None:
    with pytest.raises(ApiError, match="temperature") as refusal:
        client.submit("Once", temperature=9)
    assert (refusal.value.status_code, refusal.value.is_passing) == (400, False)


def test_subscribing_tells_the_place_in_the_queue(client: Client) -> None:
    before = [client.submit("Wait", max_tokens=NUM_LONG_TOKENS, ignore_eos=True) for _ in range(8)]
    updates: list[QueueUpdate] = []
    done = client.subscribe("Me", max_tokens=4, ignore_eos=True, on_queue_update=updates.append, timeout=120)
    assert done.status == "completed"
    assert updates
    assert updates[0].status in ("queued", "in_progress")
    for job in before:
        client.cancel(job.id)


def test_what_was_not_completed_is_raised_with_its_text(client: Client) -> None:
    job = client.submit("Once", max_tokens=4000, ignore_eos=True)
    next(event for event in client.stream(job.id) if event.text)
    client.cancel(job.id)
    with pytest.raises(JobNotCompleted, match="is cancelled") as outcome:
        client.result(job.id, timeout=60)
    assert outcome.value.job.text


def test_a_wait_that_takes_too_long_leaves_the_job_alone(client: Client) -> None:
    job = client.submit("Once", max_tokens=4000, ignore_eos=True)
    with pytest.raises(TimeoutError, match="it goes on"):
        client.result(job.id, timeout=0)
    assert not client.get(job.id).has_ended
    client.cancel(job.id)


def kill_api(system: System) -> None:
    system.plant.apis[0].send(signal.SIGKILL)


def kill_worker(system: System) -> None:
    system.plant.workers[0].send(signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_api, kill_worker])
def test_a_stream_survives_kills_without_a_gap_or_a_repeat(
    system: System, client: Client, kill: Callable[[System], None]
) -> None:
    job = client.submit("Once upon a time", max_tokens=NUM_LONG_TOKENS, ignore_eos=True, seed=3)
    text, is_killed = "", False
    for event in client.stream(job.id):
        text += event.text
        if text and not is_killed:
            kill(system)
            is_killed = True
    assert text == client.result(job.id, timeout=60).text
    assert text == "".join(event.text for event in client.stream(job.id))


def test_a_stream_that_was_read_to_its_end_is_empty_afterwards(client: Client) -> None:
    job = client.submit("Once", max_tokens=4)
    *_, last = client.stream(job.id)
    assert list(client.stream(job.id, starting_after=last.id)) == []


@pytest.mark.parametrize("kill", [kill_api, kill_worker])
def test_a_map_over_many_prompts_survives_kills(system: System, client: Client, kill: Callable[[System], None]) -> None:
    prompts = [f"Story {number}" for number in range(24)]
    done = []
    jobs = client.map(
        prompts, concurrency=6, run=f"map-{kill.__name__}", max_tokens=NUM_TOKENS, ignore_eos=True, seed=1
    )
    for number, job in enumerate(jobs):
        done.append(job)
        if number == 3:
            kill(system)
    assert [job.status for job in done] == ["completed"] * len(prompts)
    assert {job.usage["completion_tokens"] for job in done} == {NUM_TOKENS}
    again = client.map(prompts, run=f"map-{kill.__name__}", max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)
    assert [job.id for job in again] == [job.id for job in done], "the same run is submitted only once"


def test_a_map_that_is_left_early_starts_no_further_jobs(client: Client) -> None:
    taken: list[int] = []

    def prompts() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield f"Early {number}"

    some = list(itertools.islice(client.map(prompts(), concurrency=2, max_tokens=2), 3))
    assert len(some) == 3
    assert len(taken) < 50


def test_the_asynchronous_client_does_the_same(system: System, url: str) -> None:
    async def run() -> None:
        async with AsyncClient(url) as client:
            job = await client.submit("Once upon a time", max_tokens=NUM_LONG_TOKENS, ignore_eos=True)
            text, is_killed = "", False
            async for event in client.stream(job.id):
                text += event.text
                if text and not is_killed:
                    kill_api(system)
                    is_killed = True
            assert text == (await client.result(job.id, timeout=60)).text
            prompts = [f"Tale {number}" for number in range(12)]
            done = [one async for one in client.map(prompts, concurrency=4, max_tokens=4, ignore_eos=True)]
            assert [one.status for one in done] == ["completed"] * len(prompts)
            subscribed = await client.subscribe("Me", max_tokens=4, timeout=60)
            assert (await client.get(subscribed.id)).text == subscribed.text
            assert [one.id for one in await client.jobs(limit=1)] == [subscribed.id]
            assert (await client.cancel(subscribed.id)).status == "completed"
            assert (await client.health())["status"] == "ok"
            await client.delete(subscribed.id)

    asyncio.run(run())


def test_a_file_of_requests_is_run_as_a_batch(url: str, tmp_path: Path) -> None:
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body} for n in range(6)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = CliRunner().invoke(main, ["batch", "run", str(requests), "-o", str(results), "--url", url])
    assert outcome.exit_code == 0, outcome.output
    assert "6 of 6 lines completed" in outcome.stderr
    answers = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == [str(n) for n in range(6)]

    async def fetch_again() -> None:
        async with AsyncClient(url) as client:
            batch = await client.batch(requests, tmp_path / "again.jsonl")
            assert batch.num_completed == 6

    asyncio.run(fetch_again())


def test_a_batch_that_is_refused_says_why(client: Client, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": 1}}\n')
    with pytest.raises(ClientError, match="line 1"):
        client.batch(requests, tmp_path / "out.jsonl")
    requests.write_text("nonsense\n")
    with pytest.raises(ClientError, match="not a request"):
        client.batch(requests, tmp_path / "out.jsonl")


def test_an_api_that_is_not_there_is_not_waited_for() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ApiUnreachable, match="celeriac up"):
        client.submit("Once", model=MODEL)


def test_without_a_url_no_port_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERIAC_API_URL", raising=False)
    with pytest.raises(ClientError, match="CELERIAC_API_URL"):
        Client()
