"""How requests begin: a few of each tenant in one turn of the event loop.

Whatever waits is served in the order in which it became ready, so with a hundred requests of one tenant at once, each
step of another one's request would wait for a step of all of them. Between the steps of a request there are turns of
the loop; so the fewer requests begin in a turn, the shorter it is for everybody else.
"""

import asyncio
import time
from collections import Counter, deque
from uuid import UUID

from domain.shares import PER_TURN

LONG_SECONDS = 0.005  # a turn that took longer is followed by one in which each tenant begins a single request


class Starts:
    """Bound to one event loop."""

    def __init__(self) -> None:
        self._num_allowed = PER_TURN
        self._num_begun: Counter[UUID] = Counter()  # in this turn
        self._waiting: dict[UUID, deque[asyncio.Future[None]]] = {}
        self._is_turning = False
        self._turn_began_at = 0.0  # monotonic

    async def take(self, tenant_id: UUID) -> None:
        """Returns in a turn in which the tenant may begin another request. Its requests begin in their order."""
        if tenant_id not in self._waiting and self._num_begun[tenant_id] < self._num_allowed:
            self._num_begun[tenant_id] += 1
            self._turn_soon()
            return
        start = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant_id, deque()).append(start)
        await start

    def _turn_soon(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            self._turn_began_at = time.monotonic()
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_turning = False
        self._num_allowed = 1 if time.monotonic() - self._turn_began_at > LONG_SECONDS else PER_TURN
        self._num_begun.clear()
        for tenant_id, starts in list(self._waiting.items()):
            while starts and self._num_begun[tenant_id] < self._num_allowed:
                start = starts.popleft()
                if not start.done():  # else its client has gone
                    self._num_begun[tenant_id] += 1
                    start.set_result(None)
            if not starts:
                del self._waiting[tenant_id]
        if self._num_begun:
            self._turn_soon()
