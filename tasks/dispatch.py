"""Tells workers that there is work: a bounded number of messages per queue, each of which lets one job be claimed.

A message is a ticket: whoever takes it claims the job whose turn it is at that moment, so that fairness, priority,
cancellation and deadlines are decided as late as possible. It names a job, but only for workers from before there were
tickets, which claim that job. The backlog and its order are in SQL, and nothing is written there about messages: they
are topped up to the number of jobs that could be claimed, within the window. The API sends one right after the commit
of an accept (`Dispatcher.ring`); GPU workers after the end of a job, and the janitor every second, send what is missing
(`dispatch`). A surplus ticket costs its worker a claim that finds nothing.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from time import monotonic
from typing import Any
from uuid import UUID

import redis
import redis.asyncio
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from domain.catalog import Catalog, ModelEntry
from domain.jobs import WorkerState
from settings import Settings
from storage import batch_lines, batches, jobs, workers
from storage.stream_channels import REDIS_OUTAGES
from storage.tables import Worker
from tasks.messages import (
    MAX_RINGS,
    bell_key,
    generate_message,
    priority_keys,
    revoke_channel,
    revoke_message,
)

log = logging.getLogger(__name__)

BROKER_DEADLINE_SECONDS = 0.5  # for one round trip to Redis
MAX_REVOKED = 500  # jobs in one broadcast
FULL_WINDOW_SECONDS = 0.25  # before a full window is tried again
SLOTS_SECONDS = 2.0  # for which the number of live slots is known; workers report as often

# KEYS: the bell, then the lists of a queue. ARGV: the window, the most rings, messages. Sends as many of the messages
# as there is room for, rings for each of them, and returns how many.
SEND = """
local free = tonumber(ARGV[1])
for i = 2, #KEYS do free = free - redis.call('LLEN', KEYS[i]) end
local num_sent = math.max(0, math.min(free, #ARGV - 2))
for i = 3, 2 + num_sent do
  redis.call('LPUSH', KEYS[2], ARGV[i])
  redis.call('LPUSH', KEYS[1], 1)
end
redis.call('LTRIM', KEYS[1], 0, tonumber(ARGV[2]) - 1)
return num_sent
"""


def window_size(settings: Settings, num_live_slots: int) -> int:
    """How many messages a queue may hold: enough to keep the slots busy, few enough to bound surplus ones."""
    return max(settings.dispatch_window_min, math.ceil(settings.dispatch_window_factor * num_live_slots))


def batch_share(settings: Settings, num_live_slots: int) -> int:
    """How many slots batch lines may take, including lines on their way to a slot. The rest is reserved for live
    requests; a single slot is shared."""
    return min(num_live_slots, max(1, math.floor(num_live_slots * (1 - settings.batch_reserve))))


def dispatch(sessions: sessionmaker[Session], client: redis.Redis, spec: ModelEntry, settings: Settings) -> int:
    """Let batch lines in within their share, and send the messages that are missing from one model's queue. Returns how
    many were sent. Raises RedisError, SQLAlchemyError."""
    num_waiting = count_waiting(client, spec.queue)
    with sessions.begin() as session:
        live = workers.list_live(session, model=spec.id)
        num_live_slots = _count_ready_slots(live)
        window = window_size(settings, num_live_slots)
        if num_waiting >= window:
            return 0
        ready = [worker for worker in live if worker.state is WorkerState.READY]
        revisions = [worker.model_revision for worker in ready if worker.model_revision is not None]
        job_ids = jobs.claimable_soon(session, spec.id, model_revisions=revisions, limit=window)
        share = batch_share(settings, num_live_slots)
        job_ids += _let_lines_in(session, spec.id, share=share, free=window - len(job_ids))
    # Those that were found first are likely to be named by the messages that wait already.
    return send(client, spec.queue, job_ids[num_waiting:], window=window)


def _let_lines_in(session: Session, model: str, *, share: int, free: int) -> list[UUID]:
    """Fill leftover room with batch lines, within their share; one process at a time, to fill it only once."""
    if share == 0 or free <= 0 or not batches.has_unfinished(session):
        return []
    num_outstanding = batch_lines.count_outstanding(session, model)
    if num_outstanding is None:
        return []
    return jobs.let_lines_in(session, model, limit=min(free, share - num_outstanding))


def raise_overdue_lines(sessions: sessionmaker[Session], spec: ModelEntry, settings: Settings) -> None:
    """Let lines of batches in that have yielded long enough, although others wait; within the share of all lines."""
    with sessions.begin() as session:
        batch_ids = batch_lines.overdue(session, spec.id)
        if not batch_ids or (num_outstanding := batch_lines.count_outstanding(session, spec.id)) is None:
            return
        share = batch_share(settings, _count_ready_slots(workers.list_live(session, model=spec.id)))
        batch_lines.raise_lines(session, spec.id, batch_ids, limit=share - num_outstanding)


def count_waiting(client: redis.Redis, queue: str) -> int:
    """Count the messages in the lists of one queue."""
    pipeline = client.pipeline(transaction=False)
    for key in priority_keys(queue):
        pipeline.llen(key)
    return sum(pipeline.execute())


def send(client: redis.Redis, queue: str, job_ids: Sequence[UUID], *, window: int) -> int:
    """Send messages while fewer than `window` wait, and wake as many workers, in one round trip. Returns how many."""
    if not job_ids:
        return 0
    num_sent: Any = client.eval(SEND, *_send_arguments(queue, job_ids, window))
    return int(num_sent)


def _send_arguments(queue: str, job_ids: Sequence[UUID], window: int) -> list[Any]:
    keys = [bell_key(queue), *priority_keys(queue)]
    return [len(keys), *keys, window, MAX_RINGS, *(generate_message(job_id, queue) for job_id in job_ids)]


def _count_ready_slots(live: Sequence[Worker]) -> int:
    return sum(worker.max_num_seqs for worker in live if worker.state is WorkerState.READY)


class Dispatcher:
    """The API's part, for which requests never wait. Per model, at most one push to Redis runs at a time."""

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
        self._accepted: dict[str, list[UUID]] = {}  # by model: jobs for which no message has been sent yet
        self._revoked: dict[UUID, None] = {}  # running jobs whose cancellation is to be broadcast
        self._is_revoking = False
        self._windows: dict[str, tuple[int, float]] = {}  # by model: the window, and the monotonic time of its look

    def ring(self, model: str, job_id: UUID) -> None:
        """Send a message soon, as this job was accepted. Returns at once and never raises; event loop only."""
        if model in self._accepted:
            self._accepted[model].append(job_id)
            return
        self._accepted[model] = [job_id]
        self._start(self._send_accepted(self._catalog.entry_of(model)))

    def revoke_running(self, job_id: UUID) -> None:
        """Notify all workers of a cancellation that is already in SQL, so that it takes effect within a step instead of
        at the next chunk commit. Those that come during one broadcast go into the next: each is work for every worker.
        Best effort; returns at once; event loop only."""
        self._revoked[job_id] = None
        if not self._is_revoking:
            self._is_revoking = True
            self._start(self._publish_revokes())

    async def aclose(self) -> None:
        """Wait for pushes in progress, which are bounded by the timeouts of the broker and the database."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send_accepted(self, spec: ModelEntry) -> None:
        try:
            while job_ids := self._accepted[spec.id]:
                self._accepted[spec.id] = []
                try:
                    is_full = await self._send(spec, job_ids) < len(job_ids)
                except (*REDIS_OUTAGES, SQLAlchemyError) as exc:
                    log.warning("could not send messages; the janitor will: %s", type(exc).__name__)
                    is_full = False
                if is_full:
                    # Trying after every accept would cost more than accepting. Whoever makes room sends messages, too.
                    await asyncio.sleep(FULL_WINDOW_SECONDS)
        finally:
            del self._accepted[spec.id]

    async def _send(self, spec: ModelEntry, job_ids: Sequence[UUID]) -> int:
        window, looked_at = self._windows.get(spec.id) or await self._look(spec)
        async with asyncio.timeout(BROKER_DEADLINE_SECONDS):
            arguments = _send_arguments(spec.queue, job_ids[:window], window)
            num_sent: Any = await self._client.eval(SEND, *arguments)
        if monotonic() - looked_at > SLOTS_SECONDS:  # for the next push: this one need not wait for it
            await self._look(spec)
        return int(num_sent)

    async def _look(self, spec: ModelEntry) -> tuple[int, float]:
        async with self._sessions() as session:
            live = await session.run_sync(workers.list_live, model=spec.id)
        self._windows[spec.id] = window_size(self._settings, _count_ready_slots(live)), monotonic()
        return self._windows[spec.id]

    async def _publish_revokes(self) -> None:
        database = int(self._client.connection_pool.connection_kwargs.get("db") or 0)
        try:
            while self._revoked:
                job_ids = list(self._revoked)[:MAX_REVOKED]
                for job_id in job_ids:
                    del self._revoked[job_id]
                async with asyncio.timeout(BROKER_DEADLINE_SECONDS):
                    await self._client.publish(revoke_channel(database), revoke_message(job_ids))
        except REDIS_OUTAGES as exc:
            self._revoked.clear()
            log.warning("could not broadcast revokes; the workers will read them in SQL: %s", type(exc).__name__)
        finally:
            self._is_revoking = False

    def _start(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the event loop keeps only weak references
        task.add_done_callback(self._tasks.discard)
