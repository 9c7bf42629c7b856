"""One request of the largest size, whatever is in it, takes little of the event loop and keeps nobody waiting."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.request_cost import Kind, api_process, bodies_by_kind, cost_of, post

pytestmark = pytest.mark.slow

MAX_LOOP_MILLISECONDS = 100
MAX_HEALTH_MILLISECONDS = 150
USUAL_MILLISECONDS = 60  # of `milliseconds_of_this_machine` on one where these bounds were measured
NUM_TRIES = 6  # what the request itself costs it costs each time; what others do on this machine comes and goes


def milliseconds_of_this_machine() -> float:
    started = time.process_time()
    json.loads(b"[" + b"{}," * 349_000 + b"1]", object_pairs_hook=lambda pairs: dict(pairs))
    return 1000 * (time.process_time() - started)


@pytest.fixture(scope="module")
def process(server_folder: Path) -> Iterator[tuple[int, int]]:
    """An API process: its id and its port."""
    folder = server_folder / "request-cost"
    folder.mkdir()
    with api_process(folder, {}) as (process, port):
        post(port, Kind("/v1/jobs", b'{"model":"large","prompt":"a"}'))
        yield process.pid, port


#: One request that is 127 jobs: a millisecond and a half each, between which the loop does other things.
MANY_JOBS = "accepted: prompts of token ids"


@pytest.mark.parametrize("name", [name for name in bodies_by_kind() if name != MANY_JOBS])
def test_a_large_request_takes_little_of_the_loop_and_delays_nobody(process: tuple[int, int], name: str) -> None:
    pid, port = process
    kind = bodies_by_kind()[name]
    loop, health = [], []
    for _ in range(NUM_TRIES):
        slowness = max(1.0, milliseconds_of_this_machine() / USUAL_MILLISECONDS)
        cost = cost_of(pid, port, lambda: post(port, kind))
        loop.append(cost.loop_cpu / slowness)
        health.append(cost.health_after / slowness)
        assert cost.status in (200, 202, 400)
        if min(loop) <= MAX_LOOP_MILLISECONDS and min(health) <= MAX_HEALTH_MILLISECONDS:
            return
    pytest.fail(f"CPU of the loop {loop} ms, /health/live after {health} ms")
