"""Maintenance as a process: its clocks tick by themselves whatever happens beside them, and what is silent is seen."""

import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from sqlalchemy.orm import Session, sessionmaker

from domain.jobs import JobStatus
from local.servers import EmbeddedRedis
from settings import Settings
from storage.tables import Job
from tests.integration.api_harness import ApiServer
from tests.integration.consumer_harness import EventLog, events
from tests.integration.maintenance_harness import RunningMaintenance, maintaining
from tests.integration.test_janitor import AN_HOUR_AGO, client, is_sent, status_of
from tests.waiting import SECONDS, wait_until

pytestmark = pytest.mark.slow

__all__ = ["client", "events"]

MakeJob = Callable[..., Job]
Servers = tuple[Path, str, str]
FAULTY = "tests.integration.faulty_maintenance"
SILENCE_SECONDS = 1.0  # of processes in a hurry


@pytest.fixture
def servers(tmp_path: Path, database_url: str, redis_url: str) -> Servers:
    return tmp_path, database_url, redis_url


def silent_clocks(running: RunningMaintenance, *, beyond_seconds: float) -> set[str]:
    return {clock for clock, age in running.ages().items() if age > beyond_seconds}


def test_the_janitor_ticks_and_tells_celery_nothing(
    servers: Servers, client: redis.Redis, events: EventLog, make_job: MakeJob
) -> None:
    with maintaining(*servers) as running:
        running.wait_until_ready()
        for _ in range(2):
            job = make_job()
            wait_until(partial(is_sent, client, job), "the job is sent")
        wait_until(lambda: not silent_clocks(running, beyond_seconds=5), "all clocks tick")
        assert running.terminate() == 0, running.log
    assert events.all() == []
    assert "janitor: dispatched test-model 1" in running.log


def test_leases_that_lapse_while_redis_is_away_are_rescued(
    servers: Servers, redis_server: EmbeddedRedis, make_job: MakeJob, session_factory: sessionmaker[Session]
) -> None:
    with maintaining(*servers, lease_seconds=1) as running:
        running.wait_until_ready()
        redis_server.stop()
        try:
            lost = make_job(status=JobStatus.IN_PROGRESS, lease_expires_at=AN_HOUR_AGO)
            wait_until(lambda: status_of(session_factory, lost) is JobStatus.QUEUED, "it is rescued")
            assert not silent_clocks(running, beyond_seconds=15), "Redis is not what they need"
        finally:
            redis_server.start()


def test_redis_may_stall_again_and_again(
    servers: Servers, redis_server: EmbeddedRedis, client: redis.Redis, make_job: MakeJob
) -> None:
    """Each stall is longer than what our connections wait."""
    assert redis_server.pid is not None
    server = psutil.Process(redis_server.pid)
    with maintaining(*servers) as running:
        running.wait_until_ready()

        def num_failures() -> int:
            return running.log.count("janitor rule 'reached Redis' failed")

        def has_failed_since(before: int) -> bool:
            return num_failures() > before

        for _ in range(6):
            before = num_failures()
            server.suspend()
            try:
                wait_until(partial(has_failed_since, before), "the janitor has met the stall")
                assert running.health()[0] == 200
            finally:
                server.resume()
            job = make_job()
            wait_until(partial(is_sent, client, job), "the job is sent")
        assert not silent_clocks(running, beyond_seconds=15)
    assert not client.exists("celeriac-maintenance")


@pytest.fixture
def watching_api(database_url: str, redis_url: str) -> Any:
    with ApiServer(
        Settings(database_url=database_url, redis_url=redis_url, maintenance_silence_seconds=SILENCE_SECONDS)
    ) as api:
        yield api


def upkeep_of(api: ApiServer) -> str:
    answer = httpx.get(f"{api.url}/health", timeout=SECONDS).json()
    assert answer["maintenance"]["status"] == "ok" or answer["status"] != "ok"
    return str(answer["maintenance"]["status"])


def test_a_process_that_is_frozen_or_killed_is_missed_unless_another_ticks(
    servers: Servers, watching_api: ApiServer
) -> None:
    wait_until(lambda: upkeep_of(watching_api) == "silent", "that none ever ticked is seen")
    in_a_hurry = (FAULTY, "none")
    with maintaining(*servers, program=in_a_hurry) as running:
        running.wait_until_ready()
        wait_until(lambda: upkeep_of(watching_api) == "ok", "it is seen to tick")
        running.send(signal.SIGSTOP)
        wait_until(lambda: upkeep_of(watching_api) == "silent", "that it is frozen is seen")
        finding = 'celeriac_maintenance_findings{label="janitor",name="silent_clocks"} 1.0'
        wait_until(lambda: finding in httpx.get(f"{watching_api.url}/metrics", timeout=SECONDS).text, "it is a finding")
        with maintaining(*servers, program=in_a_hurry) as other:
            other.wait_until_ready()
            wait_until(lambda: upkeep_of(watching_api) == "ok", "another one does its work")
        wait_until(lambda: upkeep_of(watching_api) == "silent", "that the other was killed is seen")
        running.send(signal.SIGCONT)
        wait_until(lambda: upkeep_of(watching_api) == "ok", "it goes on")


@pytest.mark.parametrize(
    ("fault", "clock"),
    [
        ("batches hang", "batches"),
        ("batches fail", "batches"),
        ("batches panic", "batches"),
        ("webhooks die", "webhooks"),
    ],
)
def test_a_clock_that_does_not_tick_is_seen_and_stops_no_other(
    servers: Servers, watching_api: ApiServer, client: redis.Redis, make_job: MakeJob, fault: str, clock: str
) -> None:
    with maintaining(*servers, program=(FAULTY, fault), maintenance_silence_seconds=SILENCE_SECONDS) as running:
        running.wait_until_ready()

        def answer_of_api() -> dict[str, Any]:
            answer: dict[str, Any] = httpx.get(f"{watching_api.url}/health", timeout=SECONDS).json()
            return answer

        wait_until(lambda: silent_clocks(running, beyond_seconds=SILENCE_SECONDS) == {clock}, "it alone is silent")
        wait_until(lambda: running.health()[0] == 503, "its own health check fails")
        job = make_job()
        wait_until(partial(is_sent, client, job), "the job is sent")
        wait_until(lambda: answer_of_api()["maintenance"]["status"] == "silent", "the API misses it")
        assert answer_of_api()["status"] == "degraded"
        metrics = httpx.get(f"{running.url}/metrics", timeout=SECONDS).text
        assert f'celeriac_maintenance_seconds_since_last_tick{{clock="{clock}"}}' in metrics
        assert running.terminate() == (1 if fault == "batches hang" else 0), running.log


def test_a_port_that_is_taken_is_said_in_one_line(servers: Servers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with maintaining(*servers, maintenance_port=port) as running:
            assert running.process.wait() == 1
            assert running.log.strip().splitlines()[-1].startswith(f"Error: CELERIAC_MAINTENANCE_PORT is {port}: ")
            assert "Traceback" not in running.log


def test_a_database_that_does_not_answer_is_said_once_with_what_to_do(tmp_path: Path, redis_url: str) -> None:
    with maintaining(tmp_path, "postgresql://nobody@127.0.0.1:1/none", redis_url) as running:
        wait_until(lambda: "start everything with `celeriac up`" in running.log, "it is said")
        assert running.health()[1]["status"] == "ok", "it has not been silent for long"
        assert running.terminate() == 0
    assert running.log.count("maintenance is waiting for its database") == 1
