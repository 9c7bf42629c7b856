"""The API as the integration tests meet it: a server per test, on this test's own database and Redis."""

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import ModelSpec
from gpu_worker import reporting
from gpu_worker.engine_process import template
from settings import Settings
from tests.conftest import MakeJob
from tests.integration.api_harness import ApiServer, HandWorker
from tests.integration.runner_harness import Rig
from tests.prepared import PreparedProcess, engine_nursery, nursery
from tests.waiting import SECONDS

STDERR = 2
BUCKET = "models"  # of `bucket`


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files with slow tests first, of all folders, and dealt out: xdist gives each of its processes one stretch of the
    tests, of equal number, and whoever is idle steals from the end of another's. So there, and at the end of the run,
    are only short ones."""
    num_workers = getattr(config, "workerinput", {}).get("workercount", 1)
    slow = dict.fromkeys(item.path for item in items if item.get_closest_marker("slow") is not None)
    worker_by_path = {path: number % num_workers for number, path in enumerate(slow)}
    others = [item for item in items if item.path not in slow]
    dealt: list[pytest.Item] = []
    for worker in range(num_workers):
        own = [item for item in items if worker_by_path.get(item.path) == worker]
        num_others = max(0, len(items) // num_workers - len(own))
        dealt += own + others[:num_others]
        del others[:num_others]
    items[:] = dealt + others


@pytest.fixture
def api_settings(database_url: str, redis_url: str) -> Settings:
    return Settings(database_url=database_url, redis_url=redis_url, api_drain_seconds=0)


@pytest.fixture
def api(api_settings: Settings) -> Iterator[ApiServer]:
    with ApiServer(api_settings) as server:
        yield server


@pytest.fixture
def http(api: ApiServer) -> Iterator[httpx.Client]:
    with api.client() as client:
        yield client


@pytest.fixture
def hand_worker(session_factory: sessionmaker[Session], redis_url: str) -> Iterator[HandWorker]:
    with redis.Redis.from_url(redis_url) as client:
        yield HandWorker(session_factory, client)


def start_template(
    command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **_others: Any
) -> PreparedProcess:
    """An engine's template without a second of imports. It ends with the nursery, as it would with its worker."""
    module, *arguments = command[command.index("-m") + 1 :]
    spec = ModelSpec.model_validate_json(arguments[arguments.index("--spec") + 1])
    prepared = nursery() if spec.backend == "fake" else engine_nursery()
    return prepared.start(module, arguments, environment=env, output=STDERR, pass_fds=pass_fds, start_new_session=True)


@pytest.fixture
def context_length() -> int:
    """Of the model of a `rig`. A test that has a job fill it names a small one."""
    return 4096


@pytest.fixture
def rig(
    tmp_path: Path,
    session_factory: sessionmaker[Session],
    database_url: str,
    redis_url: str,
    make_job: MakeJob,
    context_length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Rig]:
    """JobRunners on this test's own database and Redis, each with a real engine process on the fake back end."""
    settings = Settings(database_url=database_url, redis_url=redis_url, models_file=tmp_path / "models.toml")
    starting = SimpleNamespace(Popen=start_template, DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr(template, "subprocess", starting)
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.2)  # a worker's orders come with the answers to its reports
    rig = Rig(session_factory, settings, make_job, context_length)
    yield rig
    rig.close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty bucket; the AWS_* variables lead to it."""
    pytest.importorskip("obstore")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    httpx.post(f"{url}/moto-api/reset", timeout=SECONDS).raise_for_status()  # its buckets outlive the server
    httpx.put(f"{url}/{BUCKET}", timeout=SECONDS).raise_for_status()
    yield url
    server.stop()
