"""Why a queued job waits: said by facts of the job and of the workers that live, and never guessed."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from domain.jobs import Lane
from domain.workers import WorkerState


class WaitingFor(StrEnum):
    SLOTS = "slots"  # its turn: the slots of the workers that could run it are taken, or it is on its way to one
    WORKER = "worker"  # no worker of its model lives
    MODEL_LOAD = "model_load"  # those that could run it are loading it
    REVISION = "revision"  # it has output, and nobody serves the revision that made it
    ISOLATION = "isolation"  # it must run alone, and is let in between the others
    LIMIT = "limit"  # batches have their share of the slots, or it failed a moment ago and is tried again soon
    PAUSE = "pause"  # an admin has unloaded its model, or those that could run it take no more: they drain


#: Meant to be so: that jobs wait for these is nothing to look after.
IN_GOOD_ORDER = frozenset({WaitingFor.SLOTS, WaitingFor.LIMIT})


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """What of a queued job decides who may run it, and when."""

    lane: Lane = Lane.STANDARD
    revision: str | None = None  # that made its output; None: it has none, and any will do
    is_held_line: bool = False  # of a batch, and not let out to a worker yet
    is_delayed: bool = False  # it failed a moment ago


@dataclass(frozen=True, slots=True)
class LiveWorker:
    state: WorkerState
    revision: str | None  # None: it does not tell, and may be any


@dataclass(frozen=True, slots=True)
class ModelService:
    """Who serves a model."""

    workers: Sequence[LiveWorker] = ()
    is_loaded: bool = True  # else an admin has unloaded it
    is_batch_share_taken: bool = False


def waiting_for(job: WaitingJob, service: ModelService) -> WaitingFor:
    if not service.is_loaded:
        return WaitingFor.PAUSE
    if not service.workers:
        return WaitingFor.WORKER
    able = [one for one in service.workers if job.revision is None or one.revision in (None, job.revision)]
    if not able:
        return WaitingFor.REVISION
    states = {worker.state for worker in able}
    if WorkerState.READY not in states:
        return WaitingFor.PAUSE if states == {WorkerState.DRAINING} else WaitingFor.MODEL_LOAD
    if job.is_delayed or (job.is_held_line and service.is_batch_share_taken):
        return WaitingFor.LIMIT
    return WaitingFor.ISOLATION if job.lane is Lane.ISOLATED else WaitingFor.SLOTS
