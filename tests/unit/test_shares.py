"""Places, queues and turns: whatever one tenant takes, another finds a place, and its turn comes next."""

import asyncio
import threading
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.errors import ServerOverloaded
from domain.shares import NO_TENANT, SharedPlaces, SharedQueue, SharedTurns, current_tenant
from local.shared_threads import SharedThreads

pytestmark = pytest.mark.anyio

ONE, OTHER, THIRD = uuid4(), uuid4(), uuid4()


def take_all(places: SharedPlaces, tenant_id: UUID) -> int:
    num_taken = 0
    while places.room_of(tenant_id):
        places.take(tenant_id)
        num_taken += 1
    return num_taken


@pytest.mark.parametrize(("num_places", "shares"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (8, (4, 2, 1)), (64, (32, 16, 8))])
def test_tenants_that_take_all_they_can_one_after_another_leave_places(
    num_places: int, shares: tuple[int, ...]
) -> None:
    places = SharedPlaces(num_places)
    assert tuple(take_all(places, tenant) for tenant in (ONE, OTHER, THIRD)) == shares
    for _ in range(shares[0]):
        places.leave(ONE)
    assert places.num_of(ONE) == 0
    assert places.tenants() == [tenant for tenant in (OTHER, THIRD) if places.num_of(tenant)]


@given(num_places=st.integers(1, 50), moves=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=200))
def test_whoever_holds_nothing_finds_a_place_while_one_is_free(num_places: int, moves: list[tuple[int, bool]]) -> None:
    places, tenants = SharedPlaces(num_places), [uuid4() for _ in range(5)]
    for number, is_taking in moves:
        tenant = tenants[number]
        if is_taking and places.room_of(tenant):
            assert places.num_of(tenant) < num_places - places.num_taken
            places.take(tenant)
        elif not is_taking and places.num_of(tenant):
            places.leave(tenant)
        assert places.num_taken == sum(map(places.num_of, tenants)) <= num_places
        assert bool(places.room_of(uuid4())) == (places.num_taken < num_places)


@given(st.integers(1, 100), st.integers(0, 60))
def test_the_room_is_how_many_one_may_take_in_a_row(num_places: int, num_held: int) -> None:
    places = SharedPlaces(num_places)
    for _ in range(min(num_held, num_places // 2)):
        places.take(OTHER)
    assert places.room_of(ONE) == take_all(places, ONE)


def test_a_tenant_that_is_always_alone_has_every_place() -> None:
    assert take_all(SharedPlaces(4, is_shared=False), ONE) == 4


def test_tenants_take_turns_in_a_queue_and_each_keeps_its_order() -> None:
    queue: SharedQueue[str] = SharedQueue(16)
    for number in range(4):
        queue.append(ONE, f"one {number}", what="items")
    queue.append(OTHER, "other 0", what="items")
    queue.append(OTHER, "other 1", what="items")
    assert sorted(queue) == ["one 0", "one 1", "one 2", "one 3", "other 0", "other 1"]
    assert [queue.pop()[1] for _ in range(6)] == ["one 0", "other 0", "one 1", "other 1", "one 2", "one 3"]
    assert len(queue) == 0
    with pytest.raises(KeyError):
        queue.pop()


def test_a_queue_refuses_only_those_who_fill_it() -> None:
    queue: SharedQueue[int] = SharedQueue(8)
    for number in range(4):
        queue.append(ONE, number, what="items wait")
    with pytest.raises(ServerOverloaded, match="4 of your items wait; retry in a moment"):
        queue.append(ONE, 4, what="items wait")
    queue.append(OTHER, 0, what="items wait")


async def test_a_newcomer_waits_for_one_turn_however_many_wait() -> None:
    turns, order = SharedTurns(1, max_waiting=200, what="items wait"), []

    async def work(tenant_id: UUID, name: str) -> None:
        async with turns.hold(tenant_id):
            order.append(name)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work(ONE, "one")) for _ in range(90)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(work(OTHER, "other")))
    await asyncio.gather(*tasks)
    assert order.index("other") <= 3  # one runs, one was next, and one has come before it
    await asyncio.wait_for(turns.take(THIRD), 60)  # all turns were given back


async def test_a_turn_that_nobody_wants_any_more_goes_to_the_next() -> None:
    turns = SharedTurns(1, max_waiting=8, what="items wait")
    await turns.take(ONE)
    leaving, late, staying = (asyncio.create_task(turns.take(OTHER)) for _ in range(3))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    turns.leave()
    late.cancel()  # in the moment in which its turn has come
    await asyncio.wait([late])
    assert late.cancelled()
    await asyncio.wait_for(staying, 60)


async def test_threads_take_turns_and_skip_work_that_was_given_up() -> None:
    threads, may_end = SharedThreads(1, max_waiting=16, name="test", what="items wait"), threading.Event()
    order: list[tuple[str, UUID]] = []

    async def ask(tenant_id: UUID, name: str) -> None:
        current_tenant.set(tenant_id)

        def work() -> None:
            assert may_end.wait(300)
            order.append((name, current_tenant.get()))

        await threads.run(work)

    tasks = [asyncio.create_task(ask(ONE, f"one {number}")) for number in range(4)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(ask(OTHER, "other")))
    await asyncio.sleep(0)
    tasks[1].cancel()
    may_end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [("one 0", ONE), ("other", OTHER), ("one 2", ONE), ("one 3", ONE)]
    assert current_tenant.get() == NO_TENANT
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    threads.close()
