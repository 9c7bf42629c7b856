"""Queue lengths, waiting times and ETAs of all models: read once a second; single positions are queried in groups."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Self
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from dialects.native import QueueView
from domain.catalog import Catalog
from domain.jobs import LiveWorker, ModelService, WaitingFor, WorkerState, waiting_for
from metrics import (
    jobs_oldest_queued_seconds,
    jobs_queued,
    jobs_running,
    maintenance_findings,
    maintenance_seconds_since_last_tick,
    webhook_deliveries_pending,
    webhook_oldest_due_seconds,
    worker_processes,
    worker_slots,
)
from observability import describe_exception
from settings import Settings
from storage import batch_lines, job_queries, maintenance, webhook_deliveries, workers
from storage.database import repeatable, within
from storage.job_queries import QueuePosition, WaitingGroup
from storage.maintenance import RecentJobs, recent_jobs
from storage.tables import Job, WorkerDrain
from tasks.dispatch import batch_share

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
STALE_SECONDS = 5.0  # older figures are not shown
ANSWER_SECONDS = 2.0  # after this a query is abandoned, and the next one uses another connection
FINDING_SECONDS = 60.0  # shorter waits are not worth an operator's attention
MAX_SHARE = 0.2  # of its time one database connection may spend on queries for positions


#: The place of a job about which nothing is known.
PLAIN_WAITS = frozenset({WaitingFor.SLOTS, WaitingFor.TURN})  # for a slot, and for nothing else

UNKNOWN_PLACE: QueueView = {"position": None, "eta_seconds": None, "waiting_for": None, "load_percent": None}

WILL_LOAD = (WorkerState.LOADING, WorkerState.STANDBY)


@dataclass(frozen=True, slots=True)
class Waiting:
    """The jobs of a model that wait for the same thing."""

    num_jobs: int
    oldest_seconds: float  # the age of the oldest of them, since it was accepted


@dataclass(frozen=True, slots=True)
class Finding:
    """Jobs have been waiting for something other than a free slot for at least `seconds`, which is suspiciously
    long."""

    model: str
    reason: WaitingFor
    num_jobs: int
    seconds: float


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
        return {
            "position": position.num_ahead,
            "eta_seconds": self.eta_seconds(position),
            "waiting_for": waiting_for(position.job, self.service),
            "load_percent": self.load_percent,
        }

    def eta_seconds(self, position: QueuePosition) -> float | None:
        """Estimated seconds until the job at `position` starts, if the work ahead of it is done at a constant rate.
        None if the job waits for something other than a free slot or a load, or if no rate has been measured. For a
        load, only those jobs get an estimate that start at its end: the rate afterwards is not known yet.

        The estimate is pessimistic, as jobs count with the most tokens that they may take. When the job starts, the
        other slots hold jobs that are, on average, half done, so half of the work of one slotful is left out.
        """
        reason = waiting_for(position.job, self.service)
        if reason is WaitingFor.MODEL_LOAD and position.num_ahead < self.num_coming_slots:
            return None if self.ready_in_seconds is None else round(self.ready_in_seconds, 1)
        if reason not in PLAIN_WAITS:
            return None
        if position.num_ahead + self.num_running < self.num_slots:
            return 0.0
        if self.tokens_per_second <= 0 or self.num_slots == 0:
            return None
        num_jobs = position.num_ahead + self.num_running
        work = position.cost_ahead + self.running_tokens
        still_running = self.num_slots * work / max(num_jobs, 1) / 2
        return round(max(work - still_running, 0.0) / self.tokens_per_second, 1)


def read_queues(session: Session, catalog: Catalog, settings: Settings) -> dict[str, ModelQueue]:
    """The queue of every model in the catalog, by model id."""
    figures = job_queries.queue_figures(session)
    live = workers.list_live(session)
    unloaded = workers.unloaded_models(session)
    queues = {}
    for spec in catalog.entries:
        alive = [worker for worker in live if worker.model == spec.id]
        own = [worker for worker in alive if worker.state is WorkerState.READY]
        coming = [] if own else [worker for worker in alive if worker.state in WILL_LOAD]
        queue = figures.get(spec.id, job_queries.QueueFigures())
        num_slots = sum(worker.max_num_seqs for worker in own)
        has_held_lines = any(group.job.is_held_line for group in queue.waiting)
        service = ModelService(
            workers=[LiveWorker(worker.state, worker.model_revision) for worker in alive],
            is_loaded=spec.id not in unloaded,
            is_batch_share_taken=has_held_lines
            and batch_lines.num_outstanding(session, spec.id) >= batch_share(settings, num_slots),
        )
        queues[spec.id] = ModelQueue(
            model=spec.id,
            num_queued=queue.num_queued,
            num_running=queue.num_running,
            oldest_queued_seconds=round(queue.oldest_queued_seconds, 3),
            queued_tokens=queue.queued_cost,
            running_tokens=queue.running_cost,
            num_workers=len(own),
            num_slots=num_slots,
            tokens_per_second=round(sum(worker.tokens_per_second for worker in own), 1),
            num_coming_slots=sum(worker.max_num_seqs for worker in coming),
            load_percent=max((each.load_percent for each in coming if each.load_percent is not None), default=None),
            ready_in_seconds=min(
                (each.ready_in_seconds for each in coming if each.ready_in_seconds is not None), default=None
            ),
            service=service,
            waiting=_by_reason(queue.waiting, service),
        )
    return queues


def _by_reason(groups: Sequence[WaitingGroup], service: ModelService) -> dict[WaitingFor, Waiting]:
    waiting: dict[WaitingFor, Waiting] = {}
    for group in groups:
        reason = waiting_for(group.job, service)
        so_far = waiting.get(reason, Waiting(0, 0.0))
        oldest_seconds = max(so_far.oldest_seconds, group.oldest_seconds)
        waiting[reason] = Waiting(so_far.num_jobs + group.num_jobs, round(oldest_seconds, 3))
    return waiting


class QueueMonitor:
    """Keeps figures about all queues up to date and looks up positions. Use as an async context manager."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession], catalog: Catalog, settings: Settings) -> None:
        self._sessions = sessions
        self._catalog = catalog
        self._settings = settings
        self._silence_seconds = settings.maintenance_silence_seconds
        self._queues: dict[str, ModelQueue] = {}
        self._drains: Sequence[WorkerDrain] = ()
        self._read_at = float("-inf")  # monotonic: when the newest successful read began
        self._served_at = {spec.id: time.monotonic() for spec in catalog}  # monotonic: when a live worker was last seen
        self._ticked_at = dict.fromkeys(maintenance.CLOCKS, time.monotonic())  # monotonic
        for clock in maintenance.CLOCKS:
            age = partial(self._seconds_since_tick, clock)
            maintenance_seconds_since_last_tick.labels(clock).set_function(age)
        self._waiting_since: dict[tuple[str, WaitingFor], float] = {}  # monotonic
        self._recent: RecentJobs | None = None
        self._recent_at = float("-inf")  # monotonic
        self._reading = asyncio.Lock()
        self._num_accepted_since: dict[str, int] = {}
        self._refresher: asyncio.Task[None] | None = None
        self._asked: dict[UUID, asyncio.Future[QueuePosition | None]] = {}
        self._answering: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._refresher = asyncio.create_task(self._refresh_forever())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = [task for task in (self._refresher, self._answering) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def is_fresh(self) -> bool:
        """Whether the figures are at most STALE_SECONDS old."""
        return time.monotonic() - self._read_at < STALE_SECONDS

    @property
    def queues(self) -> Mapping[str, ModelQueue]:
        """The queues by model, at most STALE_SECONDS old; empty while the database does not answer."""
        return self._queues if self.is_fresh else {}

    @property
    def drained_since(self) -> Mapping[str, datetime]:
        """When each drained worker was drained, by its name; as fresh as `queues`."""
        return {drain.hostname: drain.since for drain in self._drains} if self.is_fresh else {}

    async def read(self, *, max_age_seconds: float = 0.25) -> Mapping[str, ModelQueue]:
        """The queues, read again if they are older than `max_age_seconds`. Raises SQLAlchemyError or OSError."""
        async with self._reading:  # those that waited for the lock find fresh figures
            if time.monotonic() - self._read_at > max_age_seconds:
                await within(ANSWER_SECONDS, self._read())
        return self._queues

    async def _read(self) -> None:
        began_at = time.monotonic()  # what changes during the read may be missing from it
        queues = await repeatable(self._sessions, read_queues, self._catalog, self._settings)
        num_pending, oldest_due_seconds = await repeatable(self._sessions, webhook_deliveries.backlog)
        webhook_deliveries_pending.set(num_pending)
        webhook_oldest_due_seconds.set(oldest_due_seconds)
        self._drains = await repeatable(self._sessions, workers.list_drains)
        self._queues, self._read_at = queues, began_at
        self._waiting_since = {
            (model, reason): self._waiting_since.get((model, reason), self._read_at)
            for model, queue in queues.items()
            for reason in queue.waiting
        }
        self._num_accepted_since.clear()
        self._served_at = {model: self._read_at for model in queues} | self._served_at
        self._served_at |= {model: self._read_at for model, queue in queues.items() if queue.is_served}
        _publish(queues)
        ages = await repeatable(self._sessions, maintenance.seconds_since_ticks)
        self._ticked_at |= {clock: time.monotonic() - ages[clock] for clock in self._ticked_at if clock in ages}
        _publish_findings(await repeatable(self._sessions, maintenance.figures), self.silent_clocks)

    @property
    def seconds_since_ticks(self) -> dict[str, float]:
        """For each maintenance clock, the seconds since its last known tick; for one that never ticked, since this
        process started. Keeps growing while the database does not answer."""
        return {clock: self._seconds_since_tick(clock) for clock in self._ticked_at}

    def _seconds_since_tick(self, clock: str) -> float:
        return max(0.0, time.monotonic() - self._ticked_at[clock])

    @property
    def silent_clocks(self) -> list[str]:
        """The maintenance clocks whose last tick is longer ago than CELERIAC_MAINTENANCE_SILENCE_SECONDS."""
        return [clock for clock, age in self.seconds_since_ticks.items() if age > self._silence_seconds]

    @property
    def findings(self) -> list[Finding]:
        """The reasons, slots aside, for which jobs have been waiting for more than FINDING_SECONDS. That holds for
        the oldest of the jobs, and for the reason itself, which every read since then has found."""
        return [
            Finding(model, reason, queue.waiting[reason].num_jobs, round(seconds, 1))
            for (model, reason), since in self._waiting_since.items()
            if reason not in PLAIN_WAITS and (queue := self.queues.get(model)) and reason in queue.waiting
            if (seconds := min(time.monotonic() - since, queue.waiting[reason].oldest_seconds)) > FINDING_SECONDS
        ]

    def unserved_seconds(self, model: str) -> float:
        """Seconds since a live worker of this model was last seen, or since this process started; 0 while the figures
        are stale."""
        return time.monotonic() - self._served_at.get(model, time.monotonic()) if self.is_fresh else 0.0

    async def recent(self) -> RecentJobs | None:
        """Statistics of the newest jobs, read at most once a second, as anyone may ask; None if the database does not
        answer."""
        async with self._reading:
            if time.monotonic() - self._recent_at > REFRESH_SECONDS:
                self._recent_at = time.monotonic()
                try:
                    self._recent = await within(ANSWER_SECONDS, repeatable(self._sessions, recent_jobs))
                except (SQLAlchemyError, OSError) as exc:
                    self._recent = None
                    log.warning("could not read the recent jobs", extra={"reason": describe_exception(exc)})
        return self._recent

    def accepted(self, model: str) -> None:
        """Note that a job has joined this model's queue since the figures were read."""
        self._num_accepted_since[model] = self._num_accepted_since.get(model, 0) + 1

    def joining(self, model: str) -> QueueView:
        """The place of a job accepted now, by the last figures: behind all queued jobs, whatever its priority."""
        queue = self.queues.get(model)
        if queue is None:
            return UNKNOWN_PLACE
        num_ahead = queue.num_queued + self._num_accepted_since.get(model, 0)
        return queue.place(QueuePosition(num_ahead, queue.queued_tokens))

    def place_of(self, job: Job) -> QueueView:
        """What a queued job waits for, by the last figures; its position is not looked up."""
        queue = self.queues.get(job.model)
        if queue is None:
            return UNKNOWN_PLACE
        reason = waiting_for(job_queries.waiting_job(job, datetime.now(UTC)), queue.service)
        return {**UNKNOWN_PLACE, "waiting_for": reason}

    async def position(self, job_id: UUID, model: str) -> QueueView | None:
        """The current place of a queued job; None if it is no longer queued. Raises SQLAlchemyError or OSError.

        A ranking costs the database milliseconds, so requests that arrive while one query runs share the next one, and
        there is a pause between queries.
        """
        answer = self._asked.get(job_id)
        if answer is None:
            answer = self._asked[job_id] = asyncio.get_running_loop().create_future()
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_positions())
        position = await asyncio.shield(answer)
        if position is None:
            return None
        queue = self.queues.get(model)
        return queue.place(position) if queue else {**UNKNOWN_PLACE, "position": position.num_ahead}

    async def _answer_positions(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            started = time.monotonic()
            try:
                asking = repeatable(self._sessions, job_queries.positions, list(asked))
                positions = await within(ANSWER_SECONDS, asking)
            except (SQLAlchemyError, OSError) as exc:
                for answer in asked.values():
                    answer.set_exception(exc)
                    answer.exception()  # retrieved, in case nobody awaits it any more
            else:
                for job_id, answer in asked.items():
                    answer.set_result(positions.get(job_id))
            pause = (time.monotonic() - started) * (1 / MAX_SHARE - 1)
            await asyncio.sleep(min(pause, REFRESH_SECONDS))  # bounded, as time spent in an outage was no work

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self.read()
            except (SQLAlchemyError, OSError) as exc:
                log.warning("could not read the queues", extra={"reason": describe_exception(exc)})
            await asyncio.sleep(REFRESH_SECONDS)


def _publish(queues: Mapping[str, ModelQueue]) -> None:
    for model, queue in queues.items():
        jobs_running.labels(model).set(queue.num_running)
        worker_processes.labels(model).set(queue.num_workers)
        worker_slots.labels(model).set(queue.num_slots)
        for reason in WaitingFor:
            waiting = queue.waiting.get(reason, Waiting(0, 0.0))
            jobs_queued.labels(model, reason.value).set(waiting.num_jobs)
            jobs_oldest_queued_seconds.labels(model, reason.value).set(waiting.oldest_seconds)


def _publish_findings(value_by_name: Mapping[tuple[str, str], float], silent_clocks: Sequence[str]) -> None:
    maintenance_findings.clear()  # drops findings that no longer apply
    for clock in silent_clocks:
        maintenance_findings.labels("silent_clocks", clock).set(1)
    for (name, label), value in value_by_name.items():
        maintenance_findings.labels(name, label).set(value)
