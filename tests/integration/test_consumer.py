"""The consumer in peace: credit, sharing, order, and what it tells Flower."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from domain.ids import external_id
from tests.integration.consumer_harness import QUEUE, Plant, wait_until

MakePlant = Callable[..., Plant]


@pytest.fixture
def make_plant(tmp_path: Path, redis_url: str) -> Iterator[MakePlant]:
    plants: list[Plant] = []

    def make(**options: int) -> Plant:
        plants.append(Plant(tmp_path, redis_url, **options))
        return plants[-1]

    yield make
    for plant in plants:
        plant.close()


def test_the_worker_holds_no_more_than_its_slots_and_the_lookahead(make_plant: MakePlant) -> None:
    plant = make_plant(num_slots=4, lookahead=2)
    plant.start_worker(job_seconds=0.02)
    job_ids = plant.send(200)
    plant.wait_for("completed", job_ids)

    assert plant.inspect("engine_stats")["max_held"] == 6
    assert len(plant.jobs("claimed")) == 200
    wait_until(plant.is_broker_empty, "all messages are acked")
