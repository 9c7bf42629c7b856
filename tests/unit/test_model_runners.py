"""A worker with several models: which failures of one of them end it."""

from typing import Any

import pytest

from domain.catalog import ModelSpec
from gpu_worker.residency import ModelMemory
from gpu_worker.serving import ModelRunners
from gpu_worker.threads import WorkerFailure

CRASHES = WorkerFailure("the engine keeps crashing", is_of_model=True)
CANNOT_LOAD = WorkerFailure("the model cannot be loaded", is_lasting=True, is_of_model=True)
BUG = WorkerFailure("the runner failed")


class Runner:
    """What `ModelRunners` knows of a JobRunner's health."""

    def __init__(self, **given: Any) -> None:
        self.is_healthy = True
        self._on_unhealthy = given["on_unhealthy"]

    def fail(self, failure: WorkerFailure) -> None:
        self.is_healthy = False
        self._on_unhealthy(failure)


@pytest.mark.parametrize("failure", [CRASHES, CANNOT_LOAD])
def test_a_worker_goes_on_without_a_model_as_long_as_others_are_served(failure: WorkerFailure) -> None:
    runners, (one, two), failures = start()
    one.fail(failure)
    assert failures == []
    one.is_healthy = True  # it was tried again
    two.fail(failure)
    assert failures == []
    one.fail(failure)
    assert failures == [failure]
    assert len(runners.by_queue) == 2


def test_a_failure_that_is_not_the_models_ends_the_worker() -> None:
    _, (one, _), failures = start()
    one.fail(BUG)
    assert failures == [BUG]


def start() -> tuple[ModelRunners, list[Any], list[WorkerFailure]]:
    failures: list[WorkerFailure] = []
    models = [ModelSpec(id=name, path="none", backend="fake", max_model_len=64) for name in ("one", "two")]
    memory = ModelMemory({"one": 0, "two": 0})
    make: Any = Runner
    runners = ModelRunners(
        make, models, memory, hostname="h", on_event=lambda event: None, on_unhealthy=failures.append
    )
    return runners, list(runners.by_queue.values()), failures
