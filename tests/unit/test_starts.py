"""Requests of a tenant begin a few at a time, and those of others do not wait for them."""

import asyncio
from uuid import UUID

from api.starts import Starts

ONE, OTHER = UUID(int=1), UUID(int=2)


async def test_another_tenants_request_begins_although_many_wait() -> None:
    starts, begun = Starts(per_turn=2), []

    async def begin(tenant_id: UUID, number: int) -> None:
        await starts.take(tenant_id)
        begun.append((tenant_id, number))

    tasks = [asyncio.create_task(begin(ONE, number)) for number in range(20)]
    tasks.append(asyncio.create_task(begin(OTHER, 0)))
    await asyncio.sleep(0)
    assert begun == [(ONE, 0), (ONE, 1), (OTHER, 0)]
    await asyncio.gather(*tasks)
    assert [number for tenant_id, number in begun if tenant_id == ONE] == list(range(20))


async def test_a_request_that_is_given_up_takes_no_turn() -> None:
    starts = Starts(per_turn=1)
    await starts.take(ONE)
    given_up, kept = (asyncio.create_task(starts.take(ONE)) for _ in range(2))
    await asyncio.sleep(0)
    given_up.cancel()
    await kept
    await starts.take(ONE)
