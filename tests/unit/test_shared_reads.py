"""Who asks while a read runs shares the next one."""

import asyncio

import pytest

from api.shared_reads import SharedReads

pytestmark = pytest.mark.anyio


async def test_those_who_ask_while_a_read_runs_share_the_next_one() -> None:
    reads, num_asked = SharedReads[int](), 0

    async def ask() -> int:
        nonlocal num_asked
        num_asked += 1
        number = num_asked
        await asyncio.sleep(0)
        return number

    assert await asyncio.gather(*(reads.read("a", ask) for _ in range(100))) == [1, *[2] * 99]
    assert await reads.read("a", ask) == 3
    assert sorted(await asyncio.gather(reads.read("a", ask), reads.read("b", ask))) == [4, 5]


async def test_who_leaves_takes_nobody_along_and_errors_reach_everybody() -> None:
    reads, may_end, is_broken = SharedReads[str](), asyncio.Event(), False

    async def ask() -> str:
        await may_end.wait()
        if is_broken:
            raise ValueError("the database is away")
        return "found"

    first, second, third = (asyncio.create_task(reads.read("a", ask)) for _ in range(3))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    may_end.set()
    assert await third == "found"
    is_broken = True
    found = await asyncio.gather(*(reads.read("a", ask) for _ in range(3)), return_exceptions=True)
    assert [str(one) for one in found] == ["the database is away"] * 3
