"""Limits on what one API process does at the same time: large bodies and answers, uploads, streams. Tenants share them.

Work on large bodies and answers runs in a single thread beside the event loop. The two share the interpreter's lock:
Python code yields it every few milliseconds, C code only when it returns. A second thread would take more time from the
loop and finish no sooner.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import ParamSpec, TypeVar

from domain.errors import InvalidRequest, ServerOverloaded, TooManyStreams
from domain.limits import counted, stream_limits_context
from domain.requests import EmbeddingResult, JobOutput
from domain.shares import SharedPlaces, current_tenant
from local.shared_threads import SharedThreads
from metrics import stream_connections

LARGE_BYTES = 65_536  # smaller work blocks the loop for less time than a thread switch under load would cost

MAX_WAITING = 128  # pieces of large work

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
    """A single thread for large work, with a bounded queue in which tenants take turns."""

    def __init__(self) -> None:
        self._threads = SharedThreads(
            1, max_waiting=MAX_WAITING, name="large-work", what="large requests are waiting to be processed"
        )

    async def run(self, num_bytes: int, function: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Returns or raises what `function` does; it must not touch anything that belongs to the event loop.
        `num_bytes` is the size of its input or output; small work is done at once, without the thread. Raises
        ServerOverloaded if too much of the tenant's is waiting."""
        if num_bytes <= LARGE_BYTES:
            return function(*args, **kwargs)
        return await self._threads.run(partial(function, *args, **kwargs))

    def close(self) -> None:
        self._threads.close()


class RequestPlaces(SharedPlaces):
    """Places that the current tenant's requests hold while they last, such as those of uploads."""

    def __init__(self, num_places: int, *, is_shared: bool, what: str, remedy: str) -> None:
        """`what` and `remedy` are for refusals: "uploads are in progress", "retry in a moment"."""
        super().__init__(num_places, is_shared=is_shared)
        self._what = what
        self._remedy = remedy

    @property
    def is_full(self) -> bool:
        """Whether the current tenant can have no more."""
        return not self.room_of(current_tenant.get())

    def refuse_if_full(self) -> None:
        """Raises ServerOverloaded."""
        if self.is_full:
            num_own = self.num_of(current_tenant.get())
            raise ServerOverloaded(
                f"{num_own} of your {self._what}, and {self.num_taken} of all tenants', of the {self.num_places} that "
                f"this server allows; {self._remedy}"
            )

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Does not refuse, as an answer may have begun."""
        tenant_id = current_tenant.get()
        self.take(tenant_id)
        try:
            yield
        finally:
            self.leave(tenant_id)


STREAM_RETRY_SECONDS = 5.0  # when streams end, nobody knows


class StreamPlaces(RequestPlaces):
    """Those of open streams, long polls, and calls that wait for their answer."""

    def __init__(self, num_places: int, *, is_shared: bool) -> None:
        remedy = "close some, retry later, or poll the job instead"
        super().__init__(num_places, is_shared=is_shared, what="streams are open", remedy=remedy)
        self._num_by_key: Counter[str] = Counter()

    @property
    def is_full(self) -> bool:
        return super().is_full or self._limit_reached() is not None

    def refuse_if_full(self) -> None:
        """Raises TooManyStreams or ServerOverloaded."""
        if (refusal := self._limit_reached()) is not None:
            raise refusal
        super().refuse_if_full()

    def refuse_if_below(self, num_streams: int, *, what: str, remedy: str) -> None:
        """Raises InvalidRequest if the request's key or tenant can never have that many streams at once."""
        _, limits = stream_limits_context.get()
        for whose, limit in (("key", limits.key_streams), ("tenant", limits.tenant_streams)):
            if limit is not None and limit < num_streams:
                raise InvalidRequest(
                    f"{what} takes {num_streams} streams, and streams of your {whose} is {limit}; {remedy}, or have an "
                    "administrator raise streams"
                )

    def _limit_reached(self) -> TooManyStreams | None:
        """Of the request's key or tenant."""
        key_id, limits = stream_limits_context.get()
        num_of_tenant = self.num_of(current_tenant.get())
        for whose, num_open, limit in (
            ("key", self._num_by_key[key_id or ""], limits.key_streams),
            ("tenant", num_of_tenant, limits.tenant_streams),
        ):
            if limit is not None and num_open >= limit:
                are = "is" if num_open == 1 else "are"
                return TooManyStreams(
                    f"{counted(num_open, 'stream')} of your {whose} {are} open here, counting calls that wait for "
                    f"their answer, and its limit is {limit}; close some, poll the job instead, or have an "
                    "administrator raise streams",
                    retry_after_seconds=STREAM_RETRY_SECONDS,
                )
        return None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        key_id, _ = stream_limits_context.get()
        try:
            with super().hold(), self._counted(key_id):
                stream_connections.set(self.num_taken)
                yield
        finally:
            stream_connections.set(self.num_taken)

    @contextlib.contextmanager
    def _counted(self, key_id: str | None) -> Iterator[None]:
        if key_id is None:
            yield
            return
        self._num_by_key[key_id] += 1
        try:
            yield
        finally:
            self._num_by_key[key_id] -= 1
            if not self._num_by_key[key_id]:
                del self._num_by_key[key_id]


MAX_DOWNLOADS = 64  # of files; each is read piece by piece

MAX_LARGE_BODIES = 256  # that are arriving, each in memory as a whole


def places_of_uploads(num_places: int, *, is_shared: bool) -> RequestPlaces:
    what = "uploads are in progress"
    return RequestPlaces(num_places, is_shared=is_shared, what=what, remedy="retry when one is done")


def places_of_downloads(*, is_shared: bool) -> RequestPlaces:
    what = "downloads are in progress"
    return RequestPlaces(MAX_DOWNLOADS, is_shared=is_shared, what=what, remedy="retry when one is done")


def places_of_large_bodies(*, is_shared: bool) -> RequestPlaces:
    what = f"requests with bodies of more than {LARGE_BYTES} bytes are arriving"
    return RequestPlaces(MAX_LARGE_BODIES, is_shared=is_shared, what=what, remedy="retry in a moment")
