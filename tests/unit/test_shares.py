"""Places, queues and turns: whatever one tenant takes, another finds a place, and its turn comes next."""

import asyncio
import threading
from collections import Counter
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import limits as api_limits
from api import services as api_services
from api.model_queues import UNKNOWN_PLACE
from api.pools import MAX_READS, MAX_WRITES
from api.services import Services, turns_of_queries
from dialects.native import QueueView
from domain.errors import ServerOverloaded, StorageUnavailable
from domain.shares import NO_TENANT, SharedMemory, SharedPlaces, SharedQueue, SharedTurns, current_tenant
from local.shared_threads import SharedThreads
from maintenance.webhooks import FORGET_SECONDS, MAX_FAILING, NUM_FAILURES_TO_OPEN, Hosts

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
    turns, order = SharedTurns(1, max_waiting=200, what="items wait", is_shared=True), []

    async def work(tenant_id: UUID, name: str) -> None:
        await turns.take(tenant_id)
        order.append(name)
        await asyncio.sleep(0)
        turns.leave(tenant_id)

    tasks = [asyncio.create_task(work(ONE, "one")) for _ in range(90)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(work(OTHER, "other")))
    await asyncio.gather(*tasks)
    assert order.index("other") <= 3  # one runs, one was next, and one has come before it
    await asyncio.wait_for(turns.take(THIRD), 60)  # all turns were given back


async def test_a_turn_that_nobody_wants_any_more_goes_to_the_next() -> None:
    turns = SharedTurns(1, max_waiting=8, what="items wait", is_shared=True)
    await turns.take(ONE)
    leaving, late, staying = (asyncio.create_task(turns.take(OTHER)) for _ in range(3))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving])
    turns.leave(ONE)
    late.cancel()  # in the moment in which its turn has come
    await asyncio.wait([late])
    assert late.cancelled()
    await asyncio.wait_for(staying, 60)


async def test_a_tenant_with_long_work_leaves_turns_to_others() -> None:
    turns = SharedTurns(4, max_waiting=64, what="items wait", is_shared=True)
    tasks = [asyncio.create_task(turns.take(ONE)) for _ in range(8)]
    await asyncio.sleep(0)
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 6
    for tenant_id in (OTHER, THIRD):  # at once, although the first tenant's work waits
        await asyncio.wait_for(turns.take(tenant_id), 60)
    turns.leave(OTHER)
    turns.leave(THIRD)
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == 2
    turns.leave(ONE)
    await asyncio.wait_for(tasks[2], 60)
    for task in tasks[3:]:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.mark.parametrize("tenants", [[ONE], [ONE, OTHER, THIRD]])
@pytest.mark.parametrize("num_at_once", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_all_work_is_done_and_as_much_at_once_as_may_be(
    num_at_once: int, is_shared: bool, tenants: list[UUID]
) -> None:
    turns = SharedTurns(num_at_once, max_waiting=1_000, what="items wait", is_shared=is_shared)
    running: Counter[UUID] = Counter()
    most: Counter[UUID] = Counter()
    num_most = 0

    async def work(tenant_id: UUID, num_rounds: int) -> None:
        nonlocal num_most
        await turns.take(tenant_id)
        running[tenant_id] += 1
        most[tenant_id] = max(most[tenant_id], running[tenant_id])
        num_most = max(num_most, running.total())
        for _ in range(num_rounds):
            await asyncio.sleep(0)
        running[tenant_id] -= 1
        turns.leave(tenant_id)

    works = (work(tenant_id, number % 5) for number in range(40) for tenant_id in tenants)
    await asyncio.wait_for(asyncio.gather(*works), 300)
    assert num_most <= num_at_once
    if len(tenants) == 1:
        assert num_most == ((num_at_once + 1) // 2 if is_shared else num_at_once)
    elif is_shared and num_at_once > 1:
        assert max(most.values()) < num_at_once


def make_services(**given: Any) -> Services:
    """With turns of queries, and nothing else but what is given."""
    needed = {one.name: None for one in fields(Services) if one.default_factory is MISSING}
    turns = {
        "read_turns": turns_of_queries(MAX_READS, is_shared=False),
        "write_turns": turns_of_queries(MAX_WRITES, is_shared=False),
    }
    make: Any = Services
    services: Services = make(**needed | turns | given)
    return services


async def take_all_turns(turns: SharedTurns, number: int) -> None:
    for _ in range(number):
        await turns.take(ONE)


async def test_who_waits_for_the_queue_monitor_takes_no_turn_of_a_query() -> None:
    async def answer(*_: Any, **__: Any) -> QueueView:
        return UNKNOWN_PLACE

    services = make_services(monitor=SimpleNamespace(position=answer, read=answer))
    await take_all_turns(services.read_turns, MAX_READS)
    await take_all_turns(services.write_turns, MAX_WRITES)
    for _ in range(2 * MAX_READS):
        assert await services.position(uuid4(), "test-model") == UNKNOWN_PLACE
        await services.refresh_queues()


async def test_reads_and_writes_take_turns_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(*_: Any, **__: Any) -> str:
        return "done"

    monkeypatch.setattr(api_services, "repeatable", answer)
    monkeypatch.setattr("api.services._write", answer)
    function: Any = None
    services = make_services()
    await take_all_turns(services.read_turns, MAX_READS)
    assert await services.write(function) == "done"
    services = make_services()
    await take_all_turns(services.write_turns, MAX_WRITES)
    assert await services.read(function) == "done"


async def test_a_query_that_was_given_up_before_its_turn_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was given up later keeps its turn until it is over."""
    begun: list[str] = []
    may_end = asyncio.Event()

    async def query(_: Any, name: str) -> None:
        begun.append(name)
        await may_end.wait()

    monkeypatch.setattr(api_services, "repeatable", query)
    monkeypatch.setattr(api_services, "ANSWER_SECONDS", 0.01)
    services = make_services(read_turns=turns_of_queries(1, is_shared=True))
    for name in ("one", "two", "three"):
        with pytest.raises(StorageUnavailable):
            await services.read(name)  # type: ignore[arg-type]
    may_end.set()
    await asyncio.wait_for(services.read_turns.take(ONE), 60)
    services.read_turns.leave(ONE)
    monkeypatch.setattr(api_services, "ANSWER_SECONDS", 60.0)
    await services.read("four")  # type: ignore[arg-type]
    assert begun == ["one", "four"]


def test_a_stream_that_fails_is_counted_as_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setattr(api_limits, "stream_connections", SimpleNamespace(set=shown.append))
    places = api_limits.StreamPlaces(4, is_shared=True)
    with pytest.raises(ZeroDivisionError), places.hold():
        raise ZeroDivisionError
    assert shown == [1, places.num_taken] == [1, 0]


def test_failures_of_a_tenants_receiving_hosts_are_remembered_for_a_while_and_the_latest_ones_only() -> None:
    hosts = Hosts()

    def fail(host: tuple[UUID, str], clock: float) -> None:
        hosts.begin(host)
        hosts.end(host, clock, has_answered=False)

    down = (ONE, "down.test")
    for _ in range(NUM_FAILURES_TO_OPEN):
        fail(down, 0.0)
    assert hosts.rooms(1.0) == {down: 0}
    assert hosts.rooms(FORGET_SECONDS) == {down: 1}
    assert hosts.rooms(FORGET_SECONDS + 1.0) == {}
    for number in range(2 * MAX_FAILING):
        fail((OTHER, f"{number}.test"), FORGET_SECONDS)
    assert len(hosts._failures) == MAX_FAILING
    fail(down, 3 * FORGET_SECONDS)
    assert list(hosts._failures) == [down]


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


def test_who_remembers_a_thousand_things_pushes_out_none_of_a_neighbour() -> None:
    memory = SharedMemory[int, str](8)
    for number in range(3):
        memory.keep(OTHER, number, "theirs")
    for number in range(1_000):
        memory.keep(ONE, number, "mine")
    assert [memory.find(OTHER, number) for number in range(4)] == ["theirs"] * 3 + [None]
    assert [number for number in range(1_000) if memory.find(ONE, number)] == list(range(995, 1_000))
    assert len(memory) == 8
    memory.clear()
    assert (len(memory), memory.find(OTHER, 0)) == (0, None)


def test_what_was_used_last_is_remembered() -> None:
    memory = SharedMemory[int, str](3)
    for number in range(3):
        memory.keep(ONE, number, "mine")
    assert memory.find(ONE, 0) == "mine"
    memory.keep(ONE, 3, "mine")
    assert [memory.find(ONE, number) for number in range(4)] == ["mine", None, "mine", "mine"]


def test_of_tenants_with_one_thing_each_the_one_not_heard_of_for_longest_forgets_it() -> None:
    memory = SharedMemory[int, str](2)
    memory.keep(ONE, 0, "mine")
    memory.keep(OTHER, 0, "theirs")
    assert memory.find(ONE, 0) == "mine"
    memory.keep(THIRD, 0, "new")
    assert [memory.find(tenant, 0) for tenant in (ONE, OTHER, THIRD)] == ["mine", None, "new"]
