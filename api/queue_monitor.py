"""Lengths, waits and ETAs of all queues, read once a second while there are jobs; single positions in groups."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Self
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from api.model_queues import PLAIN_WAITS, UNKNOWN_PLACE, ModelQueue, Waiting, queues_of, read_queues
from dialects.native import QueueView
from domain.catalog import Catalog
from domain.eta import Eta, Load
from domain.jobs import WaitingFor, waiting_for
from domain.shares import a_few_in_a_turn
from metrics import (
    jobs_oldest_queued_seconds,
    jobs_queued,
    jobs_running,
    labelled,
    maintenance_findings,
    maintenance_seconds_since_last_tick,
    requests_unserved_total,
    webhook_deliveries_pending,
    webhook_oldest_due_seconds,
    worker_processes,
    worker_slots,
)
from observability import describe_exception
from settings import Settings
from storage import job_queues, maintenance, paces, webhook_deliveries, workers
from storage.database import repeatable, within
from storage.job_accept import NewJob
from storage.job_queues import QueuePosition
from storage.maintenance import RecentJobs, recent_jobs
from storage.tables import Job, WorkerDrain
from tasks.submit import Submitted

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
MAX_AGE_SECONDS = 0.25  # of figures that need not be read again
MAX_PAUSE_SECONDS = 3.0  # between two reads
#: In which a job that finds a worker idle has its first token, before a read takes that worker's time.
START_SECONDS = 0.05
ANSWER_SECONDS = 2.0  # after this a query is abandoned, and the next one uses another connection
READ_SECONDS = 5.0  # the same for a read of all queues: a million queued jobs take one on a quiet machine
STALE_SECONDS = 2 * (READ_SECONDS + MAX_PAUSE_SECONDS)  # older figures are not shown: two reads have failed
FINDING_SECONDS = 60.0  # shorter waits are not worth an operator's attention
#: What these wait for is other jobs.
UNREMARKABLE = PLAIN_WAITS | {WaitingFor.SAME_REQUEST}
#: For these nothing is under way: somebody has to do something.
SOON_FINDING_SECONDS = dict.fromkeys((WaitingFor.WORKER, WaitingFor.PAUSE), 10.0)
MAX_RANKED = 500  # queued jobs of a model; in a longer queue, positions are estimated
MAX_SHARE = 0.2  # of its time one database connection may spend on queries for positions


@dataclass(frozen=True, slots=True)
class Finding:
    """Jobs have been waiting for something other than a free slot for at least `seconds`, which is suspiciously
    long."""

    model: str
    reason: WaitingFor
    num_jobs: int
    seconds: float


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
        self._accepted_since: dict[tuple[str, UUID], Load] = {}
        self._has_accepted = asyncio.Event()  # since the last read began
        self._refresher: asyncio.Task[None] | None = None
        self._asked: dict[UUID, asyncio.Future[QueuePosition | None]] = {}
        self._asked_in_long: dict[UUID, asyncio.Future[QueuePosition | None]] = {}  # in queues of over MAX_RANKED jobs
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
    def has_read(self) -> bool:
        """Whether the database has answered since this process started."""
        return self._read_at > float("-inf")

    @property
    def queues(self) -> Mapping[str, ModelQueue]:
        """The queues by model, at most STALE_SECONDS old; empty while the database does not answer."""
        return self._queues if self.is_fresh else {}

    @property
    def drained_since(self) -> Mapping[str, datetime]:
        """When each drained worker was drained, by its name; as fresh as `queues`."""
        return {drain.hostname: drain.since for drain in self._drains} if self.is_fresh else {}

    async def read(self, *, max_age_seconds: float = MAX_AGE_SECONDS) -> Mapping[str, ModelQueue]:
        """The queues, read again if they are older than `max_age_seconds`. Raises SQLAlchemyError or OSError."""
        async with self._reading:  # those that waited for the lock find fresh figures
            if time.monotonic() - self._read_at > max_age_seconds:
                await within(READ_SECONDS, self._read())
        return self._queues

    async def refresh(self, *, max_age_seconds: float) -> None:
        """As `read`; that the database does not answer is logged."""
        try:
            await self.read(max_age_seconds=max_age_seconds)
        except (SQLAlchemyError, OSError) as exc:
            log.warning("could not read the queues", extra={"reason": describe_exception(exc)})

    async def _read(self) -> None:
        began_at = time.monotonic()  # what changes during the read may be missing from it
        read = await repeatable(self._sessions, read_queues, self._catalog)
        queues = await asyncio.to_thread(queues_of, read, self._catalog, self._settings, self._queues)
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
        self._accepted_since.clear()
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
        """The reasons, slots aside, for which jobs have been waiting for longer than the reason may last. That holds
        for the oldest of the jobs, and for the reason itself, which every read since then has found."""
        return [
            Finding(model, reason, queue.waiting[reason].num_jobs, round(seconds, 1))
            for (model, reason), since in self._waiting_since.items()
            if reason not in UNREMARKABLE and (queue := self.queues.get(model)) and reason in queue.waiting
            if (seconds := min(time.monotonic() - since, queue.waiting[reason].oldest_seconds))
            > SOON_FINDING_SECONDS.get(reason, FINDING_SECONDS)
        ]

    def unserved_seconds(self, model: str) -> float:
        """By the last figures, the seconds since a live worker of this model was seen, or since this process started; 0
        while the figures are stale."""
        return self._read_at - self._served_at.get(model, self._read_at) if self.is_fresh else 0.0

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

    def accepted(self, new_job: NewJob) -> None:
        """Note that a job has joined its model's queue since the figures were read."""
        key = (new_job.request.model_id, new_job.tenant_id)
        load = Load(1, new_job.cost, new_job.max_output_tokens)
        self._accepted_since[key] = self._accepted_since.get(key, Load()).plus(load)
        self._has_accepted.set()

    def joining(self, submitted: Submitted) -> QueueView:
        """The place of a job accepted now, by the last figures: behind all of its tenant's, whatever its priority. Of
        these, only as many as wait by its acceptance: others may have begun since the figures were read."""
        queue = self.queues.get(submitted.new_job.request.model_id)
        if queue is None:
            return UNKNOWN_PLACE
        return queue.place(self._joining(submitted.new_job, queue, num_queued=submitted.num_queued))

    def estimate(self, new_job: NewJob) -> Eta | None:
        """Of a job that is about to be accepted."""
        queue = self.queues.get(new_job.request.model_id)
        return None if queue is None else queue.estimate(self._joining(new_job, queue))

    def _joining(self, new_job: NewJob, queue: ModelQueue, *, num_queued: int | None = None) -> QueuePosition:
        since = self._accepted_since.get((queue.model, new_job.tenant_id), Load())
        max_own = math.inf if num_queued is None else max(0, num_queued - 1)
        return queue.joining(new_job.tenant_id, since, new_job.max_output_tokens, max_own=max_own)

    def place_of(self, job: Job) -> QueueView:
        """What a queued job waits for, by the last figures; its position is not looked up."""
        queue = self.queues.get(job.model)
        if queue is None:
            return UNKNOWN_PLACE
        reason = waiting_for(job_queues.waiting_job(job, datetime.now(UTC)), queue.service)
        return {**UNKNOWN_PLACE, "waiting_for": reason}

    async def position(self, job_id: UUID, model: str) -> QueueView | None:
        """The current place of a queued job; None if it is no longer queued. Raises SQLAlchemyError or OSError.

        A ranking costs the database milliseconds, so requests that arrive while one query runs share the next one, and
        there is a pause between queries.
        """
        if self._is_quiet:  # another process has accepted it
            self._has_accepted.set()
        queue = self.queues.get(model)
        asked = self._asked_in_long if queue is not None and queue.num_queued > MAX_RANKED else self._asked
        answer = asked.get(job_id)
        if answer is None:
            answer = asked[job_id] = asyncio.get_running_loop().create_future()
        if self._answering is None or self._answering.done():
            self._answering = asyncio.create_task(self._answer_positions())
        position = await asyncio.shield(answer)
        if position is None:
            return None
        queue = self.queues.get(model)
        return queue.place(position) if queue else {**UNKNOWN_PLACE, "position": position.num_ahead}

    async def _answer_positions(self) -> None:
        while self._asked or self._asked_in_long:
            short, long = self._asked, self._asked_in_long
            asked = short | long
            self._asked, self._asked_in_long = {}, {}
            started = time.monotonic()
            try:
                asking = repeatable(self._sessions, job_queues.positions, list(short))
                positions = await within(ANSWER_SECONDS, asking)
                if long:
                    counting = repeatable(self._sessions, paces.own_ahead, list(long))
                    ahead = await within(ANSWER_SECONDS, counting)
                    queues = self._queues
                    positions |= {id: queues[own.model].long_position(own) for id, own in ahead.items()}
            except Exception as exc:  # an outermost loop: raised in those who asked, and the next ones get an answer
                if not isinstance(exc, SQLAlchemyError | OSError):
                    log.exception("could not find positions")
                for answer in asked.values():
                    answer.set_exception(exc)
                    answer.exception()  # retrieved, in case nobody awaits it any more
            else:
                async for job_id, answer in a_few_in_a_turn(asked.items()):
                    answer.set_result(positions.get(job_id))
            pause = (time.monotonic() - started) * (1 / MAX_SHARE - 1)
            await asyncio.sleep(min(pause, REFRESH_SECONDS))  # bounded, as time spent in an outage was no work

    async def _refresh_forever(self) -> None:
        while True:
            started = time.monotonic()
            self._has_accepted.clear()
            try:
                await self.refresh(max_age_seconds=MAX_AGE_SECONDS)
            except Exception:  # an outermost loop: the next read may succeed
                log.exception("could not read the queues")
            pause = (time.monotonic() - started) * (1 / MAX_SHARE - 1)  # it reads every job that is queued
            await asyncio.sleep(min(max(pause, MAX_AGE_SECONDS), MAX_PAUSE_SECONDS))
            with suppress(TimeoutError):  # sooner while jobs come in, whose ETAs are only as good as the figures
                longest = MAX_PAUSE_SECONDS if self._is_quiet else REFRESH_SECONDS
                async with asyncio.timeout(longest - MAX_AGE_SECONDS):
                    await self._has_accepted.wait()
                    await asyncio.sleep(START_SECONDS)

    @property
    def _is_quiet(self) -> bool:
        """Whether there were no jobs, and a worker for each model."""
        queues = self.queues.values()
        return bool(queues) and all(queue.num_queued == queue.num_running == 0 and queue.is_served for queue in queues)


def _publish(queues: Mapping[str, ModelQueue]) -> None:
    for model, queue in queues.items():
        jobs_running.labels(model).set(queue.num_running)
        worker_processes.labels(model).set(queue.num_workers)
        worker_slots.labels(model).set(queue.num_slots)
        labelled(requests_unserved_total, model)  # begins at 0: an increase is looked for
        for reason in WaitingFor:
            waiting = queue.waiting.get(reason, Waiting(0, 0.0))
            jobs_queued.labels(model, reason.value).set(waiting.num_jobs)
            jobs_oldest_queued_seconds.labels(model, reason.value).set(waiting.oldest_seconds)


def _publish_findings(value_by_name: Mapping[tuple[str, str], float], silent_clocks: Sequence[str]) -> None:
    """Those that no longer apply are dropped last, as the metrics may be written in a thread meanwhile."""
    current = dict.fromkeys((("silent_clocks", clock) for clock in silent_clocks), 1.0) | dict(value_by_name)
    for (name, label), value in current.items():
        maintenance_findings.labels(name, label).set(value)
    shown = [sample.labels for metric in maintenance_findings.collect() for sample in metric.samples]
    for labels in shown:
        if (labels["name"], labels["label"]) not in current:
            maintenance_findings.remove(labels["name"], labels["label"])
