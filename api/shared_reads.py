"""Reads whose answer is the same for all who ask for it, such as for the job that many streams begin to read."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class SharedReads(Generic[Answer]):
    """Of each key, one read runs at a time, and whoever asks meanwhile shares the next one: the one that runs may have
    begun before what the other must see was committed."""

    def __init__(self) -> None:
        self._next: dict[Hashable, asyncio.Future[Answer] | None] = {}  # of each key that is being read
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references

    async def read(self, key: Hashable, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """`key` says all that `ask` depends on. Raises what that raises."""
        if key not in self._next:
            self._next[key] = None
            try:
                return await ask()
            finally:
                self._go_on(key, ask)
        shared = self._next[key]
        if shared is None:
            shared = self._next[key] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(shared)

    def _go_on(self, key: Hashable, ask: Callable[[], Awaitable[Answer]]) -> None:
        shared = self._next[key]
        if shared is None:
            del self._next[key]
            return
        self._next[key] = None
        task = asyncio.create_task(self._answer(key, ask, shared))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(
        self, key: Hashable, ask: Callable[[], Awaitable[Answer]], shared: "asyncio.Future[Answer]"
    ) -> None:
        try:
            shared.set_result(await ask())
        except Exception as exc:
            shared.set_exception(exc)
            shared.exception()  # everybody may have left, and nobody would retrieve it
        except BaseException:
            shared.cancel()
            raise
        finally:
            self._go_on(key, ask)
