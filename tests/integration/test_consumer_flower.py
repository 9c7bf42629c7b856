"""A real Flower over our workers: it shows jobs and engines, and what it sends cancels a job or ends a worker."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from domain.jobs import external_id
from local.processes import free_port
from tests.integration.consumer_harness import ROOT, Plant, plant, shared_plant
from tests.waiting import SECONDS, wait_until

__all__ = ["plant", "shared_plant"]

WORKER = "one@test"


class Flower:
    """Flower as `celeriac flower` starts it."""

    def __init__(self, plant: Plant) -> None:
        port = free_port("127.0.0.1", 0)
        command = [sys.executable, "-m", "celery", "-A", "tasks.flower", "flower", f"--port={port}"]
        environment = os.environ | {
            "CELERIAC_REDIS_URL": plant.redis_url,
            "CELERIAC_MODELS_FILE": str(plant.settings.models_file),
            "FLOWER_UNAUTHENTICATED_API": "true",
        }
        self._log = (plant.folder / "flower.log").open("wb")
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=SECONDS)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._client.close()
        self._log.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """The answer, or None while Flower starts or does not know."""
        try:
            response = self._client.get(path, params=parameters)
        except httpx.TransportError:
            return None
        return response.json() if response.status_code == 200 else None

    def post(self, path: str, **parameters: Any) -> httpx.Response:
        return self._client.post(path, params=parameters)

    def request(self, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
        return self._client.request(method, path, headers=headers)

    def state_of(self, job_id: str) -> str | None:
        task = (self.get("/tasks") or {}).get(job_id)
        return None if task is None else str(task["state"])


@pytest.fixture(scope="module")
def flower(shared_plant: Plant) -> Iterator[Flower]:
    flower = Flower(shared_plant)
    try:
        wait_until(lambda: WORKER in (flower.get("/workers", status=True) or {}), "Flower knows the worker")
        yield flower
    finally:
        flower.close()


def test_flower_shows_jobs_and_cancels_them(plant: Plant, flower: Flower) -> None:
    job_ids = plant.send(4)
    names = [external_id(job_id) for job_id in job_ids]
    plant.wait_for("claimed", job_ids[:2])
    wait_until(lambda: [flower.state_of(name) for name in names[:3]] == ["STARTED", "STARTED", None], "it knows")

    plant.end(job_ids[0])
    wait_until(lambda: flower.state_of(names[0]) == "SUCCESS", "the first job succeeded")
    task = flower.get(f"/task/info/{names[0]}")
    assert (task["name"], task["worker"], task["args"], task["result"]) == (
        "celeriac.generate",
        WORKER,
        "()",
        "a completed job",
    )
    assert task["runtime"] > 0

    plant.end(job_ids[1], "failed")
    wait_until(lambda: flower.state_of(names[1]) == "FAILURE", "the second one failed")
    assert flower.get(f"/task/info/{names[1]}")["exception"] == "a failed job"

    plant.wait_for("claimed", job_ids)
    assert flower.post(f"/task/revoke/{names[2]}", terminate="true").status_code == 200
    plant.wait_for("cancelled", job_ids[2:3])
    wait_until(lambda: flower.state_of(names[2]) == "REVOKED", "the third one is revoked")


def test_flower_shows_the_engine_and_the_queue(plant: Plant, flower: Flower) -> None:
    plant.wait_for("claimed", plant.send(5)[:2])
    wait_until(lambda: plant.num_waiting() == 2, "the worker is full")

    def stats() -> dict[str, Any]:
        """Flower shows what it knew before where the worker has not answered in time."""
        return dict(flower.get("/workers", refresh=True, workername=WORKER)[WORKER]["stats"])

    wait_until(lambda: stats()["engine"]["running"] == 2, "Flower knows of both jobs")
    engine = stats()["engine"]
    assert engine == engine | {"running": 2, "in_hand": 1, "free": 0}
    assert stats()["pool"]["slots-running"] == 2
    queues = flower.get("/queues/length")["active_queues"]
    assert queues == [{"name": "celeriac.test-model", "messages": 2}]


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}],
)
def test_flower_is_closed_to_other_pages_and_hosts(plant: Plant, flower: Flower, headers: dict[str, str]) -> None:
    for path in ("/tasks", "/workers", "/nothing"):
        refusal = flower.request("GET", path, headers)
        assert refusal.status_code == 403
        assert "CELERIAC_" in refusal.json()["error"]["message"]
    assert flower.request("POST", f"/worker/shutdown/{WORKER}", headers).status_code == 403
    assert flower.request("GET", "/workers", {"sec-fetch-site": "same-origin"}).status_code == 200


def test_flower_cannot_resize_an_engine(plant: Plant, flower: Flower) -> None:
    assert WORKER in flower.get("/workers", refresh=True)
    refusal = flower.post(f"/worker/pool/grow/{WORKER}")
    assert refusal.status_code == 403
    assert "max_num_seqs" in refusal.text


def test_flower_ends_a_worker_without_hurting_its_jobs(plant: Plant, flower: Flower) -> None:
    worker = plant.start_worker("two")
    wait_until(lambda: "two@test" in flower.get("/workers", refresh=True), "Flower knows the second worker")
    job_ids = plant.send(4)
    plant.wait_for("claimed", job_ids)
    assert flower.post("/worker/shutdown/two@test").status_code == 200
    wait_until(lambda: "draining" in plant.log("two"), "it drains")
    assert worker.poll() is None
    for job_id in job_ids:
        plant.end(job_id)
    wait_until(lambda: worker.poll() == 0, "it left")
    assert set(plant.jobs("completed")) >= {external_id(job_id) for job_id in job_ids}
    wait_until(lambda: flower.get("/workers", status=True)["two@test"] is False, "Flower saw it leave")
