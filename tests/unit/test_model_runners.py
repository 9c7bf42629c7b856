"""A worker with several models: which failures of one of them end it."""

import signal
from collections.abc import Iterator
from time import monotonic
from typing import Any
from uuid import UUID, uuid4

import pytest

from domain.catalog import ModelSpec
from domain.jobs import Lane
from gpu_worker.engine_process.supervisor import EngineExit
from gpu_worker.intake import Offers
from gpu_worker.quarantine import QuarantineRules
from gpu_worker.residency import ModelMemory
from gpu_worker.runner import RunnerThread
from gpu_worker.serving import ModelRunners
from gpu_worker.threads import RunnerEvent, RunnerEventKind, WorkerFailure
from settings import Settings
from tests.runner_parts import make_claimed

CRASHES = WorkerFailure("the engine keeps crashing", is_of_model=True)
CANNOT_LOAD = WorkerFailure("the model cannot be loaded", is_lasting=True, is_of_model=True)
BUG = WorkerFailure("the runner failed")


class Runner:
    """What `ModelRunners` knows of a JobRunner's health."""

    def __init__(self, **given: Any) -> None:
        self.is_healthy = True
        self.leaves_reason = False
        self._on_unhealthy = given["on_unhealthy"]

    def fail(self, failure: WorkerFailure) -> None:
        self.is_healthy, self.leaves_reason = False, True
        self._on_unhealthy(failure)

    def forget_failure(self) -> None:
        self.leaves_reason = False

    def stop(self, *, release: bool) -> None:
        assert release


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


def test_only_a_worker_that_ends_of_it_leaves_the_reason() -> None:
    for failed, is_left in (([CANNOT_LOAD], False), ([CANNOT_LOAD, BUG], True)):
        runners, both, _ = start()
        for runner, failure in zip(both, failed, strict=False):
            runner.fail(failure)
        runners.stop(release=True)
        assert both[0].leaves_reason is is_left


class TestAModelThatWasGivenUp:
    @pytest.fixture
    def events(self) -> list[RunnerEvent]:
        return []

    @pytest.fixture
    def runner(self, events: list[RunnerEvent], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunnerThread]:
        """Without its threads: calls of the storage are not made."""
        runner = RunnerThread(
            spec=ModelSpec(id="one", path="none", backend="fake", max_model_len=64),
            settings=Settings(),
            owner=uuid4(),
            hostname="h",
            offers=Offers(),
            on_event=events.append,
            on_unhealthy=lambda failure: None,
            quarantine_rules=QuarantineRules(),
            memory=ModelMemory({"one": 0}),
        )
        monkeypatch.setattr(runner._storage_thread, "submit", lambda *calls: None)
        yield runner
        runner._storage.close()
        runner.mailbox.close()

    @pytest.mark.parametrize("lane", list(Lane))
    def test_keeps_no_job_that_was_being_claimed_and_no_offer(
        self, runner: RunnerThread, events: list[RunnerEvent], monkeypatch: pytest.MonkeyPatch, lane: Lane
    ) -> None:
        calls: list[Any] = []
        released: list[UUID] = []
        monkeypatch.setattr(runner._storage_thread, "submit", lambda call, *_: calls.append(call))
        monkeypatch.setattr(runner._storage, "release", released.extend)
        monkeypatch.setattr(runner._storage, "fail", lambda report: None)
        job, ticket_id = make_claimed(lane=lane), uuid4()
        runner._give_up(CRASHES)
        runner._offers.add(ticket_id)
        calls.clear()
        runner.mailbox.post(lambda: runner._batch.admit([job], monotonic()))
        runner._turn()
        assert not runner._batch
        assert runner._quarantine.job is None
        for call in calls:
            call(False)
        assert released == [job.id]
        assert RunnerEvent(RunnerEventKind.REFUSED, ticket_id) in events
        assert not runner._offers

    def test_is_tried_again_as_if_it_had_never_crashed(self, runner: RunnerThread) -> None:
        rules = QuarantineRules()
        for _ in range(rules.max_unrelated_crashes):
            runner._quarantine.judge(EngineExit(-signal.SIGSEGV, False, True, []), [])
        assert runner._quarantine.is_worker_at_fault
        runner._give_up(CRASHES)
        runner._turn()
        assert not runner.is_healthy
        runner._retry_at = monotonic()
        runner._turn()
        assert runner.is_healthy
        for _ in range(rules.max_unrelated_crashes - 1):
            runner._quarantine.judge(EngineExit(-signal.SIGSEGV, False, True, []), [])
        assert not runner._quarantine.is_worker_at_fault


def start() -> tuple[ModelRunners, list[Any], list[WorkerFailure]]:
    failures: list[WorkerFailure] = []
    models = [ModelSpec(id=name, path="none", backend="fake", max_model_len=64) for name in ("one", "two")]
    memory = ModelMemory({"one": 0, "two": 0})
    make: Any = Runner
    runners = ModelRunners(
        make, models, memory, hostname="h", on_event=lambda event: None, on_unhealthy=failures.append
    )
    return runners, list(runners.by_queue.values()), failures
