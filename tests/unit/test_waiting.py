"""Why a queued job waits, for every kind of job beside every kind of worker."""

from itertools import combinations

import pytest

from api.queue_monitor import UNREMARKABLE
from api.reasons import ADVICE
from domain.jobs import Lane, LiveWorker, ModelService, WaitingFor, WaitingJob, WorkerState, waiting_for

READY, LOADING = LiveWorker(WorkerState.READY, "new"), LiveWorker(WorkerState.LOADING, "new")
DRAINING, UNLOADED = LiveWorker(WorkerState.DRAINING, "new"), LiveWorker(WorkerState.UNLOADED, "new")
FRESH, ISOLATED = WaitingJob(), WaitingJob(lane=Lane.ISOLATED)
BEGUN, OLD = WaitingJob(revision="new"), WaitingJob(revision="old")
LINE, DELAYED = WaitingJob(is_held_line=True), WaitingJob(is_delayed=True)
FOLLOWER = WaitingJob(is_delayed=True, is_following=True)
PAUSED = WaitingJob(revision="new", is_paused=True)
JOBS = (FRESH, ISOLATED, BEGUN, OLD, LINE, DELAYED, PAUSED)


@pytest.mark.parametrize("job", JOBS)
def test_without_a_worker_every_job_waits_for_one(job: WaitingJob) -> None:
    assert waiting_for(job, ModelService()) is WaitingFor.WORKER


@pytest.mark.parametrize("job", JOBS)
def test_an_unloaded_model_is_a_pause_whoever_lives(job: WaitingJob) -> None:
    for worker in (READY, LOADING, DRAINING, UNLOADED):
        assert waiting_for(job, ModelService([worker], is_loaded=False)) is WaitingFor.PAUSE


def test_there_is_advice_for_whatever_is_found() -> None:
    assert set(WaitingFor) - UNREMARKABLE == set(ADVICE)


@pytest.mark.parametrize("job", [FRESH, ISOLATED, BEGUN, LINE, DELAYED, PAUSED])
@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([LOADING], WaitingFor.MODEL_LOAD),
        ([UNLOADED], WaitingFor.MODEL_LOAD),  # told to load, and has not heard it yet
        ([DRAINING], WaitingFor.PAUSE),
        ([DRAINING, LOADING], WaitingFor.MODEL_LOAD),
    ],
)
def test_workers_that_take_no_jobs_are_told_apart(
    job: WaitingJob, workers: list[LiveWorker], reason: WaitingFor
) -> None:
    assert waiting_for(job, ModelService(workers)) is reason


def test_a_job_with_output_waits_for_its_revision_though_others_are_ready() -> None:
    assert waiting_for(OLD, ModelService([READY, LOADING])) is WaitingFor.REVISION
    assert waiting_for(OLD, ModelService([READY, LiveWorker(WorkerState.LOADING, "old")])) is WaitingFor.MODEL_LOAD
    assert waiting_for(OLD, ModelService([READY, LiveWorker(WorkerState.READY, "old")])) is WaitingFor.SLOTS
    assert waiting_for(OLD, ModelService([LiveWorker(WorkerState.READY, None)])) is WaitingFor.SLOTS


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (FRESH, WaitingFor.SLOTS),
        (BEGUN, WaitingFor.SLOTS),
        (ISOLATED, WaitingFor.ISOLATION),
        (LINE, WaitingFor.LIMIT),
        (DELAYED, WaitingFor.LIMIT),
        (FOLLOWER, WaitingFor.SAME_REQUEST),
        (PAUSED, WaitingFor.TURN),
    ],
)
def test_beside_a_ready_worker_it_is_the_job_that_decides(job: WaitingJob, reason: WaitingFor) -> None:
    for others in (*combinations((LOADING, DRAINING, UNLOADED), 2), ()):
        assert waiting_for(job, ModelService([READY, *others], is_batch_share_taken=True)) is reason
    assert waiting_for(LINE, ModelService([READY])) is WaitingFor.SLOTS
