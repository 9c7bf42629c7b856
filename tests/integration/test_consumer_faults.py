"""The consumer when the broker goes away, forgets, refuses or stalls, and when workers are killed."""

import os
import signal
from functools import partial
from typing import Any

import pytest
import redis

from domain.jobs import external_id
from local.servers import EmbeddedRedis
from tasks.app import make_app
from tests.integration.consumer_harness import QUEUE, EventLog, MakePlant, Plant, events, make_plant
from tests.waiting import SECONDS, wait_until

__all__ = ["events", "make_plant"]


def connections(plant: Plant) -> set[str]:
    """Those that workers have to the broker."""
    return {client["id"] for client in plant.client.client_list() if client["name"] == "celeriac"}


def has_more_claims(plant: Plant, num_claims: int) -> bool:
    return (plant.folder / "ledger").read_bytes().count(b"claimed") > num_claims


def wait_for_another_connection(plant: Plant, before: set[str]) -> None:
    wait_until(lambda: len(connections(plant) - before) >= 3, "the worker is connected again")


def test_cut_connections_lose_and_repeat_nothing(make_plant: MakePlant, events: EventLog) -> None:
    """Stock Celery requeues all it holds and starts every running job a second time; the events of those get lost."""
    plant = make_plant(num_slots=4, lookahead=2)
    plant.start_worker()
    job_ids = plant.send(10)
    plant.wait_for("claimed", job_ids[:4])
    for _ in range(3):
        before = connections(plant)
        plant.drop_connections()
        wait_for_another_connection(plant, before)
    assert plant.num_waiting() + plant.num_unacked() == 6
    assert 'File "' not in plant.log()  # each loss is told in a line, without the frames of Celery

    plant.end_all()
    plant.wait_for("completed", job_ids)
    assert len(plant.jobs("claimed")) == 10
    wait_until(lambda: all("succeeded" in events.of(job_id) for job_id in job_ids), "every end is told")
    for job_id in job_ids:
        assert events.of(job_id).count("started") == 1
    wait_until(plant.is_broker_empty, "all messages are acked")


def test_jobs_go_on_while_the_broker_is_down(make_plant: MakePlant, redis_server: EmbeddedRedis) -> None:
    """Messages in hand need SQL alone to be used; only their acks wait for the broker."""
    plant = make_plant(num_slots=2, lookahead=2)
    worker = plant.start_worker()
    job_ids = plant.send(6)
    plant.wait_for("claimed", job_ids[:2])
    wait_until(lambda: plant.num_unacked() == 2, "two are looked ahead")
    redis_server.stop()
    plant.end_all()
    plant.wait_for("completed", job_ids[:4])

    redis_server.start()
    plant.wait_for("completed", job_ids)
    assert len(plant.jobs("claimed")) == 6
    wait_until(plant.is_broker_empty, "the late acks arrived")
    assert worker.poll() is None


def test_an_emptied_broker_costs_messages_and_no_job(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=2, lookahead=2)
    plant.start_worker()
    held, lost = plant.send(4), plant.send(2)
    plant.wait_for("claimed", held[:2])
    wait_until(lambda: plant.num_unacked() == 2, "two are looked ahead")
    plant.client.flushall()
    plant.end_all()
    plant.wait_for("completed", held)
    assert not {external_id(job_id) for job_id in lost} & set(plant.jobs("claimed"))
    plant.send_messages(lost)  # as whoever finds some missing does
    plant.wait_for("completed", lost)


def test_a_killed_worker_loses_no_message(make_plant: MakePlant) -> None:
    """At full pull speed: for every job that was not claimed there is a message in a queue, or unacked."""
    plant = make_plant(num_slots=16, lookahead=16)
    plant.send(2000)
    for kill in range(3):
        worker = plant.start_worker(f"w{kill}", job_seconds=0)
        num_claimed = len(plant.jobs("claimed"))
        wait_until(partial(has_more_claims, plant, num_claimed + 50), "it pulls")
        plant.kill(worker)
    assert 0 < plant.num_queued() <= plant.num_waiting() + plant.num_unacked()
    assert plant.client.hlen("unacked") == plant.client.zcard("unacked_index")


def test_a_draining_worker_parks_no_message(make_plant: MakePlant) -> None:
    """Stock leaves a message in the socket of a pending pop when credit falls to zero: in no queue, and unknown."""
    plant = make_plant()
    worker = plant.start_worker()
    assert plant.inspect("engine_drain") == {"ok": "draining"}
    plant.send(3)
    assert plant.num_waiting() == 3
    plant.kill(worker)
    assert plant.num_waiting() == 3


def test_lookahead_of_a_killed_worker_comes_back(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=1, lookahead=2)
    worker = plant.start_worker("one")
    job_ids = plant.send(3)
    plant.wait_for("claimed", job_ids[:1])
    wait_until(lambda: plant.num_unacked() == 2, "two are looked ahead")
    plant.kill(worker)
    tags: Any = plant.client.zrange("unacked_index", 0, -1)
    for tag in tags:
        plant.client.zincrby("unacked_index", -61, tag)  # a minute passes
    plant.start_worker("two", job_seconds=0)
    plant.wait_for("completed", job_ids[1:])


def test_a_tool_with_another_visibility_timeout_repeats_no_job(make_plant: MakePlant) -> None:
    """`celery -b URL inspect` restores what looks abandoned to it. Running jobs are acked, so nothing looks so."""
    plant = make_plant(num_slots=2, lookahead=2)
    plant.start_worker("one")
    job_ids = plant.send(4)
    plant.wait_for("claimed", job_ids[:2])
    wait_until(lambda: plant.num_unacked() == 2, "two are looked ahead")
    tool = make_app(plant.settings)
    tool.conf.broker_transport_options = {"visibility_timeout": 0, "unacked_restore_throttle": 1}
    for _ in range(2):
        assert tool.control.ping(timeout=SECONDS, limit=1)
    tool.close()

    plant.start_worker("two")
    plant.end_all()
    plant.wait_for("completed", job_ids)
    wait_until(plant.is_broker_empty, "all messages are acked")
    assert len(plant.jobs("claimed")) == 4


def test_a_queue_cancelled_and_added_again_is_served_after_a_reconnect(make_plant: MakePlant) -> None:
    plant = make_plant()
    plant.start_worker(job_seconds=0)
    plant.inspect("cancel_consumer", queue=QUEUE)
    plant.inspect("add_consumer", queue=QUEUE)
    before = connections(plant)
    plant.drop_connections()
    wait_for_another_connection(plant, before)
    plant.wait_for("completed", plant.send(3))


def test_a_consumer_that_stopped_consuming_connects_again(make_plant: MakePlant) -> None:
    plant = make_plant()
    plant.start_worker(job_seconds=0, freeze=1)
    job_ids = plant.send(3)
    plant.wait_for("completed", job_ids)
    assert "has room but has taken no jobs" in plant.log()


def test_a_full_broker_is_survived(make_plant: MakePlant) -> None:
    """What is in the queues is claimed and acked also when Redis takes nothing new; a worker that starts waits."""
    plant = make_plant(num_slots=2, lookahead=1)
    worker = plant.start_worker()
    job_ids = plant.send(10)
    plant.wait_for("claimed", job_ids[:2])
    plant.client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.ResponseError, match="OOM"):
            plant.send_messages(job_ids[:1])
        plant.end_all()
        plant.wait_for("completed", job_ids)
        wait_until(plant.is_broker_empty, "all messages are acked")
        late_worker = plant.start_worker("late", wait=False)
        wait_until(lambda: "used memory > 'maxmemory'" in plant.log("late"), "the late worker was refused")
    finally:
        plant.client.config_set("maxmemory", "0")
    wait_until(lambda: ["ready", "late@test"] in plant.ledger(), "the late worker is ready")
    plant.wait_for("completed", plant.send(3))
    assert (worker.poll(), late_worker.poll()) == (None, None)


def test_a_failover_is_survived(make_plant: MakePlant) -> None:
    """A primary that became a replica answers READONLY, which Celery takes for a fatal error by default."""
    plant = make_plant(num_slots=2, lookahead=1)
    worker = plant.start_worker()
    job_ids = plant.send(3)
    plant.wait_for("claimed", job_ids[:2])
    plant.client.replicaof("127.0.0.1", 1)
    try:
        plant.end_all()
        plant.wait_for("completed", job_ids)
        wait_until(lambda: "read only replica" in plant.log(), "the worker was refused")
    finally:
        plant.client.replicaof("NO", "ONE")
    plant.wait_for("completed", plant.send(3))
    wait_until(plant.is_broker_empty, "all messages are acked")
    assert worker.poll() is None


def test_a_frozen_worker_finds_its_way_back(make_plant: MakePlant) -> None:
    """Paused while its connections are cut: nothing in its hands may get lost or start twice."""
    plant = make_plant(num_slots=2, lookahead=2)
    worker = plant.start_worker()
    job_ids = plant.send(6)
    plant.wait_for("claimed", job_ids[:2])
    os.kill(worker.pid, signal.SIGSTOP)
    plant.drop_connections()
    os.kill(worker.pid, signal.SIGCONT)
    plant.end_all()
    plant.wait_for("completed", job_ids)
    assert len(plant.jobs("claimed")) == 6
    wait_until(plant.is_broker_empty, "all messages are acked")
