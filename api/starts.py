"""How requests begin: a few of each tenant in one turn of the event loop.

Whatever waits is served in the order in which it became ready, so with a hundred requests of one tenant at once, each
step of another one's request would wait for a step of all of them. Between the steps of a request there are turns of
the loop; so the fewer requests begin in a turn, the shorter it is for everybody else.
"""

import asyncio
from collections import Counter, deque
from uuid import UUID

PER_TURN = 4  # of a tenant


class Starts:
    """Bound to one event loop."""

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = per_turn
        self._num_begun: Counter[UUID] = Counter()  # in this turn
        self._waiting: dict[UUID, deque[asyncio.Future[None]]] = {}
        self._is_turning = False

    async def take(self, tenant_id: UUID) -> None:
        """Returns in a turn in which the tenant may begin another request. Its requests begin in their order."""
        if tenant_id not in self._waiting and self._num_begun[tenant_id] < self._per_turn:
            self._num_begun[tenant_id] += 1
            self._turn_soon()
            return
        start = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant_id, deque()).append(start)
        await start

    def _turn_soon(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_turning = False
        self._num_begun.clear()
        for tenant_id, starts in list(self._waiting.items()):
            while starts and self._num_begun[tenant_id] < self._per_turn:
                start = starts.popleft()
                if not start.done():  # else its client has gone
                    self._num_begun[tenant_id] += 1
                    start.set_result(None)
            if not starts:
                del self._waiting[tenant_id]
        if self._num_begun:
            self._turn_soon()
