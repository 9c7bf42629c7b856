"""One model's queue: its figures, what its jobs wait for, and when a job at some place in it would start and end."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.orm import Session

from dialects.native import QueueView
from domain.catalog import Catalog
from domain.eta import Eta, FairOrder, Load, Pace, Slots, TenantQueue, estimate, level_of, nothing_more, pace_by_rate
from domain.jobs import LiveWorker, ModelService, WaitingFor, WaitingJob, WorkerState, waiting_for
from settings import Settings
from storage import batch_lines, job_queues, paces, workers
from storage.job_queues import QueueFigures, QueuePosition, QueueRows, WaitingGroup
from storage.paces import MAX_COUNTED, Arriving, OwnAhead, Standing
from storage.tables import Worker
from tasks.dispatch import batch_share

PLAIN_WAITS = frozenset({WaitingFor.SLOTS, WaitingFor.TURN})  # for a slot, and for nothing else

#: The place of a job about which nothing is known.
UNKNOWN_PLACE: QueueView = {
    "position": None,
    "is_estimate": False,
    "eta_seconds": None,
    "eta_p90_seconds": None,
    "end_eta_seconds": None,
    "end_eta_p90_seconds": None,
    "waiting_for": None,
    "load_percent": None,
}

#: The headers that tell a client its job's place, whatever route it uses: a field of the view, and what one of it is.
HEADER_BY_FIELD = {
    "position": ("x-queue-position", 1),
    "eta_seconds": ("x-queue-eta-ms", 1000),
    "eta_p90_seconds": ("x-queue-eta-p90-ms", 1000),
    "end_eta_seconds": ("x-queue-end-eta-ms", 1000),
    "end_eta_p90_seconds": ("x-queue-end-eta-p90-ms", 1000),
}

WAITING_FOR_HEADER = "x-queue-waiting-for"


def queue_headers(place: QueueView | None) -> dict[str, str]:
    """What is known of a job's place in the queue."""
    if place is None:
        return {}
    values = {name: place.get(name) for name in HEADER_BY_FIELD}
    headers = {
        header: str(round(value * factor))
        for name, (header, factor) in HEADER_BY_FIELD.items()
        if isinstance(value := values[name], int | float)
    }
    if place["waiting_for"] is not None:
        headers[WAITING_FOR_HEADER] = place["waiting_for"]
    return headers


WILL_LOAD = (WorkerState.LOADING, WorkerState.STANDBY)

MAX_UNRANKED = 1_000  # tenants of a model, ranked in ten milliseconds; more are ranked beside the event loop


class Ranking:
    """The order of a model's queues, made when somebody asks for it: of many models, most are asked for nothing."""

    def __init__(self, make: Callable[[], FairOrder] = lambda: FairOrder(())) -> None:
        self._make = make
        self._order: FairOrder | None = None
        self.is_asked_for = False

    def make(self) -> FairOrder:
        self._order = self._order or self._make()
        return self._order

    @property
    def order(self) -> FairOrder:
        self.is_asked_for = True
        return self.make()


@dataclass(frozen=True, slots=True)
class Waiting:
    """The jobs of a model that wait for the same thing."""

    num_jobs: int
    oldest_seconds: float  # the age of the oldest of them, since it was accepted


@dataclass(frozen=True, slots=True)
class ModelQueue:
    """One model's queue and the ready workers that serve it. Tokens are the most that the jobs may still take."""

    model: str
    num_queued: int = 0
    num_running: int = 0
    oldest_queued_seconds: float = 0.0
    queued_tokens: int = 0
    running_tokens: int = 0
    num_workers: int = 0
    num_slots: int = 0
    tokens_per_second: float = 0.0
    num_coming_slots: int = 0  # of workers that are loading the model or will once they have room
    load_percent: int | None = None  # of the load that has come furthest
    ready_in_seconds: float | None = None  # until the first of these workers is ready; None: unknown
    service: ModelService = field(default_factory=ModelService)
    waiting: Mapping[WaitingFor, Waiting] = field(default_factory=dict)  # only reasons that apply to some job
    allowed_tokens: int = 0  # that the running jobs may generate in all
    committed_tokens: int = 0  # of these
    ranking: Ranking = field(default_factory=Ranking)
    pace: Pace | None = None  # None: nothing has been measured
    read_at: float = field(default_factory=time.monotonic)

    @property
    def order(self) -> FairOrder:
        return self.ranking.order

    @property
    def is_loaded(self) -> bool:
        """False if an admin has unloaded the model; its jobs then wait."""
        return self.service.is_loaded

    @property
    def is_served(self) -> bool:
        """Whether a worker takes its jobs, or will as soon as it has made room for the model."""
        return self.num_workers > 0 or any(worker.state is WorkerState.STANDBY for worker in self.service.workers)

    def place(self, position: QueuePosition) -> QueueView:
        """The place that a queued job is shown."""
        estimated = self.estimate(position)
        start = None if estimated is None else estimated.start
        end = None if estimated is None else estimated.end
        return {
            "position": position.num_ahead,
            "is_estimate": position.is_estimate,
            "eta_seconds": start and round(start.p50, 1),
            "eta_p90_seconds": start and round(start.p90, 1),
            "end_eta_seconds": end and round(end.p50, 1),
            "end_eta_p90_seconds": end and round(end.p90, 1),
            "waiting_for": waiting_for(position.job, self.service),
            "load_percent": self.load_percent,
        }

    def last_place(self) -> QueueView:
        """Behind all that is queued."""
        load = self.order.total
        return self.place(QueuePosition(self.num_queued, self.queued_tokens, tokens_ahead=round(load.num_tokens)))

    def joining(self, tenant_id: UUID, since: Load, num_tokens: int, *, max_own: float = math.inf) -> QueuePosition:
        """Of a job that its tenant submits now; `since` is what it has submitted since the figures were read. Of its
        jobs, at most `max_own` wait."""
        tenant = self.order.by_id.get(tenant_id)
        own = since if tenant is None else since.plus(tenant.load)
        if own.num_jobs > max_own:
            own = own.times(max_own / own.num_jobs)
        return self._position(tenant_id, own, num_tokens, WaitingJob())

    def long_position(self, ahead: OwnAhead) -> QueuePosition:
        """Of a job in a queue that is too long to be ranked."""
        tenant, own = self.order.by_id.get(ahead.tenant_id), ahead.load
        if ahead.share is not None and tenant is not None:
            own = Load(*map(max, own, tenant.load.times(ahead.share)))
        return self._position(ahead.tenant_id, own, ahead.num_tokens, ahead.job)

    def _position(self, tenant_id: UUID, own: Load, num_tokens: int, job: WaitingJob) -> QueuePosition:
        ahead = self.order.ahead_of(tenant_id, own)
        has_others = self.order.has_others(tenant_id)
        return QueuePosition(
            num_ahead=round(ahead.num_jobs),
            cost_ahead=round(ahead.cost),
            job=job,
            tokens_ahead=round(ahead.num_tokens),
            num_tokens=num_tokens,
            is_estimate=has_others or own.num_jobs >= MAX_COUNTED,
            turn=(tenant_id, self.order.fair_time(tenant_id, own.cost)),
        )

    def estimate(self, position: QueuePosition) -> Eta | None:
        """Of the start and end of the job at `position`. None if it waits for something other than a free slot or a
        load, or if nothing has been measured. For a load, only those jobs get an estimate that start at its end: the
        rate afterwards is not known yet."""
        reason = waiting_for(position.job, self.service)
        if reason is WaitingFor.MODEL_LOAD and position.num_ahead < self.num_coming_slots:
            return None if self.ready_in_seconds is None else Eta.at(self.ready_in_seconds)
        if reason not in PLAIN_WAITS or self.num_slots == 0:
            return None
        ahead = Load(position.num_ahead, position.cost_ahead, position.tokens_ahead)
        slots = Slots(self.num_slots, self.num_running, self.allowed_tokens, self.committed_tokens)
        if self.pace is None and position.num_ahead + self.num_running < self.num_slots:
            return Eta.at(0.0)
        if self.pace is None:
            return None
        overtaking = nothing_more if position.turn is None else partial(self.order.overtaking, *position.turn)
        age_seconds = time.monotonic() - self.read_at
        return estimate(ahead, position.num_tokens, slots, self.pace, overtaking, age_seconds=age_seconds)


@dataclass(frozen=True, slots=True)
class QueueRead:
    """What is read of all queues at once. The rows are for every tenant, and left as they came: reading one of them is
    quick, and what is made of it is made beside the event loop."""

    rows: QueueRows
    standings: Sequence[Row[Any]]
    live: Mapping[str, Sequence[Worker]]
    unloaded: Collection[str]
    num_outstanding: Mapping[str, int]  # sequences of batch lines that have been let in, where others wait to be
    arrivals: Mapping[str, Mapping[UUID, Arriving]]
    paces: Mapping[str, Pace]


def read_queues(session: Session, catalog: Catalog) -> QueueRead:
    rows = job_queues.queue_rows(session)
    live: dict[str, list[Worker]] = {}
    for worker in workers.list_live(session):
        live.setdefault(worker.model, []).append(worker)
    return QueueRead(
        rows=rows,
        standings=paces.standing_rows(session),
        live=live,
        unloaded=workers.unloaded_models(session),
        num_outstanding={model: batch_lines.num_outstanding(session, model) for model in rows.models_with_held_lines},
        arrivals=paces.arrivals(session),
        paces=paces.read(session, [spec.id for spec in catalog.entries]),
    )


def queues_of(
    read: QueueRead, catalog: Catalog, settings: Settings, before: Mapping[str, ModelQueue]
) -> dict[str, ModelQueue]:
    """The queue of every model in the catalog, by model id. Takes a hundred milliseconds for thousands of tenants.
    Those are ranked that were asked for `before`, and those that whoever asks first should not wait for."""
    figures, standings = job_queues.figures_of(read.rows), paces.standings_of(read.standings)
    queues: dict[str, ModelQueue] = {}
    for spec in catalog.entries:
        found = figures.get(spec.id, QueueFigures())
        queue = queues[spec.id] = _queue_of(spec.id, read, found, standings, settings)
        is_asked_for = spec.id not in before or before[spec.id].ranking.is_asked_for
        if is_asked_for or len(found.loads) > MAX_UNRANKED:
            queue.ranking.make()
    return queues


def _queue_of(
    model: str, read: QueueRead, queue: QueueFigures, standings: Mapping[UUID, Standing], settings: Settings
) -> ModelQueue:
    alive = read.live.get(model, [])
    own = [worker for worker in alive if worker.state is WorkerState.READY]
    coming = [] if own else [worker for worker in alive if worker.state in WILL_LOAD]
    num_slots = sum(worker.max_num_seqs for worker in own)
    service = _service_of(model, read, batch_share(settings, num_slots))
    rate = sum(worker.tokens_per_second for worker in own)
    return ModelQueue(
        model=model,
        num_queued=queue.num_queued,
        num_running=queue.num_running,
        oldest_queued_seconds=round(queue.oldest_queued_seconds, 3),
        queued_tokens=queue.queued_cost,
        running_tokens=queue.running_cost,
        num_workers=len(own),
        num_slots=num_slots,
        tokens_per_second=round(rate, 1),
        num_coming_slots=sum(worker.max_num_seqs for worker in coming),
        load_percent=max((each.load_percent for each in coming if each.load_percent is not None), default=None),
        ready_in_seconds=min(
            (each.ready_in_seconds for each in coming if each.ready_in_seconds is not None), default=None
        ),
        service=service,
        waiting=_by_reason(queue.waiting, service),
        allowed_tokens=queue.allowed_tokens,
        committed_tokens=queue.committed_tokens,
        ranking=Ranking(partial(_order, queue.loads, standings, read.arrivals.get(model, {}))),
        pace=read.paces.get(model) or _pace_by_rate(rate, num_slots),
    )


def _service_of(model: str, read: QueueRead, share_of_lines: int) -> ModelService:
    return ModelService(
        workers=[LiveWorker(worker.state, worker.model_revision) for worker in read.live.get(model, [])],
        is_loaded=model not in read.unloaded,
        is_batch_share_taken=model in read.num_outstanding and read.num_outstanding[model] >= share_of_lines,
    )


def _order(
    loads: Mapping[UUID, Load], standings: Mapping[UUID, Standing], arrivals: Mapping[UUID, Arriving]
) -> FairOrder:
    nothing = {tenant_id: Load() for tenant_id, one in standings.items() if one.num_running}
    present = {
        tenant_id: TenantQueue(tenant_id, one.virtual_time, one.weight, one.num_running, load)
        for tenant_id, load in (nothing | dict(loads)).items()
        if (one := standings.get(tenant_id)) is not None
    }
    if not present or not arrivals:
        return FairOrder(present.values())
    level = level_of(present.values())
    coming = {
        tenant_id: replace(
            present.get(tenant_id) or TenantQueue(tenant_id, level, one.weight, 0, Load()), arriving=one.per_second
        )
        for tenant_id, one in arrivals.items()
    }
    return FairOrder((present | coming).values())


def _pace_by_rate(rate: float, num_slots: int) -> Pace | None:
    return None if rate <= 0 or num_slots == 0 else pace_by_rate(rate, num_slots)


def _by_reason(groups: Sequence[WaitingGroup], service: ModelService) -> dict[WaitingFor, Waiting]:
    waiting: dict[WaitingFor, Waiting] = {}
    for group in groups:
        reason = waiting_for(group.job, service)
        so_far = waiting.get(reason, Waiting(0, 0.0))
        oldest_seconds = max(so_far.oldest_seconds, group.oldest_seconds)
        waiting[reason] = Waiting(so_far.num_jobs + group.num_jobs, round(oldest_seconds, 3))
    return waiting
