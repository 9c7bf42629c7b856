"""Requests of a tenant begin a few at a time, and those of others do not wait for them."""

import asyncio
from itertools import pairwise
from uuid import UUID

import pytest
from starlette.requests import ClientDisconnect

from api.starts import Starts
from domain.errors import ServerOverloaded
from domain.shares import PER_TURN, a_few_in_a_turn

ONE, OTHER = UUID(int=1), UUID(int=2)


async def test_another_tenants_request_begins_although_many_wait() -> None:
    starts, begun = Starts(), []

    async def begin(tenant_id: UUID, number: int) -> None:
        await starts.take(tenant_id)
        begun.append((tenant_id, number))

    tasks = [asyncio.create_task(begin(ONE, number)) for number in range(5 * PER_TURN)]
    tasks.append(asyncio.create_task(begin(OTHER, 0)))
    await asyncio.sleep(0)
    assert begun == [*((ONE, number) for number in range(PER_TURN)), (OTHER, 0)]
    await asyncio.gather(*tasks)
    assert [number for tenant_id, number in begun if tenant_id == ONE] == list(range(5 * PER_TURN))


async def test_requests_with_long_steps_begin_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.starts.LONG_SECONDS", -1.0)
    starts, begun = Starts(), []

    async def begin(number: int) -> None:
        await starts.take(ONE)
        begun.append(number)

    tasks = [asyncio.create_task(begin(number)) for number in range(3 * PER_TURN)]
    so_far = []
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        so_far.append(len(begun))
    assert so_far[0] == PER_TURN
    assert max(after - before for before, after in pairwise(so_far)) == 1


async def test_those_who_waited_for_the_same_thing_go_on_a_few_at_a_time() -> None:
    waiting = [asyncio.get_running_loop().create_future() for _ in range(3 * PER_TURN)]
    went_on: list[int] = []

    async def wait(number: int) -> None:
        await waiting[number]
        went_on.append(number)

    async def wake() -> None:
        async for one in a_few_in_a_turn(waiting):
            one.set_result(None)

    tasks = [asyncio.create_task(wait(number)) for number in range(len(waiting))]
    await asyncio.sleep(0)
    waking = asyncio.create_task(wake())
    so_far = []
    while not waking.done():
        await asyncio.sleep(0)
        so_far.append(len(went_on))
    await asyncio.gather(*tasks)
    assert went_on == list(range(len(waiting)))
    assert max(after - before for before, after in pairwise(so_far)) == PER_TURN


async def test_a_request_that_is_given_up_takes_no_turn() -> None:
    starts = Starts()
    for _ in range(PER_TURN):
        await starts.take(ONE)
    given_up, kept = (asyncio.create_task(starts.take(ONE)) for _ in range(2))
    await asyncio.sleep(0)
    given_up.cancel()
    await kept
    await starts.take(ONE)


async def test_requests_of_clients_that_have_gone_take_no_turn_of_others() -> None:
    starts = Starts()
    begun = [asyncio.create_task(starts.take(ONE)) for _ in range(PER_TURN)]
    gone = [asyncio.create_task(starts.take(ONE, lambda: True)) for _ in range(3 * PER_TURN)]
    kept = asyncio.create_task(starts.take(ONE))
    for _ in range(3):  # they queue, the next turn comes, they go on
        await asyncio.sleep(0)
    assert kept.done()
    await asyncio.gather(*begun)
    assert all(isinstance(one, ClientDisconnect) for one in await asyncio.gather(*gone, return_exceptions=True))


async def test_a_tenant_with_too_many_waiting_requests_is_refused_and_others_are_not() -> None:
    starts = Starts(max_waiting=8)
    tasks = [asyncio.create_task(starts.take(ONE)) for _ in range(PER_TURN + 4)]
    tasks += [asyncio.create_task(starts.take(OTHER)) for _ in range(PER_TURN + 1)]
    await asyncio.sleep(0)
    with pytest.raises(ServerOverloaded, match="4 of your requests are waiting to begin"):
        await starts.take(ONE)
    await asyncio.gather(*tasks)
