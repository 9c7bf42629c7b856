"""How tenants share what is bounded: places that requests hold, queues in which they wait, turns that they take.

Places follow the rule of dynamic thresholds (Choudhury and Hahne 1998, for the buffers of network switches): a tenant
may take another place while it holds fewer than are free. So one tenant gets at most half of the places, two get a
third each, and one that holds none finds a place as long as any is free. Turns are places that one waits for, and those
who wait are served in turns of their tenants. docs/adr/0054 lists what is shared in this way.

What a process remembers has no places that somebody holds: whatever room there is, is used, and if there is none, the
tenant that has most forgets something.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar
from uuid import UUID

from domain.errors import ServerOverloaded

NO_TENANT = UUID(int=0)

#: Whose work this is. NO_TENANT: the installation's own, such as health checks.
current_tenant: ContextVar[UUID] = ContextVar("current_tenant", default=NO_TENANT)

PER_TURN = 4  # requests of a tenant that begin in one turn of the event loop, and that go on after a common wait

Item = TypeVar("Item")

Key = TypeVar("Key", bound=Hashable)


async def a_few_in_a_turn(items: Iterable[Item]) -> AsyncIterator[Item]:
    """PER_TURN in each turn of the event loop. For waking requests that have waited for the same thing: if all went on
    in one turn, every other request would wait for them."""
    for number, item in enumerate(items):
        if number and number % PER_TURN == 0:
            await asyncio.sleep(0)
        yield item


class SharedPlaces:
    """A number of places, and how many of them each tenant holds."""

    def __init__(self, num_places: int, *, is_shared: bool = True) -> None:
        """`is_shared`: there may be several tenants; a tenant that is always alone may take every place."""
        self.num_places = num_places
        self._is_shared = is_shared
        self._num_by_tenant: Counter[UUID] = Counter()
        self._num_taken = 0

    @property
    def num_taken(self) -> int:
        return self._num_taken

    def num_of(self, tenant_id: UUID) -> int:
        """How many places the tenant holds."""
        return self._num_by_tenant.get(tenant_id, 0)

    def room_of(self, tenant_id: UUID) -> int:
        """How many more places the tenant may take now, if no other tenant takes any."""
        num_free = self.num_places - self._num_taken
        num_allowed = (num_free - self.num_of(tenant_id) + 1) // 2 if self._is_shared else num_free
        return max(0, num_allowed)

    def tenants(self) -> list[UUID]:
        """Those that hold places."""
        return list(self._num_by_tenant)

    def take(self, tenant_id: UUID) -> None:
        self._num_by_tenant[tenant_id] += 1
        self._num_taken += 1

    def leave(self, tenant_id: UUID) -> None:
        self._num_taken -= 1
        self._num_by_tenant[tenant_id] -= 1
        if not self._num_by_tenant[tenant_id]:
            del self._num_by_tenant[tenant_id]


class SharedQueue(Generic[Item]):
    """A queue in which tenants take turns and whose places they share. Each tenant's items stay in order."""

    def __init__(self, max_length: int) -> None:
        self._places = SharedPlaces(max_length)
        self._items_by_tenant: OrderedDict[UUID, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return self._places.num_taken

    def __iter__(self) -> Iterator[Item]:
        return (item for items in self._items_by_tenant.values() for item in items)

    def num_of(self, tenant_id: UUID) -> int:
        """How many of the tenant's items wait."""
        return self._places.num_of(tenant_id)

    def append(self, tenant_id: UUID, item: Item, *, what: str) -> None:
        """Raises ServerOverloaded if the tenant has too many items in here, of which `what` says what they do: "large
        requests are waiting"."""
        if not self._places.room_of(tenant_id):
            raise ServerOverloaded(f"{self._places.num_of(tenant_id)} of your {what}; retry in a moment")
        self._places.take(tenant_id)
        self._items_by_tenant.setdefault(tenant_id, deque()).append(item)

    def pop(self, may_come: Callable[[UUID], bool] = lambda tenant_id: True) -> tuple[UUID, Item]:
        """The next item of a tenant that may come, and whose it is. Raises KeyError if there is none."""
        tenant_id = next(filter(may_come, self._items_by_tenant), None)
        if tenant_id is None:
            raise KeyError("no item may come")
        items = self._items_by_tenant.pop(tenant_id)
        item = items.popleft()
        if items:
            self._items_by_tenant[tenant_id] = items  # behind the other tenants
        self._places.leave(tenant_id)
        return tenant_id, item


class SharedTurns:
    """Work of which only some runs at a time, while the rest waits. Bound to one event loop."""

    def __init__(self, num_at_once: int, *, max_waiting: int, what: str, is_shared: bool) -> None:
        """`what` is for refusals: "large requests are waiting". `is_shared`: turns are long, and there may be several
        tenants, so one of them never takes all turns at once; otherwise any free turn is anybody's."""
        self._places = SharedPlaces(num_at_once, is_shared=is_shared)
        self._waiting: SharedQueue[asyncio.Future[None]] = SharedQueue(max_waiting)
        self._what = what

    async def take(self, tenant_id: UUID) -> None:
        """Returns when it is the tenant's turn, which `leave` must end. Raises ServerOverloaded if too much of the
        tenant's work is waiting."""
        if self._has_room(tenant_id):  # then none of its work is waiting
            self._places.take(tenant_id)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(tenant_id, turn, what=self._what)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn came in the same moment
                self.leave(tenant_id)
            raise

    def leave(self, tenant_id: UUID) -> None:
        self._places.leave(tenant_id)
        # One turn that ends may make room for two: another tenant's, and then one more of this tenant's.
        while self._places.num_taken < self._places.num_places:
            try:
                next_id, turn = self._waiting.pop(self._has_room)
            except KeyError:
                return
            if not turn.done():  # else its waiter has given up
                self._places.take(next_id)
                turn.set_result(None)

    def _has_room(self, tenant_id: UUID) -> bool:
        return self._places.room_of(tenant_id) > 0


class SharedMemory(Generic[Key, Item]):
    """What is remembered of tenants: a bounded number of items. Each tenant finds its own only. For one too many, that
    of the tenant with most is forgotten which was not used for longest; so nobody pushes out what others have, unless
    they have as much."""

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._items_by_tenant: OrderedDict[UUID, OrderedDict[Key, Item]] = OrderedDict()
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def find(self, tenant_id: UUID, key: Key) -> Item | None:
        items = self._items_by_tenant.get(tenant_id)
        found = None if items is None else items.get(key)
        if items is not None and found is not None:
            items.move_to_end(key)
            self._items_by_tenant.move_to_end(tenant_id)
        return found

    def keep(self, tenant_id: UUID, key: Key, item: Item) -> None:
        items = self._items_by_tenant.setdefault(tenant_id, OrderedDict())
        self._num_items += key not in items
        items[key] = item
        items.move_to_end(key)
        self._items_by_tenant.move_to_end(tenant_id)
        if self._num_items > self._max_items:
            self._forget_one()

    def _forget_one(self) -> None:
        # Of equal tenants the first one, which was not heard of for longest.
        tenant_id = max(self._items_by_tenant, key=lambda one: len(self._items_by_tenant[one]))
        self._items_by_tenant[tenant_id].popitem(last=False)
        self._num_items -= 1
        if not self._items_by_tenant[tenant_id]:
            del self._items_by_tenant[tenant_id]

    def clear(self) -> None:
        self._items_by_tenant.clear()
        self._num_items = 0
