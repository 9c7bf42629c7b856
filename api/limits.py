"""Limits on what one API process does at the same time: large bodies and answers, uploads, streams.

Work on large bodies and answers runs in a single thread beside the event loop. The two share the interpreter's lock:
Python code yields it every few milliseconds, C code only when it returns. A second thread would take more time from the
loop and finish no sooner.
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

LARGE_BYTES = 65_536  # smaller work blocks the loop for less time than a thread switch under load would cost

MAX_WAITING = 64  # pieces of large work, the running one included

NUMBER_BYTES = 4  # of JSON, for each character of an embedding's base64

TOKEN_BYTES = 80  # of JSON, for each token that has a logprob

P = ParamSpec("P")

Result = TypeVar("Result")


def size_of(output: JobOutput | None) -> int:
    """The approximate size in bytes of an answer with this output."""
    if output is None:
        return 0
    if isinstance(output, EmbeddingResult):
        return NUMBER_BYTES * sum(len(vector) for vector in output.embeddings)
    logprobs = [one for choice in output.choices for one in choice.logprobs or ()]
    logprobs += [one for one in output.prompt_logprobs or () if one is not None]
    num_tokens = sum(1 + len(one.top) for one in logprobs)
    return sum(len(choice.text) for choice in output.choices) + TOKEN_BYTES * num_tokens


class LargeWork:
    """A single thread for large work, with a bounded queue."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="large-work")
        self._num_waiting = 0

    async def run(self, num_bytes: int, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Returns or raises what `function` does; it must not touch anything that belongs to the event loop.
        `num_bytes` is the size of its input or output; small work is done at once, without the thread. Raises
        ServerOverloaded if the queue is full."""
        if num_bytes <= LARGE_BYTES:
            return function(*args, **kwargs)
        if self._num_waiting >= MAX_WAITING:
            raise ServerOverloaded(f"{MAX_WAITING} large requests are waiting to be processed here; retry in a moment")
        self._num_waiting += 1
        work = partial(copy_context().run, function, *args, **kwargs)
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        future.add_done_callback(self._forget)
        return await asyncio.shield(future)

    def _forget(self, future: "asyncio.Future[Any]") -> None:
        # A thread cannot be interrupted, so abandoned work counts towards the bound until it is finished.
        self._num_waiting -= 1
        if not future.cancelled():
            future.exception()  # read, so that it is not reported as never retrieved

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


TENANT_SHARE = 0.75  # of the upload slots; no tenant ever holds all of them


class UploadSlots:
    """How many uploads one process receives at once, in total and per tenant."""

    def __init__(self, max_open: int, *, is_shared: bool) -> None:
        """`is_shared`: there may be several tenants, so each gets at most TENANT_SHARE of the slots."""
        self._max_open = max_open
        self._max_per_tenant = max(1, int(max_open * TENANT_SHARE)) if is_shared else max_open
        self._num_by_tenant: Counter[UUID] = Counter()

    @contextlib.contextmanager
    def hold(self, tenant_id: UUID) -> Iterator[None]:
        """Raises ServerOverloaded if there is no free slot, or none for this tenant."""
        if self._num_by_tenant.total() >= self._max_open:
            raise ServerOverloaded(
                f"{self._max_open} uploads are in progress, the most this server takes at once; retry in a moment"
            )
        if self._num_by_tenant[tenant_id] >= self._max_per_tenant:
            raise ServerOverloaded(
                f"{self._max_per_tenant} of your uploads are in progress, the most one tenant may have; retry when one "
                "is done"
            )
        self._num_by_tenant[tenant_id] += 1
        try:
            yield
        finally:
            self._num_by_tenant[tenant_id] -= 1
            self._num_by_tenant += Counter()  # drops tenants without uploads


class StreamSlots:
    """How many streams and long polls one process holds open at once."""

    def __init__(self, max_open: int) -> None:
        self.max_open = max_open
        self.num_open = 0

    @property
    def is_full(self) -> bool:
        return self.num_open >= self.max_open

    def refuse_if_full(self) -> None:
        """Raises ServerOverloaded."""
        if self.is_full:
            raise ServerOverloaded(
                f"{self.max_open} streams are open, the most this server allows; retry later, or poll the job instead"
            )

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self.num_open += 1
        stream_connections.set(self.num_open)
        try:
            yield
        finally:
            self.num_open -= 1
            stream_connections.set(self.num_open)
