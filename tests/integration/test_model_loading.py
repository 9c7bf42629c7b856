"""Models unloaded and loaded again on the shipped processes, with jobs running and the worker killed meanwhile."""

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from celeriac.client.protocol import parse_events
from tests.chaos.plant import Part, Plant, start_prepared
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

MODEL = "fake"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "fake"
backend = "fake"
max_model_len = 4096
max_num_seqs = 8

[models.fake]
step_seconds = 0.01
"""
SETTINGS = {"lease_seconds": 3, "lease_grace_seconds": 0.5, "janitor_interval_seconds": 0.5, "drain_seconds": 0.2}
MAX_TOKENS = 300  # three seconds
NUM_JOBS = 4


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-loading-"))
    with Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, settings=SETTINGS, start=start_prepared) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def client(plant: Plant) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=plant.api_urls[0], timeout=60) as client:
        assert order(client, "load")["status"] == "loaded"
        yield client


def order(client: httpx.Client, what: str) -> dict[str, Any]:
    """Have it done, and wait until it is."""
    response = client.post(f"/v1/admin/models/{MODEL}/{what}", headers={"prefer": "wait=30"})
    assert response.status_code == 200, response.text
    return dict(response.json())


def submit(client: httpx.Client, seed: int) -> str:
    params = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "seed": seed, "temperature": 1.0}
    response = client.post("/v1/jobs", json={"model": MODEL, "prompt": "Once", "params": params})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def read(client: httpx.Client, job_id: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/jobs/{job_id}?include=output,attempts").json())


def text_of(job: dict[str, Any]) -> str:
    choices = job["output"]["choices"] if job["output"] else []
    return str(choices[0]["text"]) if choices else ""


def watch_until(plant: Plant, is_true: Callable[[], Any], what: str) -> None:
    def watch() -> Any:
        plant.watch()
        return is_true()

    wait_until(watch, what, pause_seconds=0.05)


def start_jobs(plant: Plant, client: httpx.Client) -> list[str]:
    job_ids = [submit(client, seed) for seed in range(NUM_JOBS)]
    watch_until(plant, lambda: all(text_of(read(client, job_id)) for job_id in job_ids), "every job has text")
    return job_ids


class Reader(threading.Thread):
    """Reads a job's events from the first to the last as they come."""

    def __init__(self, url: str, job_id: str) -> None:
        super().__init__()
        self._url = f"{url}/v1/jobs/{job_id}/events"
        self.text = ""
        self.numbers: list[int] = []
        self.last = ""

    def run(self) -> None:
        with httpx.stream("GET", self._url, timeout=60) as response:
            for event in parse_events(response.iter_lines()):
                self.last = event.name
                if event.name == "output.delta":
                    self.text += event.data["text"]
                    self.numbers.append(event.data["sequence_number"])


def assert_all_whole(plant: Plant, client: httpx.Client, job_ids: list[str], readers: list[Reader]) -> None:
    """Each token once: the text is what an undisturbed job of the same seed says, and so is what was streamed."""
    watch_until(
        plant, lambda: all(read(client, job_id)["status"] == "completed" for job_id in job_ids), "all completed"
    )
    undisturbed = [submit(client, seed) for seed in range(NUM_JOBS)]
    watch_until(plant, lambda: all(read(client, id_)["status"] == "completed" for id_ in undisturbed), "and these")
    for job_id, other_id, reader in zip(job_ids, undisturbed, readers, strict=True):
        reader.join()
        assert text_of(read(client, job_id)) == text_of(read(client, other_id)) == reader.text
        assert reader.numbers == list(range(1, len(reader.numbers) + 1))
        assert reader.last == "job.completed"


def states(client: httpx.Client) -> list[tuple[str, str]]:
    """Of the model's workers: state and start."""
    [model] = client.get("/v1/admin/models").json()["data"]
    return [(worker["state"], worker["started_at"]) for worker in model["workers"]]


def test_jobs_of_an_unloaded_model_wait_and_go_on_where_they_were(plant: Plant, client: httpx.Client) -> None:
    [worker] = plant.workers
    job_ids, worker_pid = start_jobs(plant, client), worker.pid
    readers = [Reader(plant.api_urls[0], job_id) for job_id in job_ids]
    for reader in readers:
        reader.start()
    assert order(client, "unload")["status"] == "unloaded"
    assert worker.engine_pid() is None
    assert worker.pid == worker_pid
    kept = [read(client, job_id) for job_id in job_ids]
    assert [(job["status"], len(job["attempts"])) for job in kept] == [("queued", 1)] * NUM_JOBS
    assert all(map(text_of, kept))

    chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    refused = client.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_workers")
    assert client.get("/health").json()["models_unloaded"] == [MODEL]
    assert [text_of(read(client, job_id)) for job_id in job_ids] == [text_of(job) for job in kept]

    assert order(client, "load")["status"] == "loaded"
    assert worker.pid == worker_pid
    assert_all_whole(plant, client, job_ids, readers)


def test_a_worker_killed_while_its_model_is_unloaded_comes_back_without_an_engine(
    plant: Plant, client: httpx.Client
) -> None:
    [worker] = plant.workers
    job_ids = start_jobs(plant, client)
    readers = [Reader(plant.api_urls[0], job_id) for job_id in job_ids]
    for reader in readers:
        reader.start()
    [(_, first_start)] = states(client)
    assert client.post(f"/v1/admin/models/{MODEL}/unload").status_code == 202
    worker.kill()  # with jobs running: they are rescued, and wait as well
    watch_until(plant, lambda: came_back(client, first_start), "the worker is back, unloaded")
    assert worker.engine_pid() is None
    watch_until(plant, lambda: all(read(client, id_)["status"] == "queued" for id_ in job_ids), "they are rescued")

    [*_, (_, second_start)] = states(client)
    worker.kill()
    watch_until(plant, lambda: came_back(client, second_start), "it is back once more, unloaded")
    assert worker.engine_pid() is None
    assert all(read(client, job_id)["status"] == "queued" for job_id in job_ids)
    assert never_ready_since(worker)
    assert order(client, "load")["status"] == "loaded"
    assert_all_whole(plant, client, job_ids, readers)


def came_back(client: httpx.Client, before: str) -> bool:
    return any(state == "unloaded" and started_at > before for state, started_at in states(client))


def never_ready_since(worker: Part) -> bool:
    """The newest incarnation has not started an engine."""
    return "the engine is ready" not in worker.log().rpartition("unloading the model")[2]
