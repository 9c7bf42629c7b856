"""What one process takes at a time: large bodies and answers, uploads, streams.

Work that grows with the size of a request or of an answer: off the event loop where the size is large.

The thread shares the interpreter's lock with the loop, which gets its turn every few milliseconds while Python runs,
and has to wait for what C code does at one go. One thread, because two would take from the loop twice and be no faster.

How many uploads one process takes at once, and how many of them may be one tenant's.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from domain.errors import ServerOverloaded
from domain.requests import EmbeddingResult, JobOutput
from metrics import stream_connections

LARGE_BYTES = 65_536  # what is smaller takes the loop less than a thread's switch under load is worth

MAX_WAITING = 64

NUMBER_BYTES = 4  # of an embedding's JSON, for each character of its base64

TOKEN_BYTES = 80  # of one token among logprobs

P = ParamSpec("P")

Result = TypeVar("Result")


def size_of(output: JobOutput | None) -> int:
    """About how many bytes an answer has that shows all of it."""
    if output is None:
        return 0
    if isinstance(output, EmbeddingResult):
        return NUMBER_BYTES * sum(len(vector) for vector in output.embeddings)
    logprobs = [one for choice in output.choices for one in choice.logprobs or ()]
    logprobs += [one for one in output.prompt_logprobs or () if one is not None]
    num_tokens = sum(1 + len(one.top) for one in logprobs)
    return sum(len(choice.text) for choice in output.choices) + TOKEN_BYTES * num_tokens


class LargeWork:
    """The thread, and how much waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="large-work")
        self._num_waiting = 0

    async def run(self, num_bytes: int, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """What `function` returns or raises; it touches nothing that belongs to the event loop. `num_bytes` is the size
        of what it works on. Raises ServerOverloaded where too much waits already."""
        if num_bytes <= LARGE_BYTES:
            return function(*args, **kwargs)
        if self._num_waiting >= MAX_WAITING:
            raise ServerOverloaded(f"{MAX_WAITING} large bodies wait for their turn here; retry in a moment")
        self._num_waiting += 1
        work = partial(copy_context().run, function, *args, **kwargs)
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        future.add_done_callback(self._forget)
        return await asyncio.shield(future)

    def _forget(self, future: "asyncio.Future[Any]") -> None:
        # A thread cannot be stopped: what nobody waits for any more keeps its place in the bound until it is through.
        self._num_waiting -= 1
        if not future.cancelled():
            future.exception()  # read, so that it is not reported as never retrieved

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


TENANT_SHARE = 0.75  # of the places; where there is more than one, a tenant never has them all


class UploadSlots:
    """The places, and who holds them."""

    def __init__(self, max_open: int, *, is_shared: bool) -> None:
        """`is_shared`: several tenants may come."""
        self._max_open = max_open
        self._max_per_tenant = max(1, int(max_open * TENANT_SHARE)) if is_shared else max_open
        self._num_by_tenant: Counter[UUID] = Counter()

    @contextlib.contextmanager
    def hold(self, tenant_id: UUID) -> Iterator[None]:
        """Raises ServerOverloaded where no place is free."""
        if self._num_by_tenant.total() >= self._max_open:
            raise ServerOverloaded("as many uploads as this server takes at once are under way; retry in a moment")
        if self._num_by_tenant[tenant_id] >= self._max_per_tenant:
            raise ServerOverloaded(
                f"{self._max_per_tenant} uploads of yours are under way, as many as one tenant may have; retry when "
                "one is done"
            )
        self._num_by_tenant[tenant_id] += 1
        try:
            yield
        finally:
            self._num_by_tenant[tenant_id] -= 1
            self._num_by_tenant += Counter()  # forgets those who hold none


class StreamSlots:
    """How many streams and long polls one process holds open at once."""

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_open = 0

    @property
    def is_full(self) -> bool:
        return self.num_open >= self.max_open

    def refuse_if_full(self) -> None:
        if self.is_full:
            raise ServerOverloaded(f"{self.max_open} streams are open here already; retry, or poll the job instead")

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.num_open += 1
        stream_connections.set(self.num_open)
        try:
            yield
        finally:
            self.num_open -= 1
            stream_connections.set(self.num_open)
