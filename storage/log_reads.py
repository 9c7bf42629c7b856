"""Reads of jobs' logs for open streams, which those of one job share.

Ten thousand streams may begin in one second: of a few jobs, or again after their server's restart. The first read of
each job runs at once, and whoever asks while it runs waits for the next one, which is made for all of them. So a job
costs a few reads, however many streams it has.

A read that has begun is joined by nobody: it may not see what was committed before the other asked.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from domain.requests import TokenChunk
from domain.shares import SharedTurns, current_tenant
from storage.database import within
from storage.job_queries import CHUNKS_PER_READ, StreamState, read_log
from storage.known_jobs import NEAR_CHUNKS, KnownJobs, LogPage

log = logging.getLogger(__name__)

MAX_READS = 6  # at a time, over all streams

MAX_WAITING = 2**17  # more than there can be streams

READ_SECONDS = 2.0  # then try another connection; the kernel takes ten seconds to notice a silently dead one

READ_FAILURES = (DBAPIError, PoolTimeout, TimeoutError)


@dataclass(eq=False, slots=True)
class _Read:
    """One that has not begun, or whose answer is not there yet."""

    lowest: int  # of the positions of its streams
    highest: int
    answer: "asyncio.Future[LogPage]"
    num_waiting: int = 0

    def takes_in(self, after: int) -> bool:
        """Whether a stream at this position was taken in."""
        lowest, highest = min(self.lowest, after), max(self.highest, after)
        if highest - lowest > NEAR_CHUNKS:
            return False
        self.lowest, self.highest = lowest, highest
        return True


class LogReads:
    """Of one process; to be used on its event loop only."""

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        version_of: Callable[[UUID], int | None],
        known: KnownJobs,
        *,
        is_shared: bool,
    ) -> None:
        """`version_of` is that of StreamReader. `is_shared`: there may be several tenants, who take turns."""
        self._sessions = sessions
        self._version_of = version_of
        self._known = known
        self._turns = SharedTurns(MAX_READS, max_waiting=MAX_WAITING, what="streams wait", is_shared=is_shared)
        self._to_come: dict[UUID, deque[_Read]] = {}  # of each job that is being read
        self._tasks: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def read(self, job_id: UUID, *, after: int) -> LogPage:
        """Chunks after `after`, and perhaps some before it. Raises JobUnreadable, or one of READ_FAILURES."""
        read = self._ask(job_id, after)
        read.num_waiting += 1
        try:
            return await asyncio.shield(read.answer)
        finally:
            read.num_waiting -= 1
            if not read.num_waiting and read in self._to_come.get(job_id, ()):
                self._to_come[job_id].remove(read)

    def _ask(self, job_id: UUID, after: int) -> _Read:
        to_come = self._to_come.get(job_id)
        for read in to_come or ():
            if read.takes_in(after):
                return read
        read = _Read(after, after, asyncio.get_running_loop().create_future())
        if to_come is not None:
            to_come.append(read)
            return read
        self._to_come[job_id] = deque([read])
        task = asyncio.create_task(self._read_all(job_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return read

    async def _read_all(self, job_id: UUID) -> None:
        """One after another, until nobody asks for more."""
        to_come = self._to_come[job_id]
        tenant_id = current_tenant.get()  # whose job it is: its streams have no other
        try:
            while to_come:
                await self._turns.take(tenant_id)
                try:
                    if to_come:  # else those who asked have left
                        await self._answer(job_id, to_come.popleft())
                finally:
                    self._turns.leave(tenant_id)
        finally:
            for read in self._to_come.pop(job_id):  # of a process that stops, or of a bug: nobody waits in vain
                read.answer.cancel()

    async def _answer(self, job_id: UUID, read: _Read) -> None:
        version = self._version_of(job_id)
        try:
            page = LogPage(*await within(READ_SECONDS, self._query(job_id, read.lowest)))
        except Exception as exc:  # the streams', whatever it is; those that share the next read may fare better
            if isinstance(exc, READ_FAILURES):
                log.warning("streams are waiting for the database: %s", exc.__class__.__name__)
            read.answer.set_exception(exc)
            read.answer.exception()  # everybody may have left, and nobody would retrieve it
        except BaseException:
            read.answer.cancel()
            raise
        else:
            self._known.keep_page(job_id, version, read.lowest, page)
            read.answer.set_result(page)

    async def _query(self, job_id: UUID, after: int) -> tuple[StreamState | None, list[TokenChunk]]:
        async with self._sessions() as session:
            return await session.run_sync(read_log, job_id, after=after, limit=CHUNKS_PER_READ)
