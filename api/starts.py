"""How requests begin: a few of each tenant in one turn of the event loop.

Whatever waits is served in the order in which it became ready, so with a hundred requests of one tenant at once, each
step of another one's request would wait for a step of all of them. Between the steps of a request there are turns of
the loop; so the fewer requests begin in a turn, the shorter it is for everybody else.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

from starlette.requests import ClientDisconnect

from domain.shares import PER_TURN, SharedQueue

LONG_SECONDS = 0.005  # a turn that took longer is followed by one in which each tenant begins a single request

MAX_WAITING = 8_192  # one tenant alone gets half: as many as all its streams that connect again at once

#: An ASGI extension: its "is" says whether the client of the request has gone.
GONE = "celeriac.gone"

#: What tells whether the process lives waits behind nobody.
UNHELD_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})

Waiting = tuple[asyncio.Future[None], Callable[[], bool]]  # the second: whether the client has gone


def _stays() -> bool:
    return False


class Starts:
    """Bound to one event loop."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self._num_allowed = PER_TURN
        self._num_begun: Counter[UUID] = Counter()  # in this turn
        self._waiting: SharedQueue[Waiting] = SharedQueue(max_waiting)
        self._is_turning = False
        self._turn_began_at = 0.0  # monotonic

    async def take(self, tenant_id: UUID, is_gone: Callable[[], bool] = _stays) -> None:
        """Returns in a turn in which the tenant may begin another request. Its requests begin in their order.
        `is_gone`: whether the client has gone. Raises ClientDisconnect if it has when its turn comes, and
        ServerOverloaded if too many of the tenant's wait."""
        if not self._waiting.num_of(tenant_id) and self._may_begin(tenant_id):
            self._num_begun[tenant_id] += 1
            self._turn_soon()
            return
        start = asyncio.get_running_loop().create_future()
        self._waiting.append(tenant_id, (start, is_gone), what="requests are waiting to begin")
        await start

    def _may_begin(self, tenant_id: UUID) -> bool:
        return self._num_begun[tenant_id] < self._num_allowed

    def _turn_soon(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            self._turn_began_at = time.monotonic()
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_turning = False
        self._num_allowed = 1 if time.monotonic() - self._turn_began_at > LONG_SECONDS else PER_TURN
        self._num_begun.clear()
        with suppress(KeyError):  # none that waits may begin any more
            while True:
                self._begin(*self._waiting.pop(self._may_begin))
        if self._num_begun:
            self._turn_soon()

    def _begin(self, tenant_id: UUID, waiting: Waiting) -> None:
        """Whoever has gone takes no place in this turn."""
        start, is_gone = waiting
        if start.done():
            return  # it was cancelled
        if is_gone():
            start.set_exception(ClientDisconnect())
            return
        self._num_begun[tenant_id] += 1
        start.set_result(None)
