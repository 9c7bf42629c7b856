"""One worker, two models, memory for one: all jobs end right, also if engines and the worker are killed meanwhile;
and the progress of loads."""

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from domain.jobs import WorkerState
from gpu_worker.engine.fake_tokens import fake_text
from storage import workers
from tests.chaos.plant import Part, Plant, start_prepared
from tests.integration.runner_harness import Rig
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

NEED_BYTES = 100
MODELS = "".join(
    f"""
[[models]]
id = "{name}"
path = "none"
backend = "fake"
max_model_len = 512
max_num_seqs = 8
[models.fake]
step_seconds = 0.005
load_seconds = 0.3
memory_bytes = {NEED_BYTES}
"""
    for name in ("one", "two")
)
SETTINGS = {
    "worker_memory": 150,
    "model_residency_seconds": 0.5,
    "lease_seconds": 3,
    "lease_grace_seconds": 0.5,
    "janitor_interval_seconds": 0.5,
    "max_failures": 10,
}
NUM_JOBS = 200
PROMPT = [5, 6, 7]


@pytest.fixture
def plant() -> Iterator[Plant]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-several-"))
    with Plant(
        folder, models=MODELS, worker_models={"gpu-1": "one,two"}, settings=SETTINGS, start=start_prepared
    ) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        yield plant
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def client(plant: Plant) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=plant.api_urls[0], timeout=60) as client:
        yield client


def num_tokens_of(seed: int) -> int:
    return 5 + seed % 40


def submit(client: httpx.Client, model: str, seed: int) -> str:
    params = {"max_tokens": num_tokens_of(seed), "ignore_eos": True, "seed": seed, "temperature": 1.0}
    response = client.post("/v1/jobs", json={"model": model, "prompt_token_ids": PROMPT, "params": params})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def submit_mixed(client: httpx.Client) -> dict[str, int]:
    """Jobs of both models in turn: their seeds by id."""
    return {submit(client, ("one", "two")[seed % 2], seed): seed for seed in range(NUM_JOBS)}


def num_completed(plant: Plant) -> int:
    with plant.connect() as connection:
        row = connection.execute("SELECT count(*) FROM jobs WHERE status = 'completed'").fetchone()
    return int(str(row[0])) if row else 0


def assert_all_right(plant: Plant, client: httpx.Client, seed_by_id: dict[str, int]) -> None:
    """Each has its own text, whole and once."""
    for job_id, seed in seed_by_id.items():
        job: dict[str, Any] = client.get(f"/v1/jobs/{job_id}?include=output").json()
        assert job["status"] == "completed", job
        assert job["output"]["choices"][0]["text"] == fake_text(PROMPT, seed, 0, num_tokens_of(seed)), job
    with plant.connect() as connection:
        torn = connection.execute(
            "SELECT j.id FROM jobs j JOIN job_chunks c ON c.job_id = j.id GROUP BY j.id "
            "HAVING sum(json_array_length(c.chunk->'token_ids')) <> j.max_tokens OR count(*) <> max(c.sequence_number)"
        ).fetchall()
    assert torn == []


def figure(part: Part, name: str) -> float:
    """A metric of the worker, added up over its models."""
    url = re.findall(r"metrics on (http://[\w.:]+)", part.log())[-1]
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def engine_pids(part: Part) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        templates = [child for child in psutil.Process(part.pid).children() if "engine.child" in str(child.cmdline())]
        return [engine.pid for template in templates for engine in template.children()]
    return []


def test_the_progress_of_a_load_is_reported_until_the_model_is_ready(rig: Rig) -> None:
    rig.write_catalog(load_seconds=2.0)
    seen: list[int] = []

    def is_ready() -> bool:
        with rig.sessions() as session:
            live = workers.list_live(session)
        seen.extend(
            each.load_percent for each in live if each.load_percent is not None and each.load_percent not in seen
        )
        return any(each.state is WorkerState.READY and each.load_percent is None for each in live)

    rig.start(wait=False)
    wait_until(is_ready, "the model is ready")
    assert len(seen) > 1, seen
    assert seen == sorted(seen)


@pytest.mark.timeout(600)
def test_two_models_take_turns_in_memory_for_one_and_all_jobs_are_right(plant: Plant, client: httpx.Client) -> None:
    [worker] = plant.workers
    seed_by_id = submit_mixed(client)

    def are_done() -> bool:
        assert figure(worker, "celeriac_worker_models_memory_bytes") <= NEED_BYTES  # never both
        assert len(engine_pids(worker)) <= 1
        return num_completed(plant) == NUM_JOBS

    wait_until(are_done, "all jobs are completed", seconds=120)
    assert_all_right(plant, client, seed_by_id)
    loads, evictions = (
        figure(worker, f"celeriac_{name}") for name in ("model_load_seconds_count", "model_evictions_total")
    )
    assert evictions >= 1
    assert loads == evictions + 1  # the last one stays
    with plant.connect() as connection:
        assert connection.execute("SELECT id FROM jobs WHERE attempt > 1").fetchall() == []  # none was interrupted


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_done_twice_if_an_engine_and_the_worker_are_killed_meanwhile(
    plant: Plant, client: httpx.Client
) -> None:
    [worker] = plant.workers
    seed_by_id = submit_mixed(client)
    wait_until(lambda: num_completed(plant) > NUM_JOBS // 8, "some jobs are completed", seconds=120)
    wait_until(lambda: engine_pids(worker), "a model is loaded")
    for pid in engine_pids(worker):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: num_completed(plant) > NUM_JOBS // 2, "half of the jobs are completed", seconds=120)
    worker.kill()

    def are_done() -> bool:
        plant.watch()  # starts it again
        return num_completed(plant) == NUM_JOBS

    wait_until(are_done, "all jobs are completed", seconds=120)
    assert_all_right(plant, client, seed_by_id)


@pytest.mark.timeout(300)
def test_a_long_text_makes_room_for_another_models_job_and_goes_on_afterwards(tmp_path: Path) -> None:
    models = MODELS.replace("step_seconds = 0.005", "step_seconds = 0.025")
    settings = SETTINGS | {"drain_seconds": 0.3}
    with Plant(
        tmp_path, models=models, worker_models={"gpu-1": "one,two"}, settings=settings, start=start_prepared
    ) as plant:
        plant.start_servers()
        plant.start_parts()
        plant.wait_until_ready()
        with httpx.Client(base_url=plant.api_urls[0], timeout=60) as client:
            params = {"max_tokens": 480, "ignore_eos": True, "seed": 3, "temperature": 1.0}
            body = {"model": "one", "prompt_token_ids": PROMPT, "params": params}
            long = client.post("/v1/jobs", json=body).raise_for_status().json()["id"]
            wait_until(lambda: client.get(f"/v1/jobs/{long}").json()["first_token_at"], "it runs")
            other = submit(client, "two", 1)
            wait_until(lambda: client.get(f"/v1/jobs/{other}").json()["finished_at"], "the other has had its turn")
            assert client.get(f"/v1/jobs/{long}").json()["finished_at"] is None
            wait_until(lambda: client.get(f"/v1/jobs/{long}").json()["finished_at"], "it has gone on")
            job = client.get(f"/v1/jobs/{long}?include=output").json()
    assert job["output"]["choices"][0]["text"] == fake_text(PROMPT, 3, 0, 480)
    assert job["attempt"] > 1


def test_a_job_of_a_model_that_is_not_loaded_is_told_so_and_when_it_will_be(plant: Plant, client: httpx.Client) -> None:
    """Both waits, that for the other model's jobs and that for the load, show in its place."""
    first = submit(client, "two", 1)
    wait_until(lambda: client.get(f"/v1/jobs/{first}").json()["status"] == "completed", "both have been loaded once")

    def is_on_standby() -> bool:
        queues = {queue["model"]: queue for queue in client.get("/v1/queue").json()["data"]}
        is_loaded = client.get("/v1/models/one").json()["loaded"]
        return is_loaded is False and queues["one"]["eta_seconds"] is not None

    wait_until(is_on_standby, "the first model has made room, and how long a load takes is known")
    place = client.post("/v1/jobs", json={"model": "one", "prompt_token_ids": PROMPT}).json()["queue"]
    assert place["waiting_for"] == "model_load", place
    assert place["eta_seconds"] is not None, place
