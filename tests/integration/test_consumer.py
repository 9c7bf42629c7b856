"""The consumer in peace: credit, sharing, order, drops and what `inspect` tells."""

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from domain.jobs import external_id, new_id, parse_id
from tasks.messages import GENERATE, bell_key, generate_message, priority_key
from tests.integration.consumer_harness import (
    QUEUE,
    ROOT,
    EventLog,
    MakePlant,
    Plant,
    make_plant,
    plant,
    plant_events,
    shared_plant,
)
from tests.waiting import slowness, wait_until

__all__ = ["make_plant", "plant", "plant_events", "shared_plant"]


def test_the_worker_holds_no_more_than_its_slots_and_the_lookahead(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=4, lookahead=2)
    plant.start_worker(job_seconds=0.02)
    job_ids = plant.send(200)
    plant.wait_for("completed", job_ids)

    assert plant.inspect("engine_stats")["max_held"] == 6
    assert len(plant.jobs("claimed")) == 200
    wait_until(plant.is_broker_empty, "all messages are acked")


def test_a_full_worker_leaves_the_rest_to_another_one(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=4, lookahead=2)
    plant.start_worker("one")
    job_ids = plant.send(12)
    wait_until(lambda: (plant.num_waiting(), plant.num_unacked()) == (6, 2), "the first worker is full")

    plant.start_worker("two")
    wait_until(lambda: plant.claims_by_worker() == {"one@test": 4, "two@test": 4}, "the second one has its share")
    plant.end_all()
    plant.wait_for("completed", job_ids)
    assert len(plant.jobs("claimed")) == 12


def test_lookahead_goes_to_a_worker_with_free_slots(make_plant: MakePlant) -> None:
    """A delivery must not wait for our slots while somebody else idles."""
    plant = make_plant(num_slots=2, lookahead=2)
    plant.start_worker("one")
    job_ids = plant.send(4)
    plant.wait_for("claimed", job_ids[:2])
    plant.start_worker("two")
    plant.wait_for("claimed", job_ids)
    assert plant.claims_by_worker() == {"one@test": 2, "two@test": 2}
    plant.end_all()
    plant.wait_for("completed", job_ids)
    wait_until(plant.is_broker_empty, "all messages are acked")


def test_a_full_worker_takes_nothing_while_another_has_room(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=2, lookahead=2)
    plant.start_worker("one")
    plant.wait_for("claimed", plant.send(2))
    plant.start_worker("two")
    wait_until(lambda: plant.inspect("stats")["pool"]["look-ahead"] == 0, "the full one looks ahead no more")
    job_ids = plant.send(2)
    plant.wait_for("claimed", job_ids)
    assert plant.claims_by_worker() == {"one@test": 2, "two@test": 2}
    assert "back to a worker with free slots" not in plant.log("one"), "it never had them"


def test_a_worker_that_rests_after_failed_claims_leaves_the_tickets_where_they_are(plant: Plant) -> None:
    resting = plant.folder / "resting"
    resting.touch()
    job_ids = plant.send(2)
    for _ in range(3):  # turns of its event loop
        plant.inspect("stats")
    assert (plant.jobs("refused"), plant.num_waiting()) == ([], 2)
    resting.unlink()
    plant.wait_for("claimed", job_ids)


def test_jobs_start_in_the_order_of_their_claims(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=1, lookahead=3)
    job_ids = plant.send(10)
    plant.start_worker(job_seconds=0)
    plant.wait_for("completed", job_ids)
    assert plant.jobs("claimed") == [external_id(job_id) for job_id in job_ids]


def test_a_job_that_came_late_may_be_claimed_first(plant: Plant) -> None:
    """The message of another job is enough: what it lets in is decided at the claim."""
    *running, _ = plant.send(3)
    plant.wait_for("claimed", running)
    urgent = parse_id("job_" + 26 * "0")  # the fake's order is that of the ids
    (plant.folder / "queued" / external_id(urgent)).touch()
    plant.end(running[0])
    plant.wait_for("claimed", [urgent])
    assert len(plant.jobs("claimed")) == len(set(plant.jobs("claimed")))


def test_messages_of_every_priority_are_taken(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=1, lookahead=1)
    for job_id, priority in zip(plant.queue(4), (9, 6, 0, 3), strict=True):
        plant.client.lpush(priority_key(QUEUE, priority), generate_message(job_id, QUEUE, priority=priority))
    plant.start_worker(job_seconds=0)
    wait_until(lambda: len(plant.jobs("completed")) == 4, "all have run")
    wait_until(plant.is_broker_empty, "all messages are acked")


def test_a_finished_job_frees_its_slot_at_once(make_plant: MakePlant) -> None:
    """Stock hands an ack to the next turn of the event loop, up to a second away: 30 s for these jobs."""
    plant = make_plant(num_slots=1, lookahead=0)
    plant.start_worker(job_seconds=0)
    started_at = time.monotonic()
    plant.wait_for("completed", plant.send(30))
    assert time.monotonic() - started_at < 5 * slowness()


def test_a_message_of_celerys_own_is_taken_without_a_bell(plant: Plant) -> None:
    (job_id,) = plant.queue(1)
    plant.app.send_task(GENERATE, task_id=external_id(job_id), queue=QUEUE)
    plant.wait_for("claimed", [job_id], seconds=3)


def test_a_message_without_a_job_is_acked_and_shown_to_nobody(plant: Plant, plant_events: EventLog) -> None:
    named = [new_id(), new_id()]
    plant.send_messages(named)
    wait_until(plant.is_broker_empty, "the messages are acked")
    assert plant.inspect("reserved") == []
    assert [plant_events.of(job_id) for job_id in named] == [[], []]


def test_a_second_message_of_a_running_job_is_dropped_and_the_job_stays_revocable(plant: Plant) -> None:
    (job_id,) = plant.send(1)
    plant.wait_for("claimed", [job_id])
    plant.send_messages([job_id])
    wait_until(plant.is_broker_empty, "the second message is acked")

    assert [task["id"] for task in plant.inspect("active")] == [external_id(job_id)]
    plant.app.control.revoke(external_id(job_id), terminate=True)
    plant.wait_for("cancelled", [job_id])


def test_what_is_no_message_is_dropped_and_its_neighbours_go_on(plant: Plant) -> None:
    rubbish = ["no json", "5", "[]", '{"properties": {"delivery_tag": "t"}}', '{"properties": {"delivery_tag": 7}}']
    plant.client.lpush(QUEUE, *rubbish)
    plant.app.send_task(GENERATE, task_id="no-job-id", queue=QUEUE)
    plant.app.send_task(GENERATE, task_id=external_id(new_id()), queue=QUEUE, serializer="yaml")
    plant.wait_for("claimed", plant.send(2))
    plant.end_all()
    wait_until(plant.is_broker_empty, "nothing is left behind")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (GENERATE, {"args": ["a secret prompt"]}),
        (GENERATE, {"kwargs": {"prompt": "a secret prompt"}, "task_id": "my-own-id"}),
        ("celeriac.summarise", {"args": ["a secret prompt"]}),
        ("tasks.app.infer", {"kwargs": {"prompt": "a secret prompt"}}),
    ],
)
def test_a_task_sent_by_hand_fails_where_its_sender_can_see_it(
    plant: Plant, plant_events: EventLog, name: str, arguments: dict[str, Any]
) -> None:
    sent = plant.app.send_task(name, queue=QUEUE, **arguments)

    def failures() -> list[dict[str, Any]]:
        events = plant_events.all()
        return [event for event in events if (event["type"], event.get("uuid")) == ("task-failed", sent.id)]

    wait_until(failures, "the failure is told")
    assert "POST /v1/jobs" in failures()[0]["exception"]
    wait_until(plant.is_broker_empty, "its message is gone")
    assert "refused a task that did not come from the API" in plant.log()
    assert "a secret prompt" not in plant.log()


def test_a_small_task_runs_on_the_event_loop(plant: Plant) -> None:
    plant.app.send_task("test.housekeeping", queue=QUEUE)
    wait_until(lambda: ["housekeeping"] in plant.ledger(), "the task ran")
    wait_until(plant.is_broker_empty, "its message is acked")


def test_rings_that_are_not_needed_are_cleared(plant: Plant) -> None:
    plant.client.lpush(bell_key(QUEUE), *[1] * 64)
    plant.wait_for("claimed", plant.send(1))
    wait_until(lambda: not plant.client.exists(bell_key(QUEUE)), "the bell is silent")


def test_inspect_shows_the_engine(plant: Plant) -> None:
    plant.wait_for("claimed", plant.send(4)[:2])
    wait_until(lambda: plant.num_unacked() == 1, "one is looked ahead")

    stats = plant.inspect("stats")
    assert stats["engine"].pop("metrics").startswith("http://127.0.0.1:")
    assert stats["engine"] | {"max_held": 0} == {
        "credit": 0,
        "in_hand": 1,
        "running": 2,
        "free": 0,
        "slots": 2,
        "ready": True,
        "draining": False,
        "state": "ready",
        "tokens_per_second": 0.0,
        "max_held": 0,
    }
    assert stats["pool"]["max-concurrency"] == 2
    assert stats["prefetch_count"] == 3
    assert len(plant.inspect("active")) == 2
    assert plant.inspect("reserved") == [], "nobody has the third job yet"
    assert "max_num_seqs" in plant.inspect("pool_grow", n=1)["error"]
    assert "max_num_seqs" in plant.inspect("pool_shrink", n=1)["error"]


def test_the_celery_command_knows_the_engine(plant: Plant) -> None:
    environment = os.environ | {
        "CELERIAC_REDIS_URL": plant.redis_url,
        "CELERIAC_MODELS_FILE": str(plant.settings.models_file),
    }
    command = [sys.executable, "-m", "celery", "-A", "gpu_worker.app", "inspect", "engine_stats", "--json"]
    command += ["--destination=one@test", "--timeout=60"]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout
    assert json.loads(answer)["one@test"]["slots"] == 2
