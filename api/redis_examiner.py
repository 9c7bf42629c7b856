"""Whether Redis answers, soon, takes what is written, and keeps it: looked at for api/examiner.py."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from api.reasons import Reason, ReasonCode
from domain.addresses import RedisUrl
from storage import certificates
from storage.stream_channels import REDIS_OUTAGES

CHECK_SECONDS = 2.0  # how long a look may take
SLOW_SECONDS, NUM_SLOW = 0.25, 3  # answers in a row, each of them slower than this; workers wait for 0.2 s
INFO_SECONDS = 5.0  # between two looks at its settings
PROBE = "celeriac.health"
KEEPS_ALL = "noeviction"

#: What the client says when there is no connection, and what that means. It has no codes.
REFUSALS = (
    ("max number of clients", "its maxclients are in use, raise it or run fewer processes"),
    ("loading the dataset", "it is reading its data, wait or see its log"),
    ("Connect call failed", "nothing listens there, start Redis or see its log"),
    ("refused", "nothing listens there, start Redis or see its log"),
    ("No such file", "nothing listens there, start Redis or see its log"),
    ("Name or service not known", "its name is not known, see CELERIAC_REDIS_URL"),
    ("name resolution", "its name is not known, see CELERIAC_REDIS_URL"),
    ("No address associated", "its name is not known, see CELERIAC_REDIS_URL"),
    ("No route to host", "no network leads there, see CELERIAC_REDIS_URL"),
    ("certificate", "TLS fails, see its certificate and CELERIAC_REDIS_URL"),
    ("SSL", "TLS fails, see its certificate and CELERIAC_REDIS_URL"),
    ("closed by server", "it ended or is cut off, see its log"),
)


class RedisExaminer:
    """Has a connection of its own: those of requests are tried again for longer than a look may take, which would hide
    what is wrong with them."""

    def __init__(self, redis_url: str) -> None:
        server = certificates.redis_server(RedisUrl.read(redis_url))
        self.servers = [] if server is None else [server]  # whose certificates are verified
        once_more = Retry(NoBackoff(), 1)  # at once, since a server that was started again has closed the connection
        self._client = redis.asyncio.Redis.from_url(
            redis_url,
            socket_timeout=CHECK_SECONDS,
            socket_connect_timeout=CHECK_SECONDS,
            retry=once_more,
            max_connections=1,
        )
        self._asked_at = float("-inf")  # monotonic: when its settings were read
        self._eviction: list[Reason] = []

    async def reasons(self) -> list[Reason]:
        """Writes, since Redis answers to a PING as well when it is full."""
        answers: list[float] = []  # how long each took
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await self._time_writes(answers)
                if answers[-1] < SLOW_SECONDS:
                    await self._look_at_settings()
            return [*slowness_reasons(answers), *self._eviction]
        except OutOfMemoryError:
            remedy = "raise its maxmemory; streams and starts are slower, nothing is lost"
            return [Reason(ReasonCode.REDIS_FULL, f"Redis has no memory left: {remedy}")]
        except (AuthenticationError, ResponseError) as exc:
            # Which user and which command is for doctor to say.
            what = "no permission" if isinstance(exc, NoPermissionError) else str(exc).partition(".")[0]
            return [Reason(ReasonCode.REDIS_REFUSES, f"Redis refuses to write ({what}): see its log and its ACL")]
        except REDIS_OUTAGES as exc:
            if answers and isinstance(exc, TimeoutError | RedisTimeoutError):  # it answers, but not soon enough
                return [*slowness_reasons(answers), *self._eviction]
            return [outage(exc)]

    async def close(self) -> None:
        with suppress(*REDIS_OUTAGES):
            await self._client.aclose()

    async def _time_writes(self, answers: list[float]) -> None:
        """One that took long is asked again, as this process may have been busy, if that can be answered in time: to
        give up would close the connection, and a slow server is slow to give another."""
        for _ in range(NUM_SLOW):
            began_at = time.monotonic()
            await self._client.set(PROBE, "", ex=60)
            answers.append(time.monotonic() - began_at)
            if answers[-1] < SLOW_SECONDS or sum(answers) + answers[-1] > CHECK_SECONDS:
                return

    async def _look_at_settings(self) -> None:
        if time.monotonic() - self._asked_at > INFO_SECONDS:
            self._asked_at = time.monotonic()
            try:
                info: dict[str, Any] = await self._client.info("memory")
            except RedisError:  # such as for want of the right: the next look tells
                info = {}
            self._eviction = list(eviction_reasons(info))


def slowness_reasons(answers: Sequence[float]) -> Iterator[Reason]:
    """`answers`: how many seconds each took."""
    fastest = min(answers)
    if fastest >= SLOW_SECONDS:
        remedy = "see the load of its machine and the network to it; streams and starts are slower, nothing is lost"
        yield Reason(ReasonCode.REDIS_SLOW, f"Redis takes {fastest:.1f} s for the simplest write: {remedy}")


def eviction_reasons(info: dict[str, Any]) -> Iterator[Reason]:
    policy = str(info.get("maxmemory_policy", KEEPS_ALL))
    if info.get("maxmemory") and policy != KEEPS_ALL:
        seen = f"Redis may drop what it was given, as its maxmemory-policy is {policy}"
        yield Reason(ReasonCode.REDIS_EVICTS, f"{seen}: CONFIG SET maxmemory-policy {KEEPS_ALL}")


def outage(exc: BaseException) -> Reason:
    """Why Redis cannot be asked."""
    said = str(exc)
    for words, remedy in REFUSALS:
        if words in said:
            seen = f"Redis gives no connection: {remedy}; streams are slower, nothing is lost"
            return Reason(ReasonCode.REDIS_UNAVAILABLE, seen)
    what = f"Redis does not answer within {CHECK_SECONDS:g} s"
    remedy = "see whether it runs, and CELERIAC_REDIS_URL; streams are slower, nothing is lost"
    return Reason(ReasonCode.REDIS_UNAVAILABLE, f"{what}: {remedy}")
