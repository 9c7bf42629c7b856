"""How a worker ends: drained with control alive, or at once; and what Celery's own shutdown would have done."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domain.jobs import external_id
from local.lock import UpLock
from local.servers import EmbeddedRedis
from settings import FOUND
from tests.integration.consumer_harness import QUEUE, EventLog, MakePlant, Plant, events, make_plant
from tests.prepared import PreparedProcess
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

__all__ = ["events", "make_plant"]

Worker = PreparedProcess


def busy_worker(make_plant: MakePlant, drain_seconds: float = 30) -> tuple[Plant, Worker, list[str]]:
    """Two jobs run, two are looked ahead, one waits; their external ids in this order."""
    plant = make_plant(num_slots=2, lookahead=2)
    worker = plant.start_worker(drain_seconds=drain_seconds)
    job_ids = plant.send(5)
    plant.wait_for("claimed", job_ids[:2])
    wait_until(lambda: plant.num_unacked() == 2, "two are looked ahead")
    return plant, worker, [external_id(job_id) for job_id in job_ids]


def waiting(plant: Plant, job_ids: list[str]) -> list[str]:
    """The jobs whose messages wait in the queue, the next one first."""
    messages = [str(message) for message in reversed(plant.client.lrange(QUEUE, 0, -1))]
    return [job_id for message in messages for job_id in job_ids if job_id in message]


def has_ended(worker: Worker) -> Callable[[], bool]:
    return lambda: worker.poll() is not None


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_lets_running_jobs_end_with_control_alive(
    make_plant: MakePlant, events: EventLog, signal_number: signal.Signals
) -> None:
    plant, worker, job_ids = busy_worker(make_plant)
    worker.send_signal(signal_number)
    wait_until(lambda: waiting(plant, job_ids) == job_ids[2:], "the look-ahead is back at the head, in order")

    assert f"draining on {signal_number.name}, then exiting" in plant.log()
    assert plant.num_unacked() == 0
    assert plant.inspect("engine_stats")["draining"]
    assert len(plant.inspect("active")) == 2
    num_heartbeats = sum(event["type"] == "worker-heartbeat" for event in events.all())
    plant.app.control.revoke(job_ids[0], terminate=True)
    wait_until(lambda: plant.jobs("cancelled") == job_ids[:1], "a running job is cancelled during the drain")
    wait_until(
        lambda: sum(event["type"] == "worker-heartbeat" for event in events.all()) > num_heartbeats,
        "another heartbeat arrived",
    )
    assert worker.poll() is None

    plant.end_all()
    wait_until(has_ended(worker), "the worker left")
    assert worker.returncode == 0
    assert plant.jobs("completed") == job_ids[1:2]
    assert waiting(plant, job_ids) == job_ids[2:]
    assert events.all()[-1]["type"] == "worker-offline"
    assert "task-succeeded" in [event["type"] for event in events.all()]


def test_what_does_not_end_in_time_is_released(make_plant: MakePlant) -> None:
    plant, worker, job_ids = busy_worker(make_plant, drain_seconds=0.3)
    worker.send_signal(signal.SIGTERM)
    wait_until(has_ended(worker), "the worker left")
    assert worker.returncode == 0
    assert plant.jobs("released") == job_ids[:2]
    assert waiting(plant, job_ids) == job_ids[2:]


@pytest.mark.parametrize("signals", [[signal.SIGQUIT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_quit_releases_everything_at_once(make_plant: MakePlant, signals: list[signal.Signals]) -> None:
    """Celery would cancel its requests on SIGQUIT, which for us would be the users' jobs."""
    plant, worker, job_ids = busy_worker(make_plant)
    for signal_number in signals:
        worker.send_signal(signal_number)
        wait_until(lambda: "draining" in plant.log() or "exiting" in plant.log(), "the signal is heard")
    wait_until(has_ended(worker), "the worker left", seconds=20)  # the drain would take 30
    assert f"exiting immediately on {signals[-1].name}" in plant.log()
    assert plant.jobs("released") == job_ids[:2]
    assert plant.jobs("cancelled") == []
    assert waiting(plant, job_ids) == job_ids[2:]
    assert plant.num_unacked() == 0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_worker_leaves_also_when_the_broker_is_down(
    make_plant: MakePlant, redis_server: EmbeddedRedis, signal_number: signal.Signals
) -> None:
    plant, worker, job_ids = busy_worker(make_plant)
    redis_server.stop()
    plant.end_all()
    worker.send_signal(signal_number)
    wait_until(has_ended(worker), "the worker left")
    assert set(plant.jobs("completed")) | set(plant.jobs("released")) >= set(job_ids[:2])


def test_celery_control_drains_and_resumes(make_plant: MakePlant) -> None:
    plant, worker, job_ids = busy_worker(make_plant)
    assert plant.inspect("engine_drain") == {"ok": "draining"}
    wait_until(lambda: waiting(plant, job_ids) == job_ids[2:], "the look-ahead is back")
    plant.end_all()
    wait_until(lambda: sorted(plant.jobs("completed")) == sorted(job_ids[:2]), "running jobs ended")
    assert plant.inspect("engine_stats")["credit"] == 0
    assert "draining on the engine_drain command; running jobs have" in plant.log()

    assert plant.inspect("engine_resume") == {"ok": "taking jobs"}
    wait_until(lambda: sorted(plant.jobs("completed")) == sorted(job_ids), "it takes jobs again")
    assert worker.poll() is None


def test_the_documented_commands_are_known_and_answered(make_plant: MakePlant) -> None:
    """`celery -A tasks.app`, as docs/operations.md spells them, with a plain Celery worker beside the GPU worker."""
    plant, worker, _ = busy_worker(make_plant)
    plain = plant.start_plain_worker()
    for command in ("inspect engine_stats", "control engine_drain", "control engine_resume"):
        # With as many destinations as there are workers, it waits for their answers, not for the time to pass.
        done = plant.celery(*command.split(), "--destination=one@test,plain@test", "--timeout=60", "--json")
        told = json.loads(done.stdout)
        answer = told if isinstance(told, dict) else {name: words for one in told for name, words in one.items()}
        assert answer["one@test"].keys() & {"ok", "credit"}, done.stdout
        assert "no engine" in answer["plain@test"]["error"]
    assert worker.poll() is None
    assert plain.poll() is None
    assert "Traceback" not in plant.log("plain")


@pytest.mark.parametrize(("command", "arguments"), [("shutdown", {}), ("engine_drain", {"exit": 1})])
def test_a_shutdown_by_control_drains(make_plant: MakePlant, command: str, arguments: dict[str, Any]) -> None:
    """Flower's "Shut down" button."""
    plant, worker, job_ids = busy_worker(make_plant)
    assert "ok" in plant.inspect(command, **arguments)
    wait_until(lambda: waiting(plant, job_ids) == job_ids[2:], "the look-ahead is back")
    assert worker.poll() is None
    assert f"draining on the {command} command, then exiting" in plant.log()
    plant.end_all()
    wait_until(has_ended(worker), "the worker left")
    assert sorted(plant.jobs("completed")) == sorted(job_ids[:2])


def test_a_worker_that_never_reached_the_broker_can_be_stopped(
    make_plant: MakePlant, redis_server: EmbeddedRedis
) -> None:
    plant = make_plant()
    redis_server.stop()
    worker = plant.start_worker(wait=False)
    wait_until(lambda: "Cannot connect" in plant.log(), "it tries")
    os.kill(worker.pid, signal.SIGTERM)
    wait_until(has_ended(worker), "the worker left")


def test_a_worker_whose_engine_is_broken_leaves_with_an_error(make_plant: MakePlant) -> None:
    plant, worker, job_ids = busy_worker(make_plant)
    (plant.folder / "engine_is_broken").touch()
    wait_until(has_ended(worker), "the worker left")
    assert worker.returncode == 1
    assert plant.jobs("released") == job_ids[:2]
    assert waiting(plant, job_ids) == job_ids[2:]


def test_a_worker_without_a_broker_says_once_what_to_do(make_plant: MakePlant, redis_server: EmbeddedRedis) -> None:
    plant = make_plant()
    redis_server.stop()
    worker = plant.start_worker(wait=False)
    wait_until(lambda: "`celeriac up`" in plant.log(), "it says what to do")
    num_tries = plant.log().count("Cannot connect")
    wait_until(lambda: plant.log().count("Cannot connect") > num_tries, "it goes on trying")
    assert plant.log().count("`celeriac up`") == 1
    worker.kill()


def test_a_worker_follows_the_up_of_its_folder_to_other_servers(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `settings_here` leaves the environment of a worker whose servers it found in up.json."""
    monkeypatch.setenv("CELERIAC_DATA_DIR", str(tmp_path))
    monkeypatch.setenv(FOUND, "redis_url")
    plant = Plant(tmp_path, "redis://127.0.0.1:1/0")
    lock = UpLock(tmp_path).take()
    try:
        worker = plant.start_worker(wait=False)
        wait_until(lambda: "Cannot connect" in plant.log(), "it looks at the old place")
        lock.write({"pid": 1, "redis_url": redis_url})
        wait_until(lambda: ["ready", "one@test"] in plant.ledger(), "it is connected to the new one")
        assert worker.poll() is None
    finally:
        plant.close()
        lock.release()
