"""The main job end to end, on the shipped processes: 64 jobs at once, and one part after another killed among them.

The worker runs the embedded model. Whatever ends is started again, as an init system or `celeriac up` would.
"""

import asyncio
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from domain.jobs import parse_id
from settings import ROOT, Settings
from tasks.app import make_app
from tests.chaos.checker import judge, read_stored
from tests.chaos.clients import Clients, History, How
from tests.chaos.plant import Plant, start_prepared
from tests.integration.consumer_harness import EventLog
from tests.waiting import SECONDS, slowness, wait_until

pytestmark = pytest.mark.slow

NUM_JOBS = 64
NUM_SLOTS = 16
MODEL = "celeriac-mini"
MODELS = f"""
[[models]]
id = "{MODEL}"
path = "{MODEL}"
max_model_len = 1024
max_num_seqs = {NUM_SLOTS}
"""
SETTINGS = {"lease_seconds": 3, "lease_grace_seconds": 0.5, "janitor_interval_seconds": 0.5, "flush_min_seconds": 0.02}
SHORT, LONG = range(8, 13), range(48, 97)  # tokens
FINISH_SECONDS = 120.0


class System:
    """A running system, and a thread that starts again whatever ends."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch")

    def __enter__(self) -> "System":
        self.plant.start_servers()
        self.plant.start_parts()
        self.plant.wait_until_ready()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.plant.close()

    def _watch(self) -> None:
        while not self._is_closing.wait(0.05):
            self.plant.watch()

    def count(self, condition: str) -> int:
        with self.plant.connect() as connection:
            [row] = connection.execute(f"SELECT count(*) FROM jobs WHERE {condition}").fetchall()
        number = row[0]
        assert isinstance(number, int)
        return number

    def forget_all_jobs(self) -> None:
        with self.plant.connect() as connection:
            connection.execute("DELETE FROM jobs")


@pytest.fixture(scope="module")
def running_system() -> Iterator[System]:
    folder = Path(tempfile.mkdtemp(prefix="celeriac-main-"))
    shutil.copytree(ROOT / "models" / MODEL, folder / MODEL)  # the same weights to the end, whatever is trained here
    plant = Plant(folder, models=MODELS, worker_models={"gpu-1": MODEL}, settings=SETTINGS, start=start_prepared)
    with System(plant) as system:
        yield system
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def system(running_system: System) -> System:
    running_system.plant.wait_until_ready()
    running_system.forget_all_jobs()
    return running_system


def job_body(number: int) -> dict[str, Any]:
    """Every third one is long. Sampled, with a seed; the end of the text is where max_tokens is."""
    tokens = random.Random(number).choice(LONG if number % 3 == 0 else SHORT)
    params = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": number}
    return {"model": MODEL, "prompt": f"Once upon a time, number {number}", "params": params}


WAYS: list[tuple[list[int], list[How]]] = [
    ([], ["start"]),  # from the start, and there to the end unless it is dropped
    ([2], ["start", "last-event-id"]),  # from the middle
    ([1, 1, 2], ["start", "starting-after", "snapshot", "last-event-id"]),  # again and again
]


async def submit_all_and_follow(clients: Clients, during: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """64 jobs, each watched in its own way, while `during` does something to the system."""
    histories = [clients.plan(job_body(number)) for number in range(NUM_JOBS)]

    async def one(number: int, history: History) -> None:
        assert await clients.submit(history)
        breaks, hows = WAYS[number % len(WAYS)]
        await clients.follow(history, breaks=breaks, hows=hows)

    async with asyncio.timeout(FINISH_SECONDS * slowness()), asyncio.TaskGroup() as group:
        for number, history in enumerate(histories):
            group.create_task(one(number, history))
        group.create_task(during())


def run(system: System, during: Callable[[], Coroutine[Any, Any, None]]) -> Clients:
    """Everything from the first request to the last event."""

    async def main() -> Clients:
        clients = Clients(system.plant.api_urls, seed=7)
        try:
            await submit_all_and_follow(clients, during)
        finally:
            await clients.close()
        return clients

    return asyncio.run(main())


def assert_all_is_well(system: System, clients: Clients) -> None:
    with system.plant.connect() as connection:
        stored = read_stored(connection)
    verdict = judge(clients.histories, stored)
    assert verdict.violations == []
    assert verdict.figures["jobs_by_status"] == {"completed": NUM_JOBS}


async def until(is_true: Callable[[], bool]) -> None:
    while not await asyncio.to_thread(is_true):  # noqa: ASYNC110  (it is SQL that is asked, which sets no event)
        await asyncio.sleep(0.01)


def kill_worker(system: System) -> None:
    system.plant.workers[0].send(signal.SIGKILL)


def kill_engine(system: System) -> None:
    pid = system.plant.workers[0].engine_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def kill_api(system: System) -> None:
    system.plant.apis[0].send(signal.SIGKILL)


def empty_redis(system: System) -> None:
    with system.plant.redis_client() as client:
        client.flushall()


def test_short_jobs_leave_the_running_batch_early_and_waiting_ones_join(system: System) -> None:
    seen: list[dict[str, Any]] = []
    app = make_app(Settings(redis_url=system.plant.redis.url))
    events = EventLog(system.plant.redis.url)
    worker = f"gpu-1@{socket.gethostname()}"
    inspect = app.control.inspect([worker], timeout=SECONDS, limit=1)

    async def observe() -> None:
        """What /v1/queue and `celery inspect stats` say while the jobs run."""
        await until(lambda: system.count("true") == NUM_JOBS)
        await asyncio.sleep(0.3)  # /v1/queue may be older by 0.25 s
        async with httpx.AsyncClient(base_url=system.plant.api_urls[0], timeout=30) as http:
            while system.count("status = 'completed'") < NUM_JOBS:
                [queue] = (await http.get("/v1/queue")).json()["data"]
                stats = await asyncio.to_thread(inspect.stats)
                seen.append({**queue, **stats[worker]["pool"]})

    clients = run(system, observe)
    assert_all_is_well(system, clients)
    assert any(look["running"] == look["slots-running"] == NUM_SLOTS and look["queued"] > 0 for look in seen)
    assert all(look["slots-running"] <= NUM_SLOTS for look in seen)  # `running` has jobs whose end is being stored, too
    assert [look["queued"] for look in seen] == sorted((look["queued"] for look in seen), reverse=True)
    joined_and_left = """EXISTS (SELECT FROM jobs short WHERE short.max_tokens < jobs.max_tokens
        AND short.started_at > jobs.started_at AND short.finished_at < jobs.finished_at)"""
    assert system.count(f"max_tokens >= {LONG.start} AND {joined_and_left}") >= NUM_SLOTS // 3
    ends = ("task-succeeded", "task-failed", "task-revoked")
    wait_until(lambda: sum(event["type"] in ends for event in events.all()) >= NUM_JOBS, "every end is told")
    for history in clients.histories:
        assert history.job_id is not None
        assert events.of(parse_id(history.job_id)) == ["received", "started", "succeeded"]
    events.close()
    app.close()


@pytest.mark.parametrize("befalls", [kill_worker, kill_engine, kill_api, empty_redis])
def test_sixty_four_jobs_complete_with_every_stream_intact_when(
    befalls: Callable[[System], None], system: System
) -> None:
    async def strike() -> None:
        """In the midst of it: some are done, a full batch runs, some wait."""
        await until(lambda: system.count("status = 'completed'") >= NUM_SLOTS)
        assert system.count("status = 'in_progress'") > 0
        befalls(system)

    clients = run(system, strike)
    assert_all_is_well(system, clients)
    if befalls is kill_api:
        assert any(c.ended == "dropped" for history in clients.histories for c in history.connections)
    elif befalls is not empty_redis:
        assert system.count("attempt > 1") > 0
