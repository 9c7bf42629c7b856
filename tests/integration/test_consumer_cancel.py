"""Cancel and the story of a job, as Flower and `celery control` see them."""

import pytest

from domain.jobs import external_id, new_id
from tests.integration.consumer_harness import (
    EventLog,
    MakePlant,
    Plant,
    events,
    make_plant,
    plant,
    plant_events,
    shared_plant,
)
from tests.waiting import wait_until

__all__ = ["events", "make_plant", "plant", "plant_events", "shared_plant"]


@pytest.mark.parametrize(
    ("status", "last_event"),
    [("completed", "succeeded"), ("failed", "failed"), ("cancelled", "revoked"), ("expired", "revoked")],
)
def test_events_tell_how_a_job_ended(plant: Plant, plant_events: EventLog, status: str, last_event: str) -> None:
    (job_id,) = plant.send(1)
    plant.wait_for("claimed", [job_id])
    plant.end(job_id, status)
    wait_until(lambda: plant_events.of(job_id) == ["received", "started", last_event], "the story is told")

    end = next(event for event in plant_events.all() if event["type"] == f"task-{last_event}")
    if status == "completed":
        assert (end["result"], end["runtime"] > 0) == ("a completed job", True)
    if status == "failed":
        assert end["exception"] == "a failed job"
    if last_event == "revoked":
        assert end["expired"] is (status == "expired")
    assert plant.inspect("active") == []
    wait_until(plant.is_broker_empty, "the message is acked")


def test_a_running_job_is_revoked_when_it_has_stopped(plant: Plant, plant_events: EventLog) -> None:
    *others, running, next_one = plant.send(3)
    plant.wait_for("claimed", [*others, running])
    plant.app.control.revoke(external_id(running), terminate=True)
    plant.wait_for("cancelled", [running])
    plant.wait_for("claimed", [next_one])  # its slot is free
    wait_until(lambda: plant_events.of(running) == ["received", "started", "revoked"], "it is revoked once")


def test_a_plain_revoke_leaves_a_running_job_alone(plant: Plant, plant_events: EventLog) -> None:
    (job_id,) = plant.send(1)
    plant.wait_for("claimed", [job_id])
    plant.inspect("revoke", task_id=external_id(job_id))
    plant.end(job_id)
    wait_until(lambda: plant_events.of(job_id) == ["received", "started", "succeeded"], "it ends as usual")


@pytest.mark.parametrize("terminate", [False, True])
def test_a_job_that_waits_is_revoked_before_it_starts(plant: Plant, plant_events: EventLog, terminate: bool) -> None:
    *running, ahead = plant.send(3)
    plant.wait_for("claimed", running)
    wait_until(lambda: plant.num_unacked() == 1, "a message is looked ahead")
    plant.inspect("revoke", task_id=external_id(ahead), terminate=terminate)
    plant.wait_for("cancelled", [ahead])  # at once, in SQL
    for job_id in running:
        plant.end(job_id)
    wait_until(plant.is_broker_empty, "its message is acked")
    assert plant_events.of(ahead) == []
    assert external_id(ahead) not in plant.jobs("claimed")
    assert "as revoked in backend" not in plant.log()


def test_a_revoke_of_the_api_makes_no_worker_write(plant: Plant) -> None:
    """It has cancelled the jobs in SQL. One that waits is left to that; one that runs is stopped."""
    *running, waiting = plant.send(3)
    plant.wait_for("claimed", running)
    plant.inspect("revoke", task_id=[external_id(waiting), external_id(running[0])], terminate=True, is_stored=True)
    plant.wait_for("cancelled", running[:1])
    plant.wait_for("claimed", [waiting])


def test_a_revoke_of_what_is_no_job_does_nothing(plant: Plant) -> None:
    plant.inspect("revoke", task_id="not-a-job", terminate=True)
    plant.inspect("revoke", task_id=external_id(new_id()))
    plant.wait_for("claimed", plant.send(1))


def test_a_released_job_is_shown_as_waiting_again(make_plant: MakePlant, events: EventLog) -> None:
    plant = make_plant()
    worker = plant.start_worker(drain_seconds=0)
    (job_id,) = plant.send(1)
    plant.wait_for("claimed", [job_id])
    worker.terminate()
    worker.wait()
    assert events.of(job_id) == ["received", "started", "retried"]


def test_a_queued_job_is_told_in_the_order_things_happened(make_plant: MakePlant, events: EventLog) -> None:
    """Celery's hub keeps callbacks in a set: without our own queue an end may be told before its start."""
    plant = make_plant(num_slots=8, lookahead=8)
    plant.start_worker(job_seconds=0)
    job_ids = plant.send(300)
    plant.wait_for("completed", job_ids)
    wait_until(lambda: all(events.of(job_id)[-1:] == ["succeeded"] for job_id in job_ids), "every end is told")
    for job_id in job_ids:
        assert events.of(job_id) == ["received", "started", "succeeded"]
    assert events.num_messages < len(events.all()) / 2  # they leave in batches
