"""A worker's /health tells a process that is stuck from one that loads its model or drains."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from domain.jobs import WorkerState
from gpu_worker.health import STUCK_SECONDS, with_health
from gpu_worker.serving import ModelRunners


def others(environ: Any, start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"metrics"]


def client_of(state: WorkerState, seconds: float) -> httpx.Client:
    stats = SimpleNamespace(state=state, num_running=3)
    runners = cast(ModelRunners, SimpleNamespace(stats=lambda: stats, seconds_since_turn=seconds))
    return httpx.Client(transport=httpx.WSGITransport(app=with_health(runners)(others)), base_url="http://worker")


@pytest.mark.parametrize(
    ("state", "seconds", "health", "ready"),
    [
        (WorkerState.READY, 0.1, 200, 200),
        (WorkerState.LOADING, 0.1, 200, 503),
        (WorkerState.DRAINING, 0.1, 200, 503),
        (WorkerState.UNLOADED, 0.1, 200, 200),
        (WorkerState.STANDBY, 0.1, 200, 200),
        (WorkerState.READY, STUCK_SECONDS + 1, 503, 503),
    ],
)
def test_a_probe_learns_whether_to_restart_and_whether_to_wait(
    state: WorkerState, seconds: float, health: int, ready: int
) -> None:
    with client_of(state, seconds) as client:
        assert client.get("/health").status_code == health
        assert client.get("/health").json()["state"] == state
        assert client.get("/health/ready").status_code == ready
        assert client.get("/metrics").text == "metrics"
