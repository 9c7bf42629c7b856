"""What a stream tells beside its chunks."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from api.events import interleave
from tests.waiting import SECONDS

pytestmark = pytest.mark.anyio


async def count(number: int, *, pause: float = 0.0) -> AsyncIterator[int]:
    for item in range(number):
        await asyncio.sleep(pause)
        yield item


async def test_no_item_waits_for_an_answer() -> None:
    asked = asyncio.Event()

    async def ask() -> str:
        asked.set()
        await asyncio.Event().wait()
        return "never"

    async with asyncio.timeout(SECONDS):
        told = [one async for one in interleave(count(3, pause=0.1), ask, waits=(0.01, 0.01), is_wanted=lambda: True)]
    assert asked.is_set()
    assert told == [0, 1, 2]


async def test_answers_come_between_the_items_while_they_are_wanted() -> None:
    answers = iter(range(100, 200))
    told: list[int] = []

    async def ask() -> int:
        return next(answers)

    async for one in interleave(count(2, pause=0.3), ask, waits=(0.01, 0.1), is_wanted=lambda: 0 not in told):
        told.append(one)
    before, after = told[: told.index(0)], told[told.index(0) + 1 :]
    assert before[:2] == [100, 101]
    assert after == [1]
