"""Hands queued jobs to Celery: a bounded window of messages per queue, fairest first.

The backlog stays in SQL, so that fairness, priority, cancellation and deadlines are decided as late as possible. The
API dispatches after an accept (`Dispatcher.nudge`); GPU workers after the end of a job and the janitor periodically
(`dispatch`). The commit comes before the push: a job whose message is lost in between becomes due again, and the
janitor sends it.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import redis
import redis.asyncio
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog, ModelEntry
from domain.jobs import BATCH_PRIORITY, WorkerState
from settings import Settings
from storage import batch_lines, batches, jobs, workers
from storage.streams import REDIS_OUTAGES
from tasks.messages import (
    MAX_RINGS,
    bell_key,
    generate_message,
    priority_key,
    priority_keys,
    revoke_channel,
    revoke_message,
)

log = logging.getLogger(__name__)

BROKER_DEADLINE_SECONDS = 0.5  # for one round trip to Redis
FULL_WINDOW_SECONDS = 0.25  # before a full window is checked again


def room(settings: Settings, *, num_live_slots: int, num_waiting: int) -> int:
    """How many more messages a queue may hold: enough to keep the slots busy, few enough to decide late."""
    window = max(settings.dispatch_window_min, math.ceil(settings.dispatch_window_factor * num_live_slots))
    return max(window - num_waiting, 0)


def batch_share(settings: Settings, num_live_slots: int) -> int:
    """How many slots batch lines may take, including lines on their way to a slot. The rest is reserved for live
    requests; a single slot is shared."""
    return min(num_live_slots, max(1, math.floor(num_live_slots * (1 - settings.batch_reserve))))


def dispatch(sessions: sessionmaker[Session], client: redis.Redis, spec: ModelEntry, settings: Settings) -> int:
    """Fill the window of one model's queue; returns how many jobs were sent. Raises RedisError, SQLAlchemyError."""
    num_waiting = count_waiting(client, spec.queue)
    job_ids: list[UUID] = []
    try:
        with sessions.begin() as session:
            num_live_slots = count_live_slots(session, spec)
            free = room(settings, num_live_slots=num_live_slots, num_waiting=num_waiting)
            job_ids += jobs.dispatch(session, spec.id, room=free)
            share = batch_share(settings, num_live_slots)
            job_ids += _dispatch_batch_lines(session, spec.id, share=share, free=free - len(job_ids))
    finally:
        # Push even if the answer to the commit was lost: jobs marked as sent but not sent would have to wait until they
        # are due again, while a surplus message is just dropped.
        push(client, spec.queue, job_ids)
    return len(job_ids)


def _dispatch_batch_lines(session: Session, model: str, *, share: int, free: int) -> list[UUID]:
    """Fill leftover room with batch lines, within their share; one process at a time, to fill it only once."""
    if share == 0 or free <= 0 or not batches.has_unfinished(session):
        return []
    num_outstanding = batch_lines.count_outstanding(session, model)
    if num_outstanding is None:
        return []
    return jobs.dispatch(session, model, room=min(free, share - num_outstanding), min_priority=BATCH_PRIORITY)


def count_waiting(client: redis.Redis, queue: str) -> int:
    """Count the messages in the lists of one queue."""
    pipeline = client.pipeline(transaction=False)
    for key in priority_keys(queue):
        pipeline.llen(key)
    return sum(pipeline.execute())


def push(client: redis.Redis, queue: str, job_ids: Sequence[UUID]) -> None:
    """Send these jobs in order and wake the workers, in one round trip."""
    if job_ids:
        pipeline = client.pipeline(transaction=True)
        _push(pipeline, queue, job_ids)
        pipeline.execute()


class Dispatcher:
    """The API's dispatch, for which requests never wait. Per model, at most one runs and one more is pending."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        client: "redis.asyncio.Redis",
        catalog: Catalog,
        settings: Settings,
    ) -> None:
        self._sessions = sessions
        self._client = client
        self._catalog = catalog
        self._settings = settings
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[str] = set()
        self._wanted_again: set[str] = set()
        self._full: set[str] = set()  # models whose window had no room when last checked

    def nudge(self, model: str) -> None:
        """Fill this model's window soon, as jobs were accepted. Returns at once and never raises; event loop only."""
        if model in self._running:
            self._wanted_again.add(model)
            return
        self._running.add(model)
        self._start(self._dispatch_while_wanted(self._catalog.entry_of(model)))

    def revoke_running(self, job_id: UUID) -> None:
        """Notify all workers of a cancellation that is already in SQL, so that it takes effect within a step instead of
        at the next chunk commit. Best effort; returns at once; event loop only."""
        self._start(self._publish_revoke(job_id))

    async def aclose(self) -> None:
        """Wait for dispatches in progress, which are bounded by the timeouts of the broker and the database."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def dispatch(self, spec: ModelEntry) -> int:
        """Like the function `dispatch`, but without batch lines, for which nobody is waiting. Also raises TimeoutError
        if the broker does not answer in time."""
        num_waiting, num_live_slots = await asyncio.gather(self._count_waiting(spec), self._count_live_slots(spec))
        free = room(self._settings, num_live_slots=num_live_slots, num_waiting=num_waiting)
        (self._full.discard if free else self._full.add)(spec.id)
        job_ids: list[UUID] = []
        try:
            async with self._sessions.begin() as session:
                job_ids += await session.run_sync(jobs.dispatch, spec.id, room=free)
        finally:
            await self._push(spec.queue, job_ids)
        return len(job_ids)

    async def _push(self, queue: str, job_ids: Sequence[UUID]) -> None:
        if job_ids:
            async with asyncio.timeout(BROKER_DEADLINE_SECONDS):
                pipeline = self._client.pipeline(transaction=True)
                _push(pipeline, queue, job_ids)
                await pipeline.execute()

    async def _count_waiting(self, spec: ModelEntry) -> int:
        async with asyncio.timeout(BROKER_DEADLINE_SECONDS):
            pipeline = self._client.pipeline(transaction=False)
            for key in priority_keys(spec.queue):
                pipeline.llen(key)
            return sum(await pipeline.execute())

    async def _count_live_slots(self, spec: ModelEntry) -> int:
        async with self._sessions() as session:
            return await session.run_sync(count_live_slots, spec)

    async def _dispatch_while_wanted(self, spec: ModelEntry) -> None:
        try:
            while True:
                self._wanted_again.discard(spec.id)
                try:
                    await self.dispatch(spec)
                except (*REDIS_OUTAGES, SQLAlchemyError) as exc:
                    log.warning("dispatch failed; the janitor will retry: %s", type(exc).__name__)
                if spec.id in self._full:
                    # Checking after every accept would cost more than accepting. Whatever makes room dispatches, too.
                    await asyncio.sleep(FULL_WINDOW_SECONDS)
                if spec.id not in self._wanted_again:
                    return
        finally:
            self._running.discard(spec.id)

    async def _publish_revoke(self, job_id: UUID) -> None:
        database = int(self._client.connection_pool.connection_kwargs.get("db") or 0)
        try:
            async with asyncio.timeout(BROKER_DEADLINE_SECONDS):
                await self._client.publish(revoke_channel(database), revoke_message([job_id]))
        except REDIS_OUTAGES as exc:
            log.warning("could not broadcast a revoke; the worker will read it in SQL: %s", type(exc).__name__)

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the event loop keeps only weak references
        task.add_done_callback(self._tasks.discard)


def count_live_slots(session: Session, spec: ModelEntry) -> int:
    live = workers.list_live(session, model=spec.id)
    return sum(worker.max_num_seqs for worker in live if worker.state is WorkerState.READY)


def _push(pipeline: Any, queue: str, job_ids: Sequence[UUID]) -> None:
    """Add the commands to a pipeline, sync or async."""
    pipeline.lpush(priority_key(queue, 0), *(generate_message(job_id, queue) for job_id in job_ids))
    pipeline.lpush(bell_key(queue), *[1] * min(len(job_ids), MAX_RINGS))
    pipeline.ltrim(bell_key(queue), 0, MAX_RINGS - 1)
