"""Starts and watches GPU workers of `consumer_app`, and speaks to their broker."""

import json
import os
import signal
import subprocess
import sys
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis
from celery import Celery

from domain.jobs import external_id, new_id
from local.servers import EmbeddedRedis
from settings import Settings
from tasks.app import make_app
from tasks.dispatch import count_waiting, send
from tests.prepared import PreparedProcess, nursery
from tests.waiting import SECONDS, wait_until

ROOT = Path(__file__).resolve().parents[2]
QUEUE = "celeriac.test-model"


class Plant:
    """A broker, a ledger and any number of workers. Close it to end the workers."""

    def __init__(self, folder: Path, redis_url: str, *, num_slots: int = 4, lookahead: int = 2) -> None:
        self.folder = folder
        self.redis_url = redis_url
        self.workers: list[PreparedProcess] = []
        self._lookahead = lookahead
        self._models_file = folder / "models.toml"
        self._models_file.write_text(
            '[[models]]\nid = "test-model"\npath = "none"\nbackend = "fake"\nmax_model_len = 64\n'
            f"max_num_seqs = {num_slots}\n"
        )
        for name in ("queued", "owned", "ends"):
            (folder / name).mkdir()
        (folder / "ledger").touch()
        self.settings = Settings(redis_url=redis_url, models_file=self._models_file)
        self.client = redis.Redis.from_url(self.settings.redis_url, socket_timeout=5)
        self.app: Celery = make_app(self.settings)
        self.app.conf.broker_pool_limit = (
            0  # kombu pools connections by URL, also those to a server that a test stopped
        )

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.client.close()
        self.app.close()

    # Workers

    def start_worker(self, name: str = "one", *, wait: bool = True, **variables: float) -> PreparedProcess:
        """`variables` without their prefix: job_seconds=0.1."""
        environment = os.environ | {
            "CELERIAC_REDIS_URL": self.redis_url,
            "CELERIAC_MODELS_FILE": str(self._models_file),
            "CELERIAC_LOOKAHEAD": str(self._lookahead),
            "CELERIAC_DRAIN_SECONDS": str(variables.pop("drain_seconds", 30)),
            "CONSUMER_TEST_FOLDER": str(self.folder),
        }
        environment |= {f"CONSUMER_TEST_{key.upper()}": str(value) for key, value in variables.items()}
        arguments = ["-A", "tests.integration.consumer_app", "worker", "--loglevel=INFO", f"--hostname={name}@test"]
        with (self.folder / f"{name}.log").open("ab") as log:
            worker = nursery().start("celery", arguments, environment=environment, output=log)
        self.workers.append(worker)
        if wait:
            self._wait_until_ready(worker, name)
        return worker

    def start_plain_worker(self) -> PreparedProcess:
        """One of Celery's own, without an engine or a queue of ours."""
        with (self.folder / "plain.log").open("ab") as log:
            arguments = ["-A", "tasks.app", "worker", "--pool=solo", "--hostname=plain@test", "--loglevel=INFO"]
            worker = nursery().start("celery", arguments, environment=self._environment, output=log)
        self.workers.append(worker)
        wait_until(lambda: "plain@test ready" in self.log("plain"), "the plain worker is ready")
        return worker

    def celery(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Celery's command line, as operators type it."""
        command = [*self._celery, *arguments]
        return subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=True)

    @property
    def _celery(self) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "tasks.app"]

    @property
    def _environment(self) -> dict[str, str]:
        files = {"CELERIAC_MODELS_FILE": str(self._models_file), "CELERIAC_LOG_FORMAT": "text"}
        return os.environ | files | {"CELERIAC_REDIS_URL": self.redis_url}

    def _wait_until_ready(self, worker: PreparedProcess, name: str) -> None:
        ready = ["ready", f"{name}@test"]
        wait_until(lambda: worker.poll() is not None or ready in self.ledger(), f"worker {name} is ready")
        if ready not in self.ledger():
            raise AssertionError(f"worker {name} ended with {worker.returncode}:\n{self.log(name)}")

    def log(self, name: str = "one") -> str:
        return (self.folder / f"{name}.log").read_text()

    def kill(self, worker: PreparedProcess) -> None:
        worker.send_signal(signal.SIGKILL)
        worker.wait()

    # Jobs

    def send(self, num_jobs: int) -> list[UUID]:
        """Queue jobs, and send a message for each of them."""
        job_ids = self.queue(num_jobs)
        self.send_messages(job_ids)
        return job_ids

    def queue(self, num_jobs: int) -> list[UUID]:
        """Nobody is told of them."""
        job_ids = sorted(new_id() for _ in range(num_jobs))
        for job_id in job_ids:
            (self.folder / "queued" / external_id(job_id)).touch()
        return job_ids

    def send_messages(self, job_ids: Sequence[UUID]) -> None:
        """Each lets one job be claimed, not necessarily the one that it names."""
        assert send(self.client, QUEUE, job_ids, window=10_000) == len(job_ids)

    def num_queued(self) -> int:
        return len(os.listdir(self.folder / "queued"))

    def end(self, job_id: UUID, status: str = "completed") -> None:
        """The job ends as soon as it runs."""
        written = self.folder / external_id(job_id)
        written.write_text(status)
        written.rename(self.folder / "ends" / external_id(job_id))  # whole at once: the worker looks all the time

    def end_all(self) -> None:
        """Every running job ends now, and every later one at once."""
        (self.folder / "end_all").touch()

    def settle(self) -> None:
        """End whatever runs or waits, so that the next test finds the workers idle."""
        self.end_all()
        for queued in (self.folder / "queued").iterdir():
            queued.unlink(missing_ok=True)
        wait_until(self._is_settled, "nothing runs or waits")
        (self.folder / "end_all").unlink()

    def _is_settled(self) -> bool:
        ended = {line[1] for line in self.ledger() if line[0] in ("completed", "failed", "cancelled", "expired")}
        return self.is_broker_empty() and not self.num_queued() and set(self.jobs("claimed")) <= ended

    def ledger(self) -> list[list[str]]:
        return [line.split() for line in (self.folder / "ledger").read_text().splitlines()]

    def jobs(self, what: str) -> list[str]:
        """External ids of the jobs this happened to, in order."""
        return [line[1] for line in self.ledger() if line[0] == what]

    def claims_by_worker(self) -> Counter[str]:
        return Counter(line[2] for line in self.ledger() if line[0] == "claimed")

    def wait_for(self, what: str, job_ids: Sequence[UUID], *, seconds: float = SECONDS) -> None:
        wanted = {external_id(job_id) for job_id in job_ids}
        wait_until(lambda: wanted <= set(self.jobs(what)), f"{len(wanted)} jobs are {what}", seconds=seconds)

    # The broker

    def num_waiting(self) -> int:
        return count_waiting(self.client, QUEUE)

    def num_unacked(self) -> int:
        num_unacked: Any = self.client.hlen("unacked")
        return int(num_unacked)

    def is_broker_empty(self) -> bool:
        return self.num_waiting() == 0 and self.num_unacked() == 0 and self.client.zcard("unacked_index") == 0

    def inspect(self, command: str, name: str = "one", **arguments: Any) -> Any:
        """One worker's answer to a remote-control command, or None."""
        answers = self.app.control.broadcast(
            command, arguments=arguments, destination=[f"{name}@test"], reply=True, timeout=SECONDS, limit=1
        )
        return answers[0][f"{name}@test"] if answers else None

    def drop_connections(self) -> int:
        """Cut every connection that workers have to the broker."""
        names = [client["id"] for client in self.client.client_list() if client["name"] == "celeriac"]
        return sum(int(self.client.client_kill_filter(_id=identity)) for identity in names)


class EventLog:
    """Every task event that workers send from now on, as Flower would get it."""

    def __init__(self, redis_url: str) -> None:
        self._client = redis.Redis.from_url(redis_url)
        self._pubsub: Any = self._client.pubsub(  # type: ignore[no-untyped-call]
            ignore_subscribe_messages=True
        )
        self._pubsub.psubscribe("/0.celeryev/*")
        self._pubsub.get_message(timeout=1)  # the confirmation: from here on nothing is missed
        self._events: list[dict[str, Any]] = []
        self.num_messages = 0  # that they came in

    def close(self) -> None:
        self._pubsub.close()
        self._client.close()

    def of(self, job_id: UUID) -> list[str]:
        """The types of this job's events so far, in order, without "task-"."""
        return [event["type"].removeprefix("task-") for event in self.all() if event.get("uuid") == external_id(job_id)]

    def all(self) -> list[dict[str, Any]]:
        while (message := self._pubsub.get_message(timeout=0)) is not None:
            body = json.loads(b64decode(json.loads(message["data"])["body"]))
            self._events += body if isinstance(body, list) else [body]
            self.num_messages += 1
        return self._events


MakePlant = Callable[..., Plant]


@pytest.fixture
def make_plant(tmp_path: Path, redis_url: str) -> Iterator[MakePlant]:
    """make_plant(num_slots=4, lookahead=2)"""
    plants: list[Plant] = []

    def make(**options: int) -> Plant:
        plants.append(Plant(tmp_path, redis_url, **options))
        return plants[-1]

    yield make
    for plant in plants:
        plant.close()


@pytest.fixture(scope="module")
def shared_plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """One plant and one idle worker for the tests of a module that can share them: use `plant`."""
    folder = tmp_path_factory.mktemp("plant")
    with EmbeddedRedis(folder / "redis") as server:
        plant = Plant(folder, server.url, num_slots=2, lookahead=1)
        try:
            plant.start_worker()
            yield plant
        finally:
            plant.close()


@pytest.fixture
def plant(shared_plant: Plant) -> Iterator[Plant]:
    """Two slots, a look-ahead of one, an idle worker named "one"."""
    yield shared_plant
    shared_plant.settle()


@pytest.fixture
def plant_events(shared_plant: Plant) -> Iterator["EventLog"]:
    log = EventLog(shared_plant.redis_url)
    yield log
    log.close()


@pytest.fixture
def events(redis_url: str) -> Iterator[EventLog]:
    log = EventLog(redis_url)
    yield log
    log.close()
