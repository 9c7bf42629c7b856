"""The consumer on every kind of broker URL: another database, a password, a Unix socket."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from local.servers import EmbeddedRedis, redis_program
from tests.integration.consumer_harness import Plant
from tests.waiting import wait_until

PASSWORD = "a-password"


@pytest.fixture
def unix_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that listens on a Unix socket alone."""
    folder = tmp_path_factory.mktemp("redis")
    path = folder / "socket"
    command = [redis_program(), "--port", "0", "--unixsocket", str(path), "--requirepass", PASSWORD, "--save", ""]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    wait_until(path.exists, "the server listens")
    yield f"unix://:{PASSWORD}@{path}?db=2"
    server.terminate()
    server.wait()


@pytest.mark.parametrize("kind", ["another database", "unix socket"])
def test_jobs_run_whatever_the_broker_is_called(
    tmp_path: Path, redis_server: EmbeddedRedis, redis_url: str, unix_url: str, kind: str
) -> None:
    url = unix_url if kind == "unix socket" else redis_url.removesuffix("/0") + "/3"
    plant = Plant(tmp_path, url)
    try:
        plant.start_worker()
        job_ids = plant.send(5)
        plant.wait_for("claimed", job_ids[:4])
        assert plant.inspect("engine_stats")["running"] == 4
        assert PASSWORD not in json.dumps(plant.inspect("stats"))
        plant.app.control.revoke("job_" + "0" * 26, terminate=True)
        plant.end_all()
        plant.wait_for("completed", job_ids)
        wait_until(plant.is_broker_empty, "all messages are acked")
        with redis.Redis.from_url(plant.redis_url) as client:
            assert client.connection_pool.connection_kwargs["db"] == (2 if kind == "unix socket" else 3)
    finally:
        plant.close()
