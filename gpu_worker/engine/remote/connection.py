"""The connection to a remote server: a thread with an event loop, which sends requests and reads their streams.

The engine's thread starts and cancels calls, and takes what they have brought from a queue. An answer cannot fill the
memory, since a call ends once it has brought more tokens than it asked for.
"""

import asyncio
import contextlib
import logging
import os
import queue
import re
import ssl
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import httpx
import orjson

from domain.catalog import RemoteOptions
from gpu_worker.engine.remote.answers import Delta, Fault, ServerFailure, failure_of, read_delta, read_events

log = logging.getLogger(__name__)

MAX_ERROR_BYTES = 64 * 1024
MAX_LIST_BYTES = 16 * 1024 * 1024  # of models, or of metrics
METRICS_SECONDS = 1.0
PROBE_SECONDS = 10.0

#: How many requests wait at vLLM, SGLang, llama-server and TGI.
_WAITING = re.compile(
    rb"^(?:vllm:num_requests_waiting|sglang:num_queue_reqs|llamacpp:requests_deferred|tgi_queue_size)"
    rb"(?:\{[^}]*\})? ([0-9.e+]+)",
    re.MULTILINE,
)


@dataclass(slots=True, eq=False)
class Call:
    """One request. Its fields are the calling thread's until it is started, then the connection's."""

    body: dict[str, Any]
    max_tokens: int
    path: str = "completions"
    read: Callable[[bytes], Delta | None] = read_delta  # makes a delta of an event
    started_at: float = field(default_factory=monotonic)
    task: "asyncio.Task[None] | None" = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The server has accepted the request."""

    call: Call


@dataclass(frozen=True, slots=True)
class Grown:
    call: Call
    delta: Delta


@dataclass(frozen=True, slots=True)
class Broken:
    """Nothing follows. A call that brought a finish reason just ends."""

    call: Call
    failure: ServerFailure


@dataclass(frozen=True, slots=True)
class Probed:
    """Whether the server answers and has the model; if not, why."""

    failure: ServerFailure | None


News = Begun | Grown | Broken | Probed


class Connection:
    def __init__(self, options: RemoteOptions, model: str, *, max_calls: int) -> None:
        """Starts the thread. Raises ValueError if the key's variable is not set or the authority's file is unusable."""
        self.num_waiting_there = 0  # requests, by its metrics
        self._options = options
        self._model = model
        self._key = _key_of(options)
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {self._key}"} if self._key else {},
            verify=_verification(options),
            timeout=httpx.Timeout(options.silence_seconds, connect=options.connect_seconds, pool=None),
            limits=httpx.Limits(max_connections=max_calls + 2, max_keepalive_connections=max_calls + 2),
        )
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="remote", daemon=True)
        self._thread.start()
        if options.metrics_url is not None:
            self._start(self._watch_metrics(options.metrics_url))

    # For the engine's thread

    def start(self, call: Call) -> None:
        self._loop.call_soon_threadsafe(self._begin, call)

    def cancel(self, call: Call) -> None:
        """Close the request. What it has brought may still be in the queue."""
        self._loop.call_soon_threadsafe(self._end, call)

    def probe(self) -> None:
        """Find out whether the server is there. The answer is Probed."""
        self._start(self._probe())

    def take(self, timeout_seconds: float) -> list[News]:
        """Wait for news, then return all there is; nothing if the time runs out first."""
        news: list[News] = []
        with contextlib.suppress(queue.Empty):
            news.append(self._news.get(timeout=timeout_seconds))
            while True:
                news.append(self._news.get_nowait())
        return news

    def close(self) -> None:
        """Close all connections and end the thread. An engine's end does both as well."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    # The connection's own thread

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with self._client:
            await self._stopping.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._loop.call_soon_threadsafe(self._keep, work)

    def _keep(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, call: Call) -> None:
        call.task = self._keep(self._follow(call))

    def _end(self, call: Call) -> None:
        if call.task is not None:
            call.task.cancel()

    async def _follow(self, call: Call) -> None:
        try:
            await self._read(call)
        except ServerFailure as exc:
            self._news.put(Broken(call, self._without_key(exc)))
        except httpx.HTTPError as exc:
            self._news.put(Broken(call, failure_of_transport(exc)))
        except Exception as exc:  # a bug of ours must not leave the job waiting forever
            log.exception("a request to the remote server failed")
            self._news.put(Broken(call, ServerFailure(Fault.BROKEN, type(exc).__name__)))

    async def _read(self, call: Call) -> None:
        num_tokens = 0
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        url = f"{self._options.url}/{call.path}"
        async with self._client.stream("POST", url, content=orjson.dumps(call.body), headers=headers) as response:
            if response.status_code != 200:
                raise failure_of(response.status_code, await _read_some(response, MAX_ERROR_BYTES), response.headers)
            self._news.put(Begun(call))
            async with contextlib.aclosing(read_events(response.aiter_bytes())) as events:
                async for data in events:
                    delta = call.read(data)
                    if delta is None:
                        continue
                    num_tokens += len(delta.token_ids or delta.text)
                    self._news.put(Grown(call, delta))
                    if delta.finish_reason is not None:
                        return
                    if num_tokens > _MAX_OF_A_TOKEN * call.max_tokens:
                        raise ServerFailure(Fault.BROKEN, "it sent far more than max_tokens")
        raise ServerFailure(Fault.BROKEN, "it closed the stream without a finish reason")

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                async with self._client.stream("GET", f"{self._options.url}/models") as response:
                    body = await _read_some(response, MAX_LIST_BYTES)
            self._news.put(Probed(self._judge(response, body)))
        except httpx.HTTPError as exc:
            self._news.put(Probed(failure_of_transport(exc)))
        except TimeoutError:
            self._news.put(Probed(ServerFailure(Fault.AWAY, f"it did not answer within {PROBE_SECONDS:g} s")))

    def _judge(self, response: httpx.Response, body: bytes) -> ServerFailure | None:
        """A server without a list of models may still have this one."""
        if response.status_code in (404, 405, 501):
            return None
        if response.status_code != 200:
            failure = failure_of(response.status_code, body, response.headers)
            return replace(failure, fault=Fault.AWAY)
        try:
            names = [str(model["id"]) for model in orjson.loads(body)["data"]]
        except (LookupError, TypeError, ValueError):
            return None
        if not names or self._model in names:
            return None
        known = ", ".join(names[:8])[:200]
        return ServerFailure(Fault.AWAY, f"it has no model {self._model!r}, but {known}")

    async def _watch_metrics(self, url: str) -> None:
        while True:
            try:
                async with asyncio.timeout(PROBE_SECONDS), self._client.stream("GET", url) as response:
                    found = _WAITING.search(await _read_some(response, MAX_LIST_BYTES))
                self.num_waiting_there = int(float(found[1])) if found else 0
            except (httpx.HTTPError, TimeoutError, ValueError, OverflowError):
                self.num_waiting_there = 0  # then the configured bound is all there is
            await asyncio.sleep(METRICS_SECONDS)

    def _without_key(self, failure: ServerFailure) -> ServerFailure:
        """Some servers quote the key that they refuse."""
        return replace(failure, quote=failure.quote.replace(self._key, "[key]")) if self._key else failure


_MAX_OF_A_TOKEN = 512  # characters of the longest token of any vocabulary


def failure_of_transport(exc: httpx.HTTPError) -> ServerFailure:
    """AWAY if the request has not reached the server; its text would name addresses, so only its type is told."""
    is_away = isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError | httpx.UnsupportedProtocol)
    what = "it cannot be reached" if is_away else "the connection broke off"
    return ServerFailure(Fault.AWAY if is_away else Fault.BROKEN, f"{what} ({type(exc).__name__})")


async def _read_some(response: httpx.Response, max_bytes: int) -> bytes:
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) >= max_bytes:
            break
    return body[:max_bytes]


def _key_of(options: RemoteOptions) -> str | None:
    if options.api_key_env is None:
        return None
    key = os.environ.get(options.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(
            f"api_key_env is {options.api_key_env!r}, but the worker's environment has no key of that name"
        )
    return key


def _verification(options: RemoteOptions) -> ssl.SSLContext | bool:
    if options.ca_file is None or not options.verify:
        return options.verify
    try:
        return ssl.create_default_context(cafile=options.ca_file)
    except (OSError, ssl.SSLError) as exc:
        raise ValueError(f"ca_file is {options.ca_file!r}, which has no usable certificates; correct it") from exc
