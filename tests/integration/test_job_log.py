"""The logs of the real processes: JSON from the first line on, and each job's story in them, whoever ran it."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import parse_id
from local.processes import free_port
from maintenance.janitor import Janitor
from settings import Settings
from storage.tables import Job
from tests.chaos.plant import Plant, start_prepared
from tests.integration.api_harness import CATALOG, HandWorker
from tests.integration.test_main_job import System
from tests.storage_samples import PAST
from tests.waiting import wait_until

MODELS = """
[[models]]
id = "fake"
path = "none"
backend = "fake"
max_model_len = 4096
max_num_seqs = 8
[models.fake]
step_seconds = 0.1
"""
SETTINGS = {"lease_seconds": 3, "lease_grace_seconds": 0.5, "janitor_interval_seconds": 0.5, "log_format": "json"}
PROMPT = "Nobody-may-read-this-in-a-log"
NUM_TOKENS = 60


@pytest.fixture
def system() -> Iterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-logs-"))
    plant = Plant(folder, models=MODELS, worker_models={"gpu-1": "fake"}, settings=SETTINGS, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


def lines_of(plant: Plant) -> list[dict[str, Any]]:
    """Of all processes, in order of time. Raises where one is not JSON."""
    lines: list[dict[str, Any]] = []
    for file in sorted((plant.folder / "logs").glob("*.log")):
        lines += [json.loads(line) | {"process": file.stem} for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: str(line["time"]))


@pytest.mark.slow
def test_the_story_of_a_rescued_job_can_be_read_in_the_logs_by_its_id(system: System) -> None:
    plant = system.plant
    flower = plant._part("flower", "flower", "--port", str(free_port("127.0.0.1", 0)))
    flower.start()
    try:
        with httpx.Client(base_url=plant.api_urls[0], timeout=30) as http:
            params = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
            accepted = http.post("/v1/jobs", json={"model": "fake", "prompt": PROMPT, "params": params})
            name, request_id = accepted.json()["id"], accepted.headers["x-request-id"]
            wait_until(lambda: http.get(f"/v1/jobs/{name}").json()["first_token_at"])
            plant.workers[0].kill()  # with SIGKILL; it is started again
            wait_until(lambda: http.get(f"/v1/jobs/{name}").json()["status"] == "completed")
        wait_until(lambda: "Visit me" in flower.log())
        wait_until(lambda: any(line["message"] == "job ended" for line in lines_of(plant)))
    finally:
        flower.close()
    story = [line for line in lines_of(plant) if line.get("job_id") == name and line["message"].startswith("job ")]
    assert [(line["process"], line["message"]) for line in story] == [
        ("api-1", "job accepted"),
        ("gpu-1", "job claimed"),
        ("gpu-1", "job first token"),
        ("maintenance", "job rescued"),
        ("gpu-1", "job claimed"),
        ("gpu-1", "job ended"),
    ]
    assert {line["request_id"] for line in story} == {request_id}
    assert {line["level"] for line in story} == {"INFO"}
    _, first, _, rescued, second, end = story
    assert (first["attempt"], rescued["attempt"], second["attempt"], end["attempt"]) == (1, 1, 2, 2)
    assert first["worker"].startswith("gpu-1")
    assert 0 < rescued["tokens"] == second["tokens"] < end["tokens"] == NUM_TOKENS
    assert (end["status"], end["seconds"] > 0) == ("completed", True)
    assert PROMPT not in "".join(map(json.dumps, lines_of(plant)))
    assert not any("\n" in line["message"] for line in lines_of(plant))


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("cancelled while queued", [("ended", "cancelled")]),
        ("expired", [("ended", "expired")]),
        ("rescued", [("rescued", None)]),
        ("rescued for the last time", [("rescued", None), ("ended", "failed")]),
    ],
)
def test_what_happens_without_a_worker_is_told_once_with_the_id_of_the_request(
    step: str,
    told: list[tuple[str, str | None]],
    http: httpx.Client,
    hand_worker: HandWorker,
    session_factory: sessionmaker[Session],
    caplog: pytest.LogCaptureFixture,
) -> None:
    janitor = Janitor(session_factory, hand_worker.redis, CATALOG, Settings())
    janitor.quiet_seconds = 0
    caplog.set_level(logging.INFO, "celeriac.jobs")
    accepted = http.post("/v1/jobs", json={"model": "fake", "prompt": PROMPT})
    name = accepted.json()["id"]
    for _ in range(2):  # the second time there is nothing left to tell
        take_step(step, hand_worker, name, http)
        janitor.tick()
    lines = [record for record in caplog.records if record.name == "celeriac.jobs"]
    assert [(line.getMessage(), getattr(line, "status", None)) for line in lines] == [
        ("job accepted", None),
        *((f"job {verb}", status) for verb, status in told),
    ]
    assert {(vars(line)["job_id"], vars(line)["request_id"]) for line in lines} == {
        (name, accepted.headers["x-request-id"])
    }


def take_step(step: str, worker: HandWorker, name: str, http: httpx.Client) -> None:
    """What happens to the job before the janitor looks."""
    if step == "cancelled while queued":
        http.post(f"/v1/jobs/{name}/cancel")
    elif step == "expired":
        _pass_deadline(worker, name)
    elif step == "rescued":
        _lapse(worker, name)
    else:
        _lapse(worker, name, max_failures=0)


def _pass_deadline(worker: HandWorker, name: str) -> None:
    with worker.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == parse_id(name)).values(deadline_at=PAST))


def _lapse(worker: HandWorker, name: str, **columns: int) -> None:
    with worker.sessions.begin() as session:
        if session.get_one(Job, parse_id(name)).attempt:
            return
    worker.claim(name)
    with worker.sessions.begin() as session:
        session.execute(update(Job).where(Job.id == parse_id(name)).values(lease_expires_at=PAST, **columns))
