"""A few threads beside an event loop, for work that would block it. Tenants take turns."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from domain.shares import SharedTurns, current_tenant

Result = TypeVar("Result")


class SharedThreads:
    """Bound to one event loop until `close`."""

    def __init__(self, num_threads: int, *, max_waiting: int, name: str, what: str) -> None:
        """`what` is for refusals: "large requests are waiting"."""
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        # There are so few threads that keeping one free for others would cost a tenant half of them.
        self._turns = SharedTurns(num_threads, max_waiting=max_waiting, what=what, is_shared=False)

    async def run(self, function: Callable[[], Result]) -> Result:
        """Returns or raises what `function` does, which must not touch anything that belongs to the event loop. Work
        whose caller gives up before its turn is not done at all. Raises ServerOverloaded if too much of the current
        tenant's work is waiting."""
        tenant_id = current_tenant.get()
        await self._turns.take(tenant_id)
        work = asyncio.get_running_loop().run_in_executor(self._threads, partial(copy_context().run, function))
        work.add_done_callback(partial(self._end, tenant_id))
        return await asyncio.shield(work)

    def _end(self, tenant_id: UUID, work: "asyncio.Future[Any]") -> None:
        # A thread cannot be interrupted, so abandoned work keeps its turn until it is finished.
        self._turns.leave(tenant_id)
        if not work.cancelled():
            work.exception()  # read, so that it is not reported as never retrieved

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
